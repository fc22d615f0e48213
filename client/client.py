# SPDX-License-Identifier: BSD-3-Clause
"""The VMM's side of a connection: every command as a method, and answers to the server's DMA requests.

    async with open_client(path, dma=ram) as client:
        for part in ram.ranges:
            await client.dma_map(part)
        status = await client.region_read(0, 8, 4)

A method raises `RemoteError` when the server answers with an error, `ReplyTimeout` when there is no answer
in time, `PeerGone` when the connection is over, and `LocalProtocolError` for what may not be sent; nothing
else. Several tasks may use one client at once.
"""

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import trio

from vfio_user.client.background import background
from vfio_user.client.call import Call, owned_fds
from vfio_user.client.device_commands import DeviceCommands
from vfio_user.client.dma_target import DmaTarget, NoDma
from vfio_user.client.link import Link
from vfio_user.client.memory import RamRange
from vfio_user.client.migration_commands import MigrationCommands
from vfio_user.protocol import capabilities
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import (
    HEADER_SIZE,
    DmaUnmapFlags,
)
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError, VfioUserError
from vfio_user.protocol.events import Reply
from vfio_user.transport.channel import Buffer, Channel
from vfio_user.transport.fds import close_all

ReplyT = TypeVar("ReplyT", bound=m.Message)

DEFAULT_VERSION = capabilities.Version(
    capabilities=capabilities.Capabilities(
        max_msg_fds=16, migration=capabilities.Migration(), write_multiple=True
    )
)
"""As QEMU's client proposes, but with the specification's minor version."""


class Client(DeviceCommands, MigrationCommands):
    """One connection. Make it with `open_client` or `open_client_on`."""

    def __init__(self, link: Link, dma: DmaTarget) -> None:
        super().__init__()
        self.link = link
        self.dma = dma
        self.session: capabilities.Session | None = None
        """What was negotiated."""

    # Any request

    async def request(self, body: m.Message, fds: Sequence[int] = ()) -> Reply:
        """Send any request and wait for its reply; the reply's descriptors are the caller's to close."""
        return await self.link.finish(self.link.begin(body, fds))

    def begin(self, body: m.Message, fds: Sequence[int] = ()) -> Call:
        """Send a request without waiting, to have many under way; each must be given to `finish`."""
        return self.link.begin(body, fds)

    async def finish(self, call: Call, kind: type[ReplyT]) -> ReplyT:
        """The reply to `begin`, which brings no descriptors."""
        reply = await self.link.finish(call)
        close_all(owned_fds(reply))
        assert isinstance(reply.body, kind)
        return reply.body

    async def ask(self, body: m.Message, kind: type[ReplyT], fds: Sequence[int] = ()) -> ReplyT:
        """`request` for a reply of a known kind that brings no descriptors."""
        return await self.finish(self.link.begin(body, fds), kind)

    def expect(self, argsz: int) -> None:
        """Let a reply body of so many bytes in: one that is asked for may be above max_data_xfer_size."""
        connection = self.link.connection
        connection.max_message_size = max(connection.max_message_size, HEADER_SIZE + argsz)

    def send_raw(self, data: Buffer, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are. Replies to them end up in `link.bad_replies`."""
        self.link.send_raw((data,), fds)

    # 1 VERSION

    async def negotiate(self, version: capabilities.Version = DEFAULT_VERSION) -> capabilities.Session:
        """VERSION. RemoteProtocolError when the server's answer does not fit ours."""
        reply = await self.ask(capabilities.propose(version), m.VersionReply)
        session = capabilities.confirm(version, reply)
        self.link.connection.max_message_size = session.max_message_size
        self.link.connection.max_receive_fds = session.max_receive_fds
        self.session = session
        return session

    # 2 DMA_MAP, 3 DMA_UNMAP

    def begin_dma_map(self, memory: RamRange) -> Call:
        """DMA_MAP without waiting: QEMU pipelines them."""
        body = m.DmaMapRequest(memory.flags, memory.offset, memory.address, memory.size)
        return self.begin(body, () if memory.fd is None else (memory.fd,))

    async def dma_map(self, memory: RamRange) -> None:
        """Let the server use the range: by its file descriptor, or by messages when it has none."""
        await self.finish(self.begin_dma_map(memory), m.DmaMapReply)

    async def dma_unmap(self, memory: RamRange, bitmap: m.Bitmap | None = None) -> m.DmaUnmapReply:
        """Take the range back, with its dirty bitmap when `bitmap` says how that is to be (v1)."""
        return await self.dma_unmap_range(memory.address, memory.size, bitmap)

    async def dma_unmap_range(
        self, address: int, size: int, bitmap: m.Bitmap | None = None
    ) -> m.DmaUnmapReply:
        """As `dma_unmap`, for a range that may hold several regions."""
        flags = DmaUnmapFlags.GET_DIRTY_BITMAP if bitmap else DmaUnmapFlags(0)
        request = m.DmaUnmapRequest(flags, address, size, bitmap)
        self.expect(request.argsz)
        return await self.ask(request, m.DmaUnmapReply)

    async def dma_unmap_all(self) -> m.DmaUnmapReply:
        return await self.ask(m.DmaUnmapRequest(DmaUnmapFlags.ALL, 0, 0), m.DmaUnmapReply)

    # 8 SET_IRQS, 13 DEVICE_RESET

    async def set_irqs(
        self,
        index: int,
        flags: int,
        start: int,
        count: int,
        data: Sequence[bool] = (),
        fds: Sequence[int] = (),
    ) -> None:
        """`flags` is IrqSetFlags, `fds` stay the caller's. More fds than the server takes in one message
        go in several messages, as QEMU sends them."""
        most = self.session.max_send_fds if self.session else len(fds)
        if len(fds) <= most or not most:
            body = m.DeviceSetIrqsRequest(flags, index, start, count, tuple(data))
            await self.ask(body, m.DeviceSetIrqsReply, fds)
            return
        for first in range(0, len(fds), most):
            part = fds[first : first + most]
            body = m.DeviceSetIrqsRequest(flags, index, start + first, len(part))
            await self.ask(body, m.DeviceSetIrqsReply, part)

    async def reset(self) -> None:
        await self.ask(m.DeviceResetRequest(), m.DeviceResetReply)

    # 9 REGION_READ, 10 REGION_WRITE, 15 REGION_WRITE_MULTI

    async def region_read(self, region: int, offset: int, count: int) -> bytes:
        link = self.link
        reply = await link.finish(link.begin(m.RegionReadRequest(offset, region, count)))
        assert isinstance(reply.body, m.RegionReadReply)
        if len(reply.body.data) != count:
            raise RemoteProtocolError(f"REGION_READ: {len(reply.body.data)} bytes in answer to {count}")
        return bytes(reply.body.data)

    async def region_write(self, region: int, offset: int, data: m.Payload, *, posted: bool = False) -> None:
        """`posted`: sent and forgotten, as QEMU writes to memory BARs."""
        body = m.RegionWriteRequest(offset, region, data)
        if not posted:
            await self.ask(body, m.RegionWriteReply)
            return
        self.link.post(body)
        if self.link.congested:
            await self.link.drain()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def region_write_multi(self, writes: Sequence[m.RegionWrite], *, posted: bool = False) -> int:
        """Several small writes in one message: how many the server did. Posted ones count as done."""
        body = m.RegionWriteMultiRequest(tuple(writes))
        if posted:
            self.link.post(body)
            await trio.lowlevel.checkpoint_if_cancelled()
            return len(writes)
        return (await self.ask(body, m.RegionWriteMultiReply)).wr_cnt

    # 11 DMA_READ, 12 DMA_WRITE: the server asks

    def serve(self, request: m.Message) -> m.Message:
        """Answer a request of the server."""
        match request:
            case m.DmaReadRequest(address, count):
                limit = self.session.max_data_xfer_size if self.session else 0
                if count > limit:
                    raise DeviceError(f"DMA_READ: {count} bytes are more than max_data_xfer_size ({limit})")
                return m.DmaReadReply(address, self.dma.dma_read(address, count))
            case m.DmaWriteRequest(address, data):
                self.dma.dma_write(address, data)
                return m.DmaWriteReply(address, len(data))
        raise DeviceError(f"{type(request).__name__} is not for a client", errno.ENOSYS)

    # The end

    async def wait_closed(self) -> VfioUserError:
        """Wait until the connection is over; the reason."""
        return await self.link.wait_over()

    def close(self) -> None:
        """End the connection and close every descriptor that came with it."""
        self.link.close()
        self.close_region_fds()


@contextlib.asynccontextmanager
async def open_client_on(
    sock: socket.socket,
    *,
    dma: DmaTarget | None = None,
    version: capabilities.Version | None = DEFAULT_VERSION,
    timeout: float = 5.0,
    spin: float = 0.0,
) -> AsyncIterator[Client]:
    """A client on a connected UNIX stream socket, which it owns from now on.

    `version` None leaves the negotiation to the caller. `timeout` (seconds) is for each reply, 5 as QEMU
    waits; `spin` (seconds) is how long a request looks for its reply before it sleeps.
    """
    link = Link(Channel(sock), lambda request: client.serve(request), timeout=timeout, spin=spin)
    client = Client(link, dma or NoDma())
    try:
        async with background() as nursery:
            await link.run(nursery)
            if version is not None:
                await client.negotiate(version)
            yield client
    finally:
        client.close()


@contextlib.asynccontextmanager
async def open_client(
    path: str | os.PathLike[str],
    *,
    dma: DmaTarget | None = None,
    version: capabilities.Version | None = DEFAULT_VERSION,
    timeout: float = 5.0,
    spin: float = 0.0,
) -> AsyncIterator[Client]:
    """A client of the server at a socket path; see `open_client_on`. OSError when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    async with open_client_on(sock, dma=dma, version=version, timeout=timeout, spin=spin) as client:
        yield client
