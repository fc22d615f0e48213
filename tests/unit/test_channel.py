# SPDX-License-Identifier: BSD-3-Clause
"""Channel over real socket pairs: order, partial sends, descriptors at their message, nothing leaked."""

import array
import errno
import os
import resource
import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from vfio_user.protocol.errors import VfioUserError
from vfio_user.transport.channel import (
    FD_QUEUE_LIMIT,
    JOIN_LIMIT,
    SEND_BUFFER,
    Channel,
    FdsLost,
    PeerGone,
)
from vfio_user.transport.fds import OwnedFd, close_all

Pair = tuple[Channel, Channel]
LARGE = 6 * SEND_BUFFER
"""The kernel doubles what it is asked for, and may count a little less than what it keeps."""


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = open_fds()
    channels = tuple(Channel(sock) for sock in socket.socketpair())
    yield channels[0], channels[1]
    for channel in channels:
        channel.close()
    assert open_fds() == before, "descriptors leaked"


def receive(channel: Channel, size: int = 1 << 20) -> tuple[bytes, list[OwnedFd]] | None:
    view = memoryview(bytearray(size))
    received = channel.receive_into(view)
    return None if received is None else (bytes(view[: received[0]]), received[1])


def receive_all(channel: Channel) -> list[tuple[bytes, int]]:
    """Everything there is, as (bytes, number of descriptors) of each read."""
    reads = []
    while (received := receive(channel)) is not None:
        reads.append((received[0], len(received[1])))
        close_all(received[1])
    return reads


def joined(reads: list[tuple[bytes, int]]) -> bytes:
    return b"".join(data for data, _ in reads)


def fill(channel: Channel) -> int:
    """Send until the socket is full; how many bytes it holds."""
    count = 0
    while True:
        try:
            count += channel._sock.send(b"." * 4096)
        except BlockingIOError:
            return count


def test_nothing_there_is_none(pair: Pair) -> None:
    assert receive(pair[0]) is None


def test_bytes_arrive(pair: Pair) -> None:
    pair[0].send([b"head", memoryview(b"payload"), bytearray(b"!")])
    assert receive(pair[1]) == (b"headpayload!", [])
    assert pair[0].pending == 0


def test_end_of_stream_is_zero_bytes(pair: Pair) -> None:
    pair[0].close()
    assert receive(pair[1]) == (b"", [])


def test_descriptors_arrive_close_on_exec_and_stay_the_senders(pair: Pair) -> None:
    read_end, write_end = os.pipe()
    pair[0].send([b"take these"], [read_end, write_end])
    received = receive(pair[1])
    assert received is not None
    data, fds = received
    assert data == b"take these"
    assert len(fds) == 2
    assert os.path.sameopenfile(fds[0].fileno(), read_end)
    assert os.path.sameopenfile(fds[1].fileno(), write_end)
    assert not any(os.get_inheritable(fd.fileno()) for fd in fds)
    close_all(fds)
    os.close(read_end)
    os.close(write_end)


def test_253_descriptors_arrive(pair: Pair) -> None:
    with OwnedFd(os.eventfd(0)) as fd:
        pair[0].send([b"x"], [fd.fileno()] * 253)
        assert receive_all(pair[1]) == [(b"x", 253)]


def test_more_than_253_descriptors_are_refused(pair: Pair) -> None:
    with OwnedFd(os.eventfd(0)) as fd, pytest.raises(VfioUserError, match="Invalid argument"):
        pair[0].send([b"x"], [fd.fileno()] * 254)
    assert receive(pair[1]) is None


def test_what_does_not_fit_is_queued_in_order(pair: Pair) -> None:
    sender, receiver = pair
    payload = bytearray(os.urandom(LARGE))
    sender.send([b"first", memoryview(payload)])
    assert 0 < sender.pending < len(payload)
    expected = b"first" + bytes(payload) + b"second" + b"third"
    sender.send([b"second"])
    sender.send([b"third"])
    payload[:] = bytes(len(payload))  # the queue has copied: the caller may reuse its buffer
    reads = receive_all(receiver)
    assert not sender.flush()
    while sender.pending:
        reads += receive_all(receiver)
        sender.flush()
    assert joined(reads + receive_all(receiver)) == expected


@pytest.mark.parametrize("head", [(), (b"head",)])
def test_what_lasts_is_queued_as_it_is(pair: Pair, head: tuple[bytes, ...]) -> None:
    sender, receiver = pair
    payload = bytearray(LARGE)
    sender.send([*head, payload], lasting=True)
    sender.send([b"last"])
    assert 4 < sender.pending < len(payload)
    payload[-1] = 0xFF  # shows that it is not copied; a caller must not do so
    data = joined(receive_all(receiver))
    while not sender.flush():
        data += joined(receive_all(receiver))
    data += joined(receive_all(receiver))
    assert data == b"".join(head) + payload + b"last"


def test_descriptors_go_with_their_first_byte_only(pair: Pair) -> None:
    sender, receiver = pair
    filler = fill(sender)
    with OwnedFd(os.eventfd(0)) as fd:
        sender.send([b"before"])
        sender.send([b"with", b" fds"], [fd.fileno(), fd.fileno()])
        sender.send([b"after"])
        sender.send([b"again"], [fd.fileno()])
    assert sender.pending == 6 + 8 + 5 + 5
    received = 0
    while received < filler:
        data = receive(receiver, filler - received)
        assert data is not None
        received += len(data[0])
    assert sender.flush()
    # A read ends after the buffer that carries descriptors, and may begin before it.
    assert receive_all(receiver) == [(b"beforewith fds", 2), (b"afteragain", 1)]


def test_descriptors_of_a_message_that_is_sent_in_parts(pair: Pair) -> None:
    sender, receiver = pair
    payload = os.urandom(LARGE)
    with OwnedFd(os.eventfd(0)) as fd:
        sender.send([b"head", payload], [fd.fileno()])
        assert sender.pending
        reads = receive_all(receiver)
        while not sender.flush():
            reads += receive_all(receiver)
    reads += receive_all(receiver)
    assert joined(reads) == b"head" + payload
    assert [count for _, count in reads] == [1] + [0] * (len(reads) - 1)


def test_queued_descriptors_are_closed_with_the_channel(pair: Pair) -> None:
    fill(pair[0])
    with OwnedFd(os.eventfd(0)) as fd:
        pair[0].send([b"x"], [fd.fileno()])
    pair[0].close()
    assert pair[0].pending == 0
    pair[0].close()


def test_what_fits_the_join_limit_is_never_split(pair: Pair) -> None:
    sender, receiver = pair
    pieces = 0
    while not sender.pending:
        sender.send([b"x" * JOIN_LIMIT])
        pieces += 1
    assert sender.pending == JOIN_LIMIT
    assert len(joined(receive_all(receiver))) == (pieces - 1) * JOIN_LIMIT
    assert sender.flush()
    assert receive(receiver) == (b"x" * JOIN_LIMIT, [])


def test_queued_messages_are_not_split_either(pair: Pair) -> None:
    """The flush joins what is queued, but not past the limit: what it leaves begins with a message."""
    sender, receiver = pair
    filler = fill(sender)
    message = b"m" + bytes(999)
    for _ in range(400):
        sender.send([message])
    received = bytearray()
    while not sender.flush():
        assert sender.pending % 1000 == 0
        part = receive(receiver, 40_000)
        assert part is not None
        received += part[0]
    received += joined(receive_all(receiver))
    assert received[filler:] == message * 400


def test_many_buffers_are_one_send(pair: Pair) -> None:
    pair[0].send([bytes([i & 255]) for i in range(5000)])
    assert joined(receive_all(pair[1])) == bytes(i & 255 for i in range(5000))


def test_congested_when_the_peer_does_not_read() -> None:
    before = open_fds()
    first, second = socket.socketpair()
    sender, receiver = Channel(first, queue_limit=100_000), Channel(second)
    fill(sender)
    sender.send([bytes(100_000)])
    assert not sender.congested
    sender.send([b"!"])
    assert sender.congested
    receive_all(receiver)
    assert sender.flush()
    assert not sender.congested
    sender.close()
    receiver.close()
    assert open_fds() == before


def test_sending_to_a_closed_peer_is_peer_gone(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(PeerGone) as caught:
        pair[0].send([b"x"])
    assert caught.value.errno == errno.EPIPE


def test_flushing_to_a_closed_peer_is_peer_gone(pair: Pair) -> None:
    fill(pair[0])
    pair[0].send([b"x"])
    pair[1].close()
    with pytest.raises(PeerGone):
        pair[0].flush()


def test_receiving_after_a_reset_is_peer_gone(pair: Pair) -> None:
    pair[0].send([b"unread"])
    pair[0].send([b"unread"])
    pair[1].send([b"x"])
    pair[1]._sock.close()  # with data unread, unlike `Channel.close`: the kernel resets
    with pytest.raises(PeerGone) as caught:
        receive_all(pair[0])
    assert caught.value.errno == errno.ECONNRESET


def test_descriptors_that_do_not_arrive_are_an_error(pair: Pair) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with OwnedFd(os.eventfd(0)) as fd:
        pair[0].send([b"message"], [fd.fileno()] * 10)
        next_free = os.dup(fd.fileno())
        os.close(next_free)
        used = open_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_free + 3, hard))
        try:
            with pytest.raises(FdsLost) as caught:
                receive(pair[1])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.count == 7
        assert open_fds() == used


def test_ancillary_data_alone_is_no_message(pair: Pair) -> None:
    """A sender cannot make us take descriptors without a byte."""
    with OwnedFd(os.eventfd(0)) as fd:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd.fileno()]))]
        pair[0]._sock.sendmsg([b""], control)
    assert receive(pair[1]) is None


async def test_waiting(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair[0].wait_readable)
        await trio.testing.wait_all_tasks_blocked()
        pair[1].send([b"x"])
    fill(pair[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair[0].wait_writable)
        await trio.testing.wait_all_tasks_blocked()
        receive_all(pair[1])


def test_congested_when_the_peer_leaves_descriptors_unread(pair: Pair) -> None:
    """Each that waits is open here: they are bounded by themselves, however small their messages are."""
    sender, receiver = pair
    fill(sender)
    held = open_fds()
    sends = 0
    while not sender.congested:
        sender.send((b"message",), [sender.fileno()])
        sends += 1
    assert open_fds() == held + sends
    assert sends <= FD_QUEUE_LIMIT + 1
    assert sender.pending < 1000
    while not sender.flush():
        receive_all(receiver)
    assert not sender.congested
    assert open_fds() - held <= sends, "what is still in the socket"
    receive_all(receiver)


def test_descriptors_that_cannot_be_kept_are_an_error(pair: Pair) -> None:
    sender, _ = pair
    fill(sender)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 1, hard))
    try:
        with pytest.raises(VfioUserError, match="to send: Too many open files"):
            sender.send((b"message",), [sender.fileno()] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before
