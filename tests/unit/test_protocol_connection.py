# SPDX-License-Identifier: BSD-3-Clause
"""The connection: however the bytes are cut, the same events; and every way to get the order wrong."""

from __future__ import annotations

import errno
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.protocol import codec, layouts
from vfio_user.protocol import constants as c
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import Command, Role
from vfio_user.protocol.errors import LocalProtocolError, StreamLost
from vfio_user.protocol.events import BadReply, ErrorReply, Event, Outgoing, Rejected, Reply, Request
from vfio_user.protocol.receive_buffer import COPY_BELOW, INITIAL_SIZE

VERSION = m.VersionRequest(0, 1, b"{}\0")


def wire(
    message_id: int, command: int, body: bytes | m.Message = b"", flags: int = 0, error: int = 0
) -> bytes:
    data = body if isinstance(body, bytes) else layouts.build(body)
    return codec.pack_header(message_id, command, c.HEADER_SIZE + len(data), flags, error) + data


def joined(outgoing: Outgoing) -> bytes:
    return b"".join(outgoing.buffers)


def negotiated() -> tuple[Connection, Connection]:
    """A client and a server that have exchanged VERSION."""
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    (request,) = server.feed(joined(client.request(VERSION)[1]))
    assert isinstance(request, Request)
    (reply,) = client.feed(joined(server.reply(request, m.VersionReply(0, 1))))
    assert isinstance(reply, Reply)
    return client, server


def events_of(connection: Connection, pieces: Iterable[bytes]) -> list[Event | str]:
    """All events, and the reason if the stream gets lost."""
    events: list[Event | str] = []
    try:
        for piece in pieces:
            events += connection.feed(piece)
        connection.feed(b"")
    except StreamLost as lost:
        events.append(lost.reason)
    return events


REQUESTS: list[tuple[int, m.Message]] = [
    (Command.DMA_MAP, m.DmaMapRequest(3, 0, 0, 4096)),
    (Command.DEVICE_GET_INFO, m.DeviceGetInfoRequest()),
    (Command.DEVICE_GET_REGION_INFO, m.DeviceGetRegionInfoRequest(2)),
    (Command.DEVICE_SET_IRQS, m.DeviceSetIrqsRequest(0x22, 0, 0, 2, (True, False))),
    (Command.REGION_READ, m.RegionReadRequest(8, 0, 4)),
    (Command.REGION_WRITE, m.RegionWriteRequest(8, 0, b"abcd")),
    (Command.DEVICE_RESET, m.DeviceResetRequest()),
    (Command.DIRTY_PAGES, m.DirtyPagesRequest(1)),
    (Command.REGION_WRITE_MULTI, m.RegionWriteMultiRequest((m.RegionWrite(0, 0, b"1"),))),
    (Command.MIG_DATA_WRITE, m.MigDataWriteRequest(bytes(range(256)) * 80)),
]
STREAM = b"".join(wire(i, command, body, 0x10 * (i % 2)) for i, (command, body) in enumerate(REQUESTS))
SHORT = STREAM[: -len(wire(0, *REQUESTS[-1]))]
ODD = [
    wire(1, Command.VERSION, VERSION),
    wire(2, 99, b"unknown"),
    wire(3, Command.DMA_READ, m.DmaReadRequest(0, 4)),
    wire(4, Command.REGION_READ, b"short"),
    wire(5, Command.REGION_WRITE, bytes(12) + b"\xff" * 4, 0x10),
    wire(6, Command.DMA_READ, m.DmaReadReply(0, b"late"), 1),
    wire(7, Command.DMA_READ, b"", 0x21, 5),
    wire(8, Command.REGION_READ, m.RegionReadRequest(0, 0, 4), 2),
]
LOST = [b"\0" * 16, codec.pack_header(0, 4, 15), codec.pack_header(0, 4, c.DEFAULT_MAX_MESSAGE_SIZE + 1)]


def test_requests_come_out_as_they_went_in() -> None:
    _, server = negotiated()
    events = server.feed(STREAM)
    assert events == [
        Request(i, Command(command), bool(i % 2), body) for i, (command, body) in enumerate(REQUESTS)
    ]
    assert server.start == server.end


@pytest.mark.parametrize("tail", [b"", *LOST])
def test_a_stream_gives_the_same_events_whole_and_byte_by_byte(tail: bytes) -> None:
    stream = b"".join(ODD) + SHORT + tail
    whole, bytewise = negotiated()[1], negotiated()[1]
    expected = events_of(whole, [stream])
    assert events_of(bytewise, (stream[i : i + 1] for i in range(len(stream)))) == expected
    assert isinstance(expected[-1], str) == bool(tail)
    assert len(expected) > len(ODD)


@given(
    st.lists(st.sampled_from([*ODD, STREAM, *LOST]), max_size=6), st.lists(st.integers(1, 40000), max_size=8)
)
def test_a_stream_gives_the_same_events_however_it_is_cut(parts: list[bytes], cuts: list[int]) -> None:
    stream, pieces, position = b"".join(parts), [], 0
    for cut in cuts:
        pieces.append(stream[position : position + cut])
        position += cut
    pieces.append(stream[position:])
    assert events_of(negotiated()[1], pieces) == events_of(negotiated()[1], [stream])


@given(st.sampled_from(list(Role)), st.lists(st.binary(max_size=100), max_size=5))
def test_random_bytes_raise_nothing_but_stream_lost(role: Role, pieces: list[bytes]) -> None:
    connection = Connection(role)
    connection.max_message_size = 64
    events_of(connection, pieces)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0, 1, 2, 0x10, 0x21]), st.binary(max_size=48)))
)
def test_random_bodies_are_events_and_the_stream_stays_in_step(frames: list[tuple[int, int, bytes]]) -> None:
    server = negotiated()[1]
    stream = b"".join(wire(i, command, body, flags) for i, (command, flags, body) in enumerate(frames))
    events = server.feed(stream)
    assert [event.message_id for event in events] == list(range(len(frames)))


def test_buffer_is_reused_and_grows_only_for_the_message_under_way() -> None:
    _, server = negotiated()
    buffer = server.buffer
    for _ in range(50):
        server.feed(SHORT)
    assert server.buffer is buffer
    big = wire(0, Command.MIG_DATA_WRITE, m.MigDataWriteRequest(bytes(300_000)))
    server.feed(big[:100])
    assert len(server.get_buffer()) >= len(big) - 100
    assert len(server.buffer) < len(big) + 3 * 4096


def test_a_huge_announced_size_does_not_allocate_more_than_the_maximum() -> None:
    server = Connection(Role.SERVER, max_message_size=1000)
    server.feed(b"\0" * 4 + b"\xe8\3\0\0")
    assert len(server.get_buffer()) <= INITIAL_SIZE


def test_a_payload_that_is_kept_is_never_overwritten() -> None:
    _, server = negotiated()
    kept, sizes = [], [10, COPY_BELOW, COPY_BELOW + 1, 100_000, 40_000, 40_000, 200_000, 5]
    for number, size in enumerate(sizes):
        (event,) = server.feed(
            wire(number, Command.MIG_DATA_WRITE, m.MigDataWriteRequest(bytes([number]) * size))
        )
        assert isinstance(event, Request)
        kept.append(event.body)
    for number, (size, body) in enumerate(zip(sizes, kept, strict=True)):
        assert isinstance(body, m.MigDataWriteRequest)
        assert body.data == bytes([number]) * size
        assert memoryview(body.data).readonly


def test_the_buffer_is_reused_when_a_lent_payload_has_been_dropped() -> None:
    _, server = negotiated()
    big = wire(0, Command.MIG_DATA_WRITE, m.MigDataWriteRequest(bytes(300_000)))
    server.feed(big)
    buffer = server.buffer
    for _ in range(5):
        (event,) = server.feed(big)
        del event
        assert server.buffer is buffer


def test_parsing_in_place_and_events_take_turns() -> None:
    _, server = negotiated()
    read = codec.pack_region_read(7, 0x10, 0, 4)
    for _ in range(3000):
        server.get_buffer(80)[:80] = read + read + read[:16]
        server.received(80)
        assert codec.unpack_region_access(server.buffer, server.start)[5:] == (0x10, 0, 4)
        server.start += len(read)
        assert server.next_event() == Request(7, Command.REGION_READ, False, m.RegionReadRequest(0x10, 0, 4))
        assert server.next_event() is None
        assert [event.message_id for event in server.feed(read[16:])] == [7]
    assert len(server.buffer) == INITIAL_SIZE


@pytest.mark.parametrize("room", [1, 1009, 60_000])
def test_what_is_unread_moves_to_the_front_when_the_buffer_is_full(room: int) -> None:
    """The pieces never end where a message ends, so that the buffer is never empty."""
    _, server = negotiated()
    stream = b"".join(codec.pack_region_write(i, i, 0, bytes(i % 50)) for i in range(5000))
    taken, position, buffer = [], 0, server.buffer
    while position < len(stream):
        view = server.get_buffer(room)
        size = min(len(view), 8009, len(stream) - position)
        view[:size] = stream[position : position + size]
        server.received(size)
        position += size
        while isinstance(event := server.next_event(), Request):
            taken.append(event)
    assert [event.message_id for event in taken] == list(range(5000))
    assert [event.body for event in taken] == [m.RegionWriteRequest(i, 0, bytes(i % 50)) for i in range(5000)]
    assert server.buffer is buffer


# Order of VERSION


def test_a_server_refuses_commands_before_version_and_goes_on() -> None:
    server = Connection(Role.SERVER)
    first, second = server.feed(wire(1, Command.DEVICE_RESET) + wire(2, Command.VERSION, VERSION))
    assert isinstance(first, Rejected)
    assert (first.error, first.reason) == (errno.EINVAL, "DEVICE_RESET: no version has been negotiated yet")
    assert joined(server.error(1, first.command_number, first.error)) == wire(1, 13, b"", 0x21, errno.EINVAL)
    assert isinstance(second, Request)
    assert not server.negotiated


def test_version_twice_is_refused_and_the_session_goes_on() -> None:
    _, server = negotiated()
    (again,) = server.feed(wire(9, Command.VERSION, VERSION))
    assert isinstance(again, Rejected)
    assert again.error == errno.EINVAL
    server.error(9, Command.VERSION, again.error)
    assert server.negotiated
    assert isinstance(server.feed(wire(1, Command.DEVICE_RESET))[0], Request)


def test_a_refused_version_may_be_tried_again() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    message_id, outgoing = client.request(m.VersionRequest(7, 0))
    server.feed(joined(outgoing))
    (refused,) = client.feed(joined(server.error(message_id, Command.VERSION, errno.EINVAL)))
    assert refused == ErrorReply(message_id, Command.VERSION, errno.EINVAL)
    (event,) = server.feed(joined(client.request(VERSION)[1]))
    assert isinstance(event, Request)


def test_a_version_too_short_is_rejected_and_does_not_count() -> None:
    server = Connection(Role.SERVER)
    short, good = server.feed(wire(1, Command.VERSION, b"\0\0\0") + wire(2, Command.VERSION, VERSION))
    assert isinstance(short, Rejected)
    assert isinstance(good, Request)


def test_what_may_not_be_sent_is_a_local_error() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    for connection, body in (
        (client, m.DeviceResetRequest()),
        (client, m.DmaReadRequest(0, 1)),
        (client, m.VersionReply(0, 0)),
        (server, m.DmaReadRequest(0, 1)),
        (server, VERSION),
    ):
        with pytest.raises(LocalProtocolError):
            connection.request(body)
    client, server = negotiated()
    with pytest.raises(LocalProtocolError, match="once"):
        client.request(VERSION)
    (request,) = server.feed(joined(client.request(m.DeviceResetRequest())[1]))
    assert isinstance(request, Request)
    with pytest.raises(LocalProtocolError, match="no reply to DEVICE_RESET"):
        server.reply(request, m.DmaMapReply())


# Requests and their answers


def test_both_directions_at_once() -> None:
    client, server = negotiated()
    read_id, read = client.request(m.RegionReadRequest(0, 0, 4))
    dma_id, dma = server.request(m.DmaWriteRequest(0x1000, b"dma"))
    (region_read,) = server.feed(joined(read))
    (dma_write,) = client.feed(joined(dma))
    assert isinstance(region_read, Request)
    assert isinstance(dma_write, Request)
    assert (region_read.message_id, dma_write.message_id) == (read_id, dma_id)
    assert server.feed(joined(client.reply(dma_write, m.DmaWriteReply()))) == [
        Reply(dma_id, Command.DMA_WRITE, m.DmaWriteReply())
    ]
    assert client.feed(joined(server.reply(region_read, m.RegionReadReply(0, 0, b"data")))) == [
        Reply(read_id, Command.REGION_READ, m.RegionReadReply(0, 0, b"data"))
    ]
    assert client.pending == server.pending == 0


def test_a_bulk_payload_goes_out_as_the_object_it_is() -> None:
    client, _ = negotiated()
    data = bytearray(1000)
    outgoing = client.request(m.RegionWriteRequest(0, 0, data))[1]
    assert outgoing.buffers[1] is data
    assert outgoing.size == 32 + 1000
    assert codec.unpack_header(bytes(outgoing.buffers[0]))[2] == outgoing.size


def test_no_reply_never_gets_a_reply_not_even_an_error() -> None:
    client, server = negotiated()
    message_id, posted = client.request(m.RegionWriteRequest(0, 0, b"1"), no_reply=True)
    assert client.pending == 0
    (request,) = server.feed(joined(posted))
    assert isinstance(request, Request)
    assert request.no_reply
    with pytest.raises(LocalProtocolError, match="no reply is due"):
        server.reply(request, m.RegionWriteReply(0, 0, 1))
    with pytest.raises(LocalProtocolError, match="no reply is due"):
        server.error(message_id, Command.REGION_WRITE, errno.EINVAL)
    (bad,) = server.feed(wire(5, 99, b"", 0x10))
    assert isinstance(bad, Rejected)
    assert bad.no_reply
    with pytest.raises(LocalProtocolError, match="no reply is due"):
        server.error(5, 99, bad.error)


def test_a_version_that_asks_for_no_reply_agrees_nothing() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    with pytest.raises(LocalProtocolError, match="comes with the reply"):
        client.request(VERSION, no_reply=True)
    posted, early = server.feed(wire(1, Command.VERSION, VERSION, 0x10) + wire(2, Command.DEVICE_RESET))
    assert isinstance(posted, Rejected)
    assert (posted.no_reply, posted.error) == (True, errno.EINVAL)
    assert isinstance(early, Rejected)
    assert "no version" in early.reason
    assert not server.negotiated
    (request,) = server.feed(joined(client.request(VERSION)[1]))
    assert isinstance(request, Request)
    server.reply(request, m.VersionReply(0, 1))
    assert server.negotiated


def test_a_request_is_answered_once_and_ids_of_the_peer_may_repeat() -> None:
    _, server = negotiated()
    first, second = server.feed(wire(3, Command.DEVICE_RESET) * 2)
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    server.reply(first, m.DeviceResetReply())
    server.error(3, Command.DEVICE_RESET, errno.EIO)
    with pytest.raises(LocalProtocolError, match="no reply is due"):
        server.reply(second, m.DeviceResetReply())


@pytest.mark.parametrize(
    ("frame", "error", "reason"),
    [
        (wire(1, 0), errno.ENOSYS, "unknown command 0"),
        (wire(1, 19), errno.ENOSYS, "unknown command 19"),
        (wire(1, 65535, b"?"), errno.ENOSYS, "unknown command 65535"),
        (wire(1, Command.DMA_WRITE, m.DmaWriteRequest(0, b"")), errno.EINVAL, "the other way"),
        (wire(1, Command.DEVICE_RESET, b"", 0x0F), errno.EINVAL, "message type 15"),
        (wire(1, Command.DMA_MAP, bytes(31)), errno.EINVAL, "DmaMapRequest: 31 bytes"),
        (wire(1, Command.REGION_WRITE, bytes(12) + b"\xff" * 4), errno.EINVAL, "RegionWriteRequest.count"),
    ],
)
def test_a_bad_command_is_rejected_with_its_errno(frame: bytes, error: int, reason: str) -> None:
    _, server = negotiated()
    event, after = server.feed(frame + wire(2, Command.DEVICE_RESET))
    assert isinstance(event, Rejected)
    assert event.error == error
    assert reason in event.reason
    reply = joined(server.error(event.message_id, event.command_number, event.error))
    assert codec.unpack_header(reply) == (1, event.command_number, 16, 0x21, error)
    assert isinstance(after, Request)


def test_replies_that_cannot_be_used() -> None:
    client, server = negotiated()
    assert server.feed(wire(1, Command.DEVICE_RESET, b"", 1)) == [
        BadReply(1, 13, None, "a reply to command 13 that nobody waits for")
    ]
    ids = [client.request(m.RegionReadRequest(0, 0, 4))[0] for _ in range(3)]
    events = client.feed(
        wire(ids[0], Command.REGION_WRITE, m.RegionWriteReply(0, 0, 1), 1)
        + wire(ids[1], Command.REGION_READ, b"short", 1)
        + wire(ids[2], Command.REGION_READ, b"ignored payload", 0x21, 0)
        + wire(ids[2], Command.REGION_READ, b"", 0x21, 5)
    )
    assert [type(event) for event in events] == [BadReply, BadReply, ErrorReply, BadReply]
    assert [event.command for event in events if isinstance(event, BadReply)] == [9, 9, None]
    assert events[2] == ErrorReply(ids[2], Command.REGION_READ, 0)
    assert client.pending == 0


def test_an_id_is_not_used_again_before_its_reply_and_running_out_is_an_error() -> None:
    client, _ = negotiated()
    reset = m.DeviceResetRequest()
    slow = client.request(reset)[0]
    ids = {client.request(reset)[0] for _ in range(0xFFFF)}
    assert len(ids | {slow}) == 0x10000
    with pytest.raises(LocalProtocolError) as caught:
        client.request(reset)
    assert caught.value.errno == errno.EBUSY
    client.feed(wire(1234, Command.DEVICE_RESET, b"", 1))
    assert client.request(reset)[0] == 1234


# Losing the stream


@pytest.mark.parametrize("bad", LOST)
def test_a_wrong_size_loses_the_stream_for_good(bad: bytes) -> None:
    _, server = negotiated()
    assert len(server.feed(wire(1, Command.DEVICE_RESET) + bad)) == 1
    for _ in range(2):
        with pytest.raises(StreamLost, match="message of"):
            server.feed(wire(2, Command.DEVICE_RESET))
        with pytest.raises(StreamLost, match="message of"):
            server.next_event()


def test_the_negotiated_maximum_counts() -> None:
    _, server = negotiated()
    server.max_message_size = 64
    assert server.feed(wire(1, Command.REGION_WRITE, m.RegionWriteRequest(0, 0, bytes(32))))
    with pytest.raises(StreamLost):
        server.feed(wire(1, Command.REGION_WRITE, m.RegionWriteRequest(0, 0, bytes(33))))


def test_more_bytes_than_there_is_room_for_are_a_local_error() -> None:
    server = Connection(Role.SERVER)
    room = len(server.get_buffer())
    with pytest.raises(LocalProtocolError):
        server.received(room + 1)


def test_a_closed_connection_stays_closed() -> None:
    _, server = negotiated()
    server.close()
    with pytest.raises(StreamLost, match="closed"):
        server.feed(b"")
