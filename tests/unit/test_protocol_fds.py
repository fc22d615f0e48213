# SPDX-License-Identifier: BSD-3-Clause
"""File descriptors find their message, and each has one owner that closes it once."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.protocol import codec, layouts
from vfio_user.protocol import constants as c
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import Command, Role
from vfio_user.protocol.errors import LocalProtocolError, StreamLost
from vfio_user.protocol.events import BadReply, Event, Rejected, Reply, Request


class Handle:
    """Counts its closings; what a real descriptor would do badly."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = 0

    def close(self) -> None:
        self.closed += 1

    def __repr__(self) -> str:
        return self.name


def wire(message_id: int, body: m.Message, command: int, flags: int = 0) -> bytes:
    data = layouts.build(body)
    return codec.pack_header(message_id, command, c.HEADER_SIZE + len(data), flags) + data


def dma_map(message_id: int) -> bytes:
    return wire(message_id, m.DmaMapRequest(3, 0, 0x1000 * message_id, 0x1000), Command.DMA_MAP)


def set_irqs(message_id: int, count: int, flags: int = 0x24) -> bytes:
    return wire(message_id, m.DeviceSetIrqsRequest(flags, 0, 0, count), Command.DEVICE_SET_IRQS)


def read(message_id: int) -> bytes:
    return codec.pack_region_read(message_id, 0, 0, 4)


def server() -> Connection:
    connection = Connection(Role.SERVER)
    (request,) = connection.feed(wire(0, m.VersionRequest(0, 1), Command.VERSION))
    assert isinstance(request, Request)
    connection.reply(request, m.VersionReply(0, 1))
    return connection


def handles(count: int) -> list[Handle]:
    return [Handle("abcdefgh"[i]) for i in range(count)]


def summary(events: Iterable[Event]) -> dict[int, str]:
    """Message id -> the names of its fds, or `rejected`."""
    return {
        event.message_id: "".join(map(repr, event.fds)) if isinstance(event, Request | Reply) else "rejected"
        for event in events
    }


@pytest.mark.parametrize(
    ("messages", "count", "expected"),
    [
        ([dma_map(1)], 1, {1: "a"}),
        ([dma_map(1)], 0, {1: ""}),
        # Two sent messages joined by the kernel: the last sender's buffer had the fd.
        ([dma_map(1), dma_map(2)], 1, {1: "", 2: "a"}),
        ([read(1), dma_map(2)], 1, {1: "", 2: "a"}),
        # Batched in one send: the message that may take it.
        ([dma_map(1), read(2)], 1, {1: "a", 2: ""}),
        ([read(1), dma_map(2), read(3), read(4)], 1, {1: "", 2: "a", 3: "", 4: ""}),
        ([set_irqs(1, 2), dma_map(2)], 3, {1: "ab", 2: "c"}),
        ([set_irqs(1, 3)], 3, {1: "abc"}),
        ([set_irqs(1, 3)], 2, {1: "ab"}),
        ([set_irqs(1, 2), set_irqs(2, 0, 0x21)], 2, {1: "ab", 2: ""}),
        # Too many, or nobody may have any: the last message started is refused.
        ([dma_map(1)], 2, {1: "rejected"}),
        ([set_irqs(1, 2)], 3, {1: "rejected"}),
        ([set_irqs(1, 2, 0x21)], 1, {1: "rejected"}),
        ([read(1)], 1, {1: "rejected"}),
        ([read(1), read(2)], 1, {1: "", 2: "rejected"}),
        ([dma_map(1), read(2)], 2, {1: "b", 2: "rejected"}),
    ],
)
def test_one_read(messages: Sequence[bytes], count: int, expected: dict[int, str]) -> None:
    fds, connection = handles(count), server()
    events = connection.feed(b"".join(messages), fds)
    assert summary(events) == expected
    given_out = {fd for event in events if isinstance(event, Request) for fd in event.fds}
    assert [fd.closed for fd in fds] == [0 if fd in given_out else 1 for fd in fds]
    assert not connection.queued_fds
    for event in events:
        if isinstance(event, Rejected):
            assert event.error == errno.EINVAL
            assert "more file descriptors" in event.reason


@pytest.mark.parametrize("stream", [dma_map(1), set_irqs(1, 1)])
def test_the_fd_may_come_with_any_byte(stream: bytes) -> None:
    for position in range(len(stream)):
        (fd,) = handles(1)
        connection = server()
        events: list[Event] = []
        for index in range(len(stream)):
            events += connection.feed(stream[index : index + 1], [fd] if index == position else [])
        assert summary(events) == {1: "a"}, position
        assert fd.closed == 0


def test_an_fd_in_the_middle_of_a_message_that_takes_none_refuses_that_message() -> None:
    for position in range(32):
        (fd,) = handles(1)
        connection = server()
        events = connection.feed(dma_map(1))
        for index in range(32):
            events += connection.feed(read(2)[index : index + 1], [fd] if index == position else [])
        events += connection.feed(read(3))
        assert summary(events) == {1: "", 2: "rejected", 3: ""}, position
        assert fd.closed == 1


def test_a_batch_that_is_read_up_to_the_middle_of_a_header_waits_for_it() -> None:
    for cut in range(1, 16):
        (fd,) = handles(1)
        connection = server()
        assert summary(connection.feed(read(1) + dma_map(2) + read(3)[:cut], [fd])) == {1: ""}
        assert connection.queued_fds
        assert summary(connection.feed(read(3)[cut:])) == {2: "a", 3: ""}, cut
        assert not connection.queued_fds


def test_the_next_message_takes_the_fd_when_its_first_bytes_came_with_it() -> None:
    (fd,) = handles(1)
    connection = server()
    assert connection.feed(dma_map(1) + dma_map(2)[:5], [fd]) == []
    assert summary(connection.feed(dma_map(2)[5:])) == {1: "", 2: "a"}


def test_header_first_and_body_with_the_fd_after() -> None:
    (fd,) = handles(1)
    connection = server()
    assert connection.feed(dma_map(1)[:16]) == []
    assert summary(connection.feed(dma_map(1)[16:], [fd])) == {1: "a"}


def test_fds_of_several_reads_for_one_message() -> None:
    first, second, third = handles(3)
    connection, stream = server(), set_irqs(1, 2)
    connection.feed(stream[:20], [first])
    assert summary(connection.feed(stream[20:], [second])) == {1: "ab"}
    connection.feed(dma_map(2)[:20], [third])
    (extra,) = handles(1)
    assert summary(connection.feed(dma_map(2)[20:], [extra])) == {2: "rejected"}
    assert (third.closed, extra.closed) == (1, 1)


def test_more_fds_than_we_said_we_can_receive_are_refused() -> None:
    fds, connection = handles(3), server()
    connection.max_receive_fds = 2
    assert summary(connection.feed(set_irqs(1, 3), fds)) == {1: "rejected"}
    assert [fd.closed for fd in fds] == [1, 1, 1]


def test_too_many_fds_for_a_header_that_is_not_complete_are_not_kept() -> None:
    connection = server()
    connection.max_receive_fds = 2
    stream = set_irqs(1, 2)
    fds = [handles(1)[0] for _ in range(15)]
    for index, fd in enumerate(fds):
        assert connection.feed(stream[index : index + 1], [fd]) == []
        assert [fd.closed for fd in fds] == [0] * min(index + 1, 2) + [1] * (index - 1) + [0] * (14 - index)
    assert summary(connection.feed(stream[15:] + set_irqs(2, 1))) == {1: "rejected", 2: ""}
    assert [fd.closed for fd in fds] == [1] * 15
    assert not connection.queued_fds


def test_a_message_before_an_incomplete_header_may_have_fds_of_its_own() -> None:
    fds, connection = handles(6), server()
    connection.max_receive_fds = 2
    assert connection.feed(set_irqs(1, 2)[:20]) == []
    assert connection.feed(set_irqs(1, 2)[20:] + set_irqs(2, 2)[:9], fds[:4]) == []
    assert connection.feed(set_irqs(2, 2)[9:10], fds[4:]) == []
    assert [fd.closed for fd in fds] == [0, 0, 0, 0, 1, 1]
    assert summary(connection.feed(set_irqs(2, 2)[10:])) == {1: "ab", 2: "rejected"}


def test_messages_that_are_wrong_otherwise_close_their_fds() -> None:
    fds = handles(4)
    before_version = Connection(Role.SERVER)
    assert summary(before_version.feed(dma_map(1), fds[:1])) == {1: "rejected"}
    short = codec.pack_header(1, Command.DMA_MAP, 20) + bytes(4)
    assert summary(server().feed(short, fds[1:2])) == {1: "rejected"}
    assert summary(server().feed(codec.pack_header(1, 77, 16), fds[2:3])) == {1: "rejected"}
    assert summary(server().feed(codec.pack_header(1, Command.DMA_MAP, 16, 1), fds[3:])) == {1: "rejected"}
    assert [fd.closed for fd in fds] == [1, 1, 1, 1]


def test_lost_streams_and_closed_connections_close_what_they_hold() -> None:
    fds = handles(8)
    held = server()
    held.feed(dma_map(1)[:40], fds[:1])
    held.feed(dma_map(1)[40:41])
    held.close()
    undecided = server()
    undecided.feed(dma_map(1) + b"\0", fds[1:2])
    undecided.close()
    truncated = server()
    truncated.feed(dma_map(1)[:40], fds[2:3])
    view = truncated.get_buffer()
    view[:8] = dma_map(1)[40:]
    with pytest.raises(StreamLost, match="truncated"):
        truncated.received(8, fds[3:4], truncated=True)
    lost = server()
    assert summary(lost.feed(dma_map(1) + bytes(16), fds[4:5])) == {1: "e"}
    with pytest.raises(StreamLost):
        lost.feed(b"", fds[5:6])
    overrun = server()
    with pytest.raises(LocalProtocolError):
        overrun.received(1 << 30, fds[6:7])
    empty = server()
    empty.received(0, fds[7:8])
    assert [fd.closed for fd in fds] == [1, 1, 1, 1, 0, 1, 1, 1]


def test_replies_bring_fds_to_the_client() -> None:
    fds, client = handles(4), Connection(Role.CLIENT)
    client.request(m.VersionRequest(0, 1))
    client.feed(wire(0, m.VersionReply(0, 1), Command.VERSION, 1))
    ids = [client.request(m.DeviceGetRegionInfoRequest(0))[0] for _ in range(2)]
    info = m.DeviceGetRegionInfoReply(7, 0, 4096)
    (reply,) = client.feed(wire(ids[0], info, Command.DEVICE_GET_REGION_INFO, 1), fds[:2])
    assert isinstance(reply, Reply)
    assert list(reply.fds) == fds[:2]
    refused = client.feed(codec.pack_error(ids[1], Command.DEVICE_GET_REGION_INFO, 5), fds[2:3])
    stray = client.feed(wire(999, info, Command.DEVICE_GET_REGION_INFO, 1), fds[3:])
    assert [type(event) for event in refused + stray] == [BadReply, BadReply]
    assert [fd.closed for fd in fds] == [0, 0, 1, 1]


def test_what_is_sent_keeps_to_the_limits() -> None:
    client = Connection(Role.CLIENT)
    client.request(m.VersionRequest(0, 1))
    client.feed(wire(0, m.VersionReply(0, 1), Command.VERSION, 1))
    (fd, *more) = handles(3)
    _, outgoing = client.request(m.DmaMapRequest(3, 0, 0, 4096), [fd])
    assert outgoing.fds == (fd,)
    client.max_send_fds = 2
    for body, fds in (
        (m.DmaMapRequest(3, 0, 0, 4096), more),
        (m.DeviceResetRequest(), [fd]),
        (m.DeviceSetIrqsRequest(0x24, 0, 0, 3), [fd, *more]),
    ):
        with pytest.raises(LocalProtocolError, match="file descriptors"):
            client.request(body, fds)


@given(st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3)), max_size=8), st.booleans())
def test_random_bytes_with_fds_never_leak_one(reads: list[tuple[bytes, int]], framed: bool) -> None:
    connection, fds = server(), []
    connection.max_message_size = 80
    try:
        for number, (data, count) in enumerate(reads):
            fresh = handles(count)
            fds += fresh
            frame = codec.pack_header(number, 1 + len(data) % 18, 16 + len(data)) + data if framed else data
            for event in connection.feed(frame, fresh):
                for fd in getattr(event, "fds", ()):
                    fd.close()
    except StreamLost:
        pass
    connection.close()
    assert [fd.closed for fd in fds] == [1] * len(fds)


@given(
    st.lists(st.sampled_from(["map", "map+fd", "irqs+fd", "read"]), min_size=1, max_size=8),
    st.lists(st.integers(1, 100), max_size=6),
)
def test_the_rule_holds_for_what_the_kernel_does(kinds: list[str], sizes: list[int]) -> None:
    """Messages sent one by one through a real socket pair and read in pieces of any size."""
    connection, expected, events = server(), {}, []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        for number, kind in enumerate(kinds, 1):
            message = {"map": dma_map, "read": read}.get(kind[:4].rstrip("+"), lambda i: set_irqs(i, 1))(
                number
            )
            has_fd = kind.endswith("+fd")
            socket.send_fds(theirs, [message], [theirs.fileno()] if has_fd else [])
            expected[number] = has_fd
        for size in [*sizes, *[4096] * 20]:
            try:
                data, fds, _, _ = socket.recv_fds(ours, size, 253)
            except BlockingIOError:
                break
            events += connection.feed(data, [socket.socket(fileno=fd) for fd in fds])
    got = {event.message_id: bool(event.fds) for event in events if isinstance(event, Request)}
    for event in events:
        for fd in getattr(event, "fds", ()):
            fd.close()
    assert got == expected
