# SPDX-License-Identifier: BSD-3-Clause
"""Client against a peer that answers as the test says, over a socket pair."""

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from vfio_user.client.background import background
from vfio_user.client.client import Client, open_client, open_client_on
from vfio_user.client.errors import RemoteError, ReplyTimeout
from vfio_user.client.memory import GuestRam
from vfio_user.protocol import capabilities, codec
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import (
    Command,
    DmaMapFlags,
    DmaUnmapFlags,
    IrqSetFlags,
    RegionInfoFlags,
    Role,
)
from vfio_user.protocol.errors import (
    DeviceError,
    LocalProtocolError,
    RemoteProtocolError,
    StreamLost,
    VfioUserError,
)
from vfio_user.protocol.events import ErrorReply, Event, Outgoing, Reply, Request
from vfio_user.transport.channel import Channel, PeerGone
from vfio_user.transport.fds import OwnedFd, close_all

PAGE = 4096
Answer = Callable[[Any], m.Message | tuple[m.Message, Sequence[int]] | None]
"""Reply, reply with descriptors, or None: no reply now."""


class Peer:
    """A server by script: `answers` by the kind of request."""

    def __init__(self, sock: socket.socket) -> None:
        self.connection = Connection(Role.SERVER)
        self.channel = Channel(sock)
        self.answers: dict[type[m.Message], Answer] = {m.VersionRequest: self.version}
        self.requests: list[Request] = []
        self.replies: list[Event] = []
        self.fds: list[OwnedFd] = []
        self.own = capabilities.Version()
        self.came = trio.Condition()

    def version(self, request: m.VersionRequest) -> m.Message:
        return capabilities.accept(self.own, request)[1]

    async def run(self) -> None:
        try:
            while True:
                await self.channel.wait_readable()
                received = self.channel.receive_into(self.connection.get_buffer())
                if received is None or not received[0]:
                    return
                self.connection.received(*received)
                while (event := self.connection.next_event()) is not None:
                    self.take(event)
                async with self.came:
                    self.came.notify_all()
        except (PeerGone, StreamLost):
            self.channel.close()

    def hang_up(self, _request: object) -> None:
        raise PeerGone("by script")

    def take(self, event: Event) -> None:
        if not isinstance(event, Request):
            self.replies.append(event)
            return
        self.requests.append(event)
        self.fds += [fd for fd in event.fds if isinstance(fd, OwnedFd)]
        try:
            answer = self.answers[type(event.body)](event.body)
        except PeerGone:
            raise
        except VfioUserError as error:
            self.send(self.connection.error(event.message_id, event.command, error.errno))
            return
        if answer is not None:
            body, fds = answer if isinstance(answer, tuple) else (answer, ())
            self.reply(event, body, fds)

    def reply(self, request: Request, body: m.Message, fds: Sequence[int] = ()) -> None:
        outgoing = self.connection.reply(request, body, [OwnedFd(os.dup(fd)) for fd in fds])
        self.channel.send(outgoing.buffers, fds)
        close_all(fd for fd in outgoing.fds if isinstance(fd, OwnedFd))

    def send(self, outgoing: Outgoing) -> None:
        self.channel.send(outgoing.buffers)

    async def until(self, done: Callable[[], bool]) -> None:
        async with self.came:
            while not done():
                await self.came.wait()

    async def ask(self, body: m.Message) -> Event:
        """Send a request of the server and wait for the client's answer."""
        count = len(self.replies)
        self.send(self.connection.request(body)[1])
        await self.until(lambda: len(self.replies) > count)
        return self.replies[-1]

    def close(self) -> None:
        self.connection.close()
        self.channel.close()
        close_all(self.fds)


@contextlib.asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[tuple[Client, Peer]]:
    before = set(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    try:
        async with background() as nursery:
            nursery.start_soon(peer.run)
            async with open_client_on(ours, **options) as client:
                yield client, peer
    finally:
        peer.close()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def region_data(request: m.RegionReadRequest) -> m.Message:
    return m.RegionReadReply(request.offset, request.region, bytes(request.count))


async def test_negotiation_gives_the_session() -> None:
    async with connected() as (client, _):
        assert client.session is not None
        assert client.session.max_data_xfer_size == 1 << 20
        assert client.session.max_send_fds == 1


async def test_a_server_with_another_major_version_is_refused() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    peer.answers[m.VersionRequest] = lambda request: m.VersionReply(1, 0, b"")
    async with background() as nursery:
        nursery.start_soon(peer.run)
        with pytest.raises(RemoteProtocolError, match="major"):
            async with open_client_on(ours):
                pytest.fail("the negotiation must fail")
    peer.close()


async def test_capabilities_can_be_chosen() -> None:
    chosen = capabilities.Version(0, capabilities.Capabilities(max_msg_fds=3, max_data_xfer_size=4096))
    async with connected(version=None) as (client, peer):
        session = await client.negotiate(chosen)
        assert (session.minor, session.max_data_xfer_size) == (0, 4096)
        assert b'"max_msg_fds":3' in bytes(peer.requests[0].body.data)  # type: ignore[attr-defined]


async def test_nobody_listens(tmp_path: Any) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        async with open_client(tmp_path / "none"):
            pytest.fail("nobody is there")
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("spin", [0.0, 0.0005])
async def test_region_accesses(spin: float) -> None:
    memory = bytearray(16)

    def write(request: m.RegionWriteRequest) -> m.Message | None:
        memory[request.offset : request.offset + len(request.data)] = request.data
        return m.RegionWriteReply(request.offset, request.region, len(request.data))

    def write_posted(request: m.RegionWriteRequest) -> None:
        write(request)

    async with connected(spin=spin) as (client, peer):
        peer.answers[m.RegionWriteRequest] = write
        peer.answers[m.RegionReadRequest] = lambda request: m.RegionReadReply(
            request.offset, request.region, memory[request.offset : request.offset + request.count]
        )
        peer.answers[m.RegionWriteMultiRequest] = lambda request: m.RegionWriteMultiReply(len(request.writes))
        await client.region_write(0, 4, b"abcd")
        peer.answers[m.RegionWriteRequest] = write_posted
        await client.region_write(0, 8, b"efgh", posted=True)
        assert await client.region_read(0, 4, 8) == b"abcdefgh"
        assert peer.requests[2].no_reply
        assert await client.region_write_multi([m.RegionWrite(0, 0, b"x"), m.RegionWrite(1, 0, b"y")]) == 2


async def test_an_error_reply_is_an_exception_and_the_client_goes_on() -> None:
    def refuse(request: m.RegionReadRequest) -> m.Message:
        if request.region > 8:
            raise DeviceError("no such region", errno.ENODEV)
        return region_data(request)

    async with connected() as (client, peer):
        peer.answers[m.RegionReadRequest] = refuse
        with pytest.raises(RemoteError, match="ENODEV") as caught:
            await client.region_read(9, 0, 4)
        assert (caught.value.errno, caught.value.command) == (errno.ENODEV, Command.REGION_READ)
        assert await client.region_read(0, 0, 4) == bytes(4)


async def test_replies_find_their_requests_in_any_order() -> None:
    async with connected() as (client, peer):
        peer.answers[m.RegionReadRequest] = lambda request: None
        results: dict[int, bytes] = {}

        async def read(number: int) -> None:
            results[number] = await client.region_read(0, number, 1)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(read, number)
            await peer.until(lambda: len(peer.requests) == 11)
            for request in reversed(peer.requests[1:]):
                body = request.body
                assert isinstance(body, m.RegionReadRequest)
                peer.reply(request, m.RegionReadReply(body.offset, 0, bytes([body.offset])))
        assert results == {number: bytes([number]) for number in range(10)}


async def test_time_out_and_the_late_reply_is_dropped() -> None:
    async with connected(timeout=0.02) as (client, peer):
        peer.answers[m.RegionReadRequest] = lambda request: None
        with pytest.raises(ReplyTimeout, match="REGION_READ"):
            await client.region_read(0, 0, 4)
        peer.reply(peer.requests[-1], m.RegionReadReply(0, 0, bytes(4)))
        peer.answers[m.RegionReadRequest] = region_data
        client.link.timeout = 5
        assert await client.region_read(0, 4, 4) == bytes(4)
        assert client.link.under_way == 0
        assert not client.link.bad_replies


async def test_a_cancelled_request_leaves_the_client_usable_and_closes_late_descriptors() -> None:
    with GuestRam() as ram:
        fd = ram.add(0, PAGE).fd
        assert fd is not None
        async with connected() as (client, peer):
            peer.answers[m.DeviceGetRegionInfoRequest] = lambda request: None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.get_region_info, 0)
                await peer.until(lambda: isinstance(peer.requests[-1].body, m.DeviceGetRegionInfoRequest))
                nursery.cancel_scope.cancel()
            reply = m.DeviceGetRegionInfoReply(RegionInfoFlags.MMAP, 0, PAGE)
            peer.reply(peer.requests[-1], reply, [fd])
            peer.answers[m.RegionReadRequest] = region_data
            assert await client.region_read(0, 0, 1) == b"\0"


async def test_the_end_of_the_server_reaches_everybody() -> None:
    async with connected() as (client, peer):
        peer.answers[m.RegionReadRequest] = peer.hang_up
        failed = []

        async def read() -> None:
            try:
                await client.region_read(0, 0, 4)
            except PeerGone as error:
                failed.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(read)
        assert len(failed) == 2
        assert "closed" in (await client.wait_closed()).reason
        with pytest.raises(PeerGone):
            await client.region_read(0, 0, 4)


async def test_bytes_that_are_no_messages_end_the_connection() -> None:
    async with connected() as (client, peer):
        peer.answers[m.DeviceResetRequest] = lambda request: peer.channel.send((b"\xff" * 64,))
        with pytest.raises(PeerGone):
            await client.reset()
        assert isinstance(await client.wait_closed(), StreamLost)


async def test_a_reply_that_nobody_waits_for_is_kept_for_inspection() -> None:
    async with connected() as (client, peer):
        client.send_raw(codec.pack_region_read(0x7777, 0, 0, 4))
        peer.answers[m.RegionReadRequest] = region_data
        assert await client.region_read(0, 0, 1) == b"\0"
        assert [bad.message_id for bad in client.link.bad_replies] == [0x7777]


async def test_what_may_not_be_sent_is_not() -> None:
    async with connected(version=None) as (client, peer):
        with pytest.raises(LocalProtocolError, match="VERSION"):
            await client.region_read(0, 0, 4)
        assert not peer.requests


async def test_dma_maps_carry_the_descriptor_and_offset() -> None:
    with GuestRam() as ram, GuestRam(shared=False) as private:
        low, high = ram.add_file([(0, PAGE), (1 << 32, PAGE)])
        async with connected(dma=ram) as (client, peer):
            peer.answers[m.DmaMapRequest] = lambda request: m.DmaMapReply()
            peer.answers[m.DmaUnmapRequest] = lambda request: m.DmaUnmapReply(
                request.flags, request.address, request.size
            )
            for call in [client.begin_dma_map(low), client.begin_dma_map(high)]:
                await client.finish(call, m.DmaMapReply)
            await client.dma_map(private.add(0x20000, PAGE))
            assert [len(request.fds) for request in peer.requests[1:]] == [1, 1, 0]
            body = peer.requests[2].body
            both = DmaMapFlags.READ | DmaMapFlags.WRITE
            assert body == m.DmaMapRequest(both, PAGE, 1 << 32, PAGE)
            assert (await client.dma_unmap(high)).address == 1 << 32
            assert (await client.dma_unmap_all()).flags == DmaUnmapFlags.ALL


async def test_the_server_reads_and_writes_guest_memory_while_a_request_waits() -> None:
    with GuestRam(shared=False) as ram:
        ram.add(0, PAGE)
        ram.write(16, b"guest")
        async with connected(dma=ram) as (client, peer):
            peer.answers[m.DeviceResetRequest] = lambda request: None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.reset)
                await peer.until(lambda: len(peer.requests) == 2)
                read = await peer.ask(m.DmaReadRequest(16, 5))
                assert isinstance(read, Reply)
                assert read.body == m.DmaReadReply(16, b"guest")
                written = await peer.ask(m.DmaWriteRequest(32, b"device"))
                assert isinstance(written, Reply)
                assert written.body == m.DmaWriteReply(32, 6)
                for wrong in (m.DmaReadRequest(PAGE, 1), m.DmaWriteRequest(PAGE - 1, b"ab")):
                    refused = await peer.ask(wrong)
                    assert isinstance(refused, ErrorReply)
                    assert refused.error == errno.EFAULT
                peer.reply(peer.requests[-1], m.DeviceResetReply())
            assert ram.read(32, 6) == b"device"
            assert (ram.counters.reads, ram.counters.writes, ram.counters.refused) == (1, 1, 2)


async def test_a_dma_read_above_the_negotiated_size_is_refused() -> None:
    with GuestRam(shared=False) as ram:
        ram.add(0, 2 << 20)
        async with connected(dma=ram) as (_, peer):
            refused = await peer.ask(m.DmaReadRequest(0, (1 << 20) + 1))
            assert isinstance(refused, ErrorReply)
            assert refused.error == errno.EINVAL


async def test_without_memory_dma_is_an_error() -> None:
    async with connected() as (_, peer):
        assert isinstance(await peer.ask(m.DmaReadRequest(0, 1)), ErrorReply)


async def test_region_info_is_asked_again_for_its_capabilities_and_mapped() -> None:
    with GuestRam() as ram:
        fd = ram.add(0, 2 * PAGE).fd
        assert fd is not None
        ram.write(PAGE, b"shared")

        def info(request: m.DeviceGetRegionInfoRequest) -> tuple[m.Message, Sequence[int]]:
            sparse = m.SparseMmapCapability((m.SparseMmapArea(PAGE, PAGE),))
            flags = RegionInfoFlags.READ | RegionInfoFlags.WRITE | RegionInfoFlags.MMAP
            reply = m.DeviceGetRegionInfoReply(flags, request.index, 2 * PAGE, capabilities=(sparse,))
            return m.fit(reply, request.argsz), [fd]

        async with connected() as (client, peer):
            peer.answers[m.DeviceGetRegionInfoRequest] = info
            with await client.map_region(2) as mapped:
                found = mapped.find(PAGE + 2, 4)
                assert found is not None
                view, start = found
                assert bytes(view[start : start + 4]) == b"ared"
                view[0:1] = b"S"
                assert mapped.find(0, 4) is None
            assert ram.read(PAGE, 6) == b"Shared"
            assert [r.body.argsz for r in peer.requests[1:]] == [32, 64]  # type: ignore[attr-defined]


async def test_a_region_that_cannot_be_mapped() -> None:
    async with connected() as (client, peer):
        peer.answers[m.DeviceGetRegionInfoRequest] = lambda request: m.DeviceGetRegionInfoReply(1, 0, PAGE)
        with pytest.raises(ValueError, match="cannot be mapped"):
            await client.map_region(0)


async def test_a_server_that_asks_for_a_huge_buffer_is_refused() -> None:
    async with connected() as (client, peer):
        peer.answers[m.DeviceGetRegionInfoRequest] = lambda request: m.DeviceGetRegionInfoReply(
            0, 0, PAGE, argsz=1 << 31
        )
        with pytest.raises(RemoteProtocolError, match="needs"):
            await client.get_region_info(0)


async def test_region_io_fds() -> None:
    event = os.eventfd(0)

    def answer(request: m.DeviceGetRegionIoFdsRequest) -> tuple[m.Message, Sequence[int]]:
        reply = m.fit(m.DeviceGetRegionIoFdsReply(0, (m.Ioeventfd(8, 4, 0),)), request.argsz)
        return reply, [event] if reply.sub_regions else []

    async with connected() as (client, peer):
        peer.answers[m.DeviceGetRegionIoFdsRequest] = answer
        found = await client.get_region_io_fds(0)
        assert found.sub_regions == (m.Ioeventfd(8, 4, 0),)
        os.eventfd_write(found.fds[0].fileno(), 2)
        assert os.eventfd_read(event) == 2
        found.close()
    os.close(event)


async def test_more_eventfds_than_fit_go_in_several_messages() -> None:
    events = [os.eventfd(0) for _ in range(5)]
    async with connected(version=None) as (client, peer):
        peer.own = capabilities.Version(capabilities=capabilities.Capabilities(max_msg_fds=2))
        peer.answers[m.DeviceSetIrqsRequest] = lambda request: m.DeviceSetIrqsReply()
        await client.negotiate()
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        await client.set_irqs(2, flags, 1, 5, fds=events)
        bodies = [request.body for request in peer.requests[1:]]
        assert [(b.start, b.count) for b in bodies] == [(1, 2), (3, 2), (5, 1)]  # type: ignore[attr-defined]
        assert [len(request.fds) for request in peer.requests[1:]] == [2, 2, 1]
    for event in events:
        os.close(event)


async def test_info_and_irq_info() -> None:
    async with connected() as (client, peer):
        peer.answers[m.DeviceGetInfoRequest] = lambda request: m.DeviceGetInfoReply(3, 9, 5)
        peer.answers[m.DeviceGetIrqInfoRequest] = lambda request: m.DeviceGetIrqInfoReply(7, request.index, 1)
        assert (await client.get_info()).num_regions == 9
        assert (await client.get_irq_info(0)).count == 1


async def test_posted_writes_wait_for_a_server_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    got = 0

    def count(request: m.RegionWriteRequest) -> None:
        nonlocal got
        got += 1

    async with background() as nursery:
        reading = trio.CancelScope()

        async def read() -> None:
            with reading:
                await peer.run()

        nursery.start_soon(read)
        async with open_client_on(ours) as client:
            reading.cancel()
            await trio.testing.wait_all_tasks_blocked()
            peer.answers[m.RegionWriteRequest] = count
            with trio.move_on_after(0.05) as scope:
                for _ in range(16):
                    await client.region_write(0, 0, bytes(1 << 20), posted=True)
            assert scope.cancelled_caught
            nursery.start_soon(peer.run)
            await peer.until(lambda: got >= 5)
    peer.close()


async def test_a_body_that_raises_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with connected():
            raise KeyError("the test's own")


async def test_all_who_wait_for_room_go_on_when_the_server_reads() -> None:
    """Two processors of a guest that post writes, and a server that is slow: none is forgotten."""
    ours, theirs = socket.socketpair()
    going_on: list[int] = []

    async def wait(client: Client, number: int) -> None:
        await client.link.drain()
        going_on.append(number)

    theirs.setblocking(False)
    with trio.socket.from_stdlib_socket(theirs) as peer:
        async with open_client_on(ours, version=None) as client, trio.open_nursery() as nursery:
            client.link.send_raw((bytes(12 << 20),))
            assert client.link.congested
            for number in range(2):
                nursery.start_soon(wait, client, number)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(5) as patience:
                while len(going_on) < 2:
                    await peer.recv(1 << 20)
            nursery.cancel_scope.cancel()
    assert not patience.cancelled_caught, going_on
