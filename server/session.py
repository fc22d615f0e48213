# SPDX-License-Identifier: BSD-3-Clause
"""One client's state: takes its bytes, gives replies, carries the device's DMA messages. No sockets."""

import errno
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from vfio_user.device_models.device import Device, IrqIndex
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.tasks import Completion
from vfio_user.protocol import capabilities
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import MESSAGE_OVERHEAD, PCI_NUM_REGIONS, Role
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError, VfioUserError
from vfio_user.protocol.events import BadReply, ErrorReply, Event, Outgoing, Rejected, Reply, Request
from vfio_user.server.fastpath import HotTables, serve_run
from vfio_user.server.handlers import HANDLERS, SET_UP
from vfio_user.server.host import ServerHost
from vfio_user.server.migration.plain_read import take_read
from vfio_user.transport.channel import JOIN_LIMIT

logger = logging.getLogger(__name__)

READ_AHEAD = 16384
"""Bytes of requests between two looks at what waits to be sent: 32 of them may ask for 4 KiB."""

GATHER = 256
"""Messages between two sends."""


class Sender(Protocol):
    """What a session needs of the connection's channel."""

    @property
    def congested(self) -> bool:
        """The client does not read what it is sent."""

    def send(self, buffers: Sequence[Buffer], fds: Sequence[int] = (), *, lasting: bool = False) -> None:
        """Take the buffers of whole messages; never wait. The descriptors stay the caller's.

        `lasting`: the buffers never change again.
        """


class Session:
    """From the connect of a client to its end. Raises StreamLost when the client's bytes make no sense."""

    def __init__(self, device: Device, host: ServerHost, sender: Sender, own: capabilities.Version) -> None:
        self.device = device
        self.host = host
        self.connection = Connection(Role.SERVER)
        self.regions = host.regions
        self.num_regions = max(PCI_NUM_REGIONS, max(host.regions) + 1)
        self.max_data_xfer_size = own.capabilities.max_data_xfer_size
        self.max_send_fds = 0
        self._own = own
        self._sender = sender
        self._send = sender.send
        self._tables = HotTables(
            device.regions, host.irqs.unmask_intx if device.irqs.get(IrqIndex.INTX) else None
        )
        self._out: list[bytes] = []
        self._dma: dict[int, tuple[Completion[Any], int]] = {}

    def negotiate(self, request: m.VersionRequest) -> m.VersionReply:
        """VERSION: what both sides may do from now on."""
        own = self._own if self.host.migration.available else _without_migration(self._own)
        agreed, reply = capabilities.accept(own, request)
        # The limit of a request is that of the side which gets it (v1 specification: "Read and Write
        # Operations"): `agreed` is what we may ask of the client, who may have less room than we.
        self.connection.max_message_size = self.max_data_xfer_size + MESSAGE_OVERHEAD
        self.connection.max_receive_fds = agreed.max_receive_fds
        self.max_send_fds = agreed.max_send_fds
        self.host.dirty.negotiated(agreed.migration)
        self.host.attach(self, max_dma_maps=agreed.max_dma_maps, max_transfer=agreed.max_data_xfer_size)
        return reply

    def receive(self, nbytes: int, fds: Sequence[Any]) -> None:
        """Take `nbytes` that were put into the connection's buffer, and `fds`, and `serve`."""
        connection = self.connection
        connection.received(nbytes, fds)
        # What comes most, one small access, costs no further call.
        if nbytes <= READ_AHEAD and self.host.running and not connection.queued_fds:
            end = connection.end
            start = connection.start = serve_run(
                self._tables, connection.buffer, connection.start, end, self._out
            )
            if start == end:
                self.flush()
                return
        self.serve()

    def serve(self) -> None:
        """Answer every message that is complete, or as many as the client leaves room for.

        A request of 32 bytes may ask for a megabyte. So when the client leaves too many replies unread,
        the rest stays in the buffer, and this is to be called again once it has read them.
        """
        try:
            while self._serve_some():
                if len(self._out) >= GATHER:
                    self.flush()
                if self._sender.congested:
                    break
        finally:
            self.flush()  # also what came before a broken header

    def _serve_some(self) -> bool:
        """A run of small accesses, or one message of any kind. Whether there may be more."""
        connection = self.connection
        if self.host.running and not connection.queued_fds:
            start, end = connection.start, connection.end
            stop = min(end, start + READ_AHEAD)
            connection.start = serve_run(self._tables, connection.buffer, start, stop, self._out)
            if connection.start != start and stop != end:
                return True
            if connection.start == end:
                return False
        if self.host.migration.saving and self._serve_read():
            return True
        event = connection.next_event()
        if event is None:
            return False
        self._handle(event)
        return True

    def _serve_read(self) -> bool:
        """A plain MIG_DATA_READ, if that is the next message."""
        reply = take_read(self.connection, self.host.migration, self.max_data_xfer_size)
        if reply is None:
            return False
        self.flush()
        self._send(reply, (), lasting=True)
        return True

    def flush(self) -> None:
        """Send the replies and requests that have gathered, as many at once as the kernel keeps whole."""
        out = self._out
        if not out:
            return
        if len(out) == 1:
            self._send((out.pop(),), ())
            return
        self._out = []
        batch: list[bytes] = []
        size = 0
        for message in out:
            if batch and size + len(message) > JOIN_LIMIT:
                self._send((b"".join(batch),), ())
                batch, size = [], 0
            batch.append(message)
            size += len(message)
        self._send((b"".join(batch),), ())

    def close(self) -> None:
        """The client has left: nobody will answer the device's DMA."""
        self.connection.close()
        self._dma.clear()  # the tasks that wait have been cut; what they waited for is of no use

    # Requests

    def _handle(self, event: Event) -> None:
        match event:
            case Request():
                self._answer(event)
            case Rejected():
                logger.debug("refused command %d: %s", event.command_number, event.reason)
                if not event.no_reply:
                    self._put(self.connection.error(event.message_id, event.command_number, event.error))
            case Reply():
                self._settle(event.message_id, event.body)
            case ErrorReply():
                reason = f"the client answered {errno.errorcode.get(event.error, event.error)}"
                self._fail(event.message_id, DeviceError(reason, event.error))
            case BadReply():
                logger.debug("bad reply to command %d: %s", event.command_number, event.reason)
                if event.command is not None:
                    self._fail(event.message_id, RemoteProtocolError(event.reason))

    def _answer(self, request: Request) -> None:
        fds: list[Any] = list(request.fds)
        if not self.host.running and self._uses_device(request):
            self.host.resume()  # the client has set itself up and begins to use the device
        try:
            answer = HANDLERS[request.command](self, request.body, fds)
            reply = None if request.no_reply else self.connection.reply(request, answer.body)
        except VfioUserError as error:
            logger.debug("%s refused: %s", request.command.name, error.reason)
            self._refuse(request, error.errno)
        except Exception:
            logger.exception("the device failed in %s", request.command.name)
            self._refuse(request, errno.EIO)
        else:
            if reply is not None:
                self._put(reply, answer.fds, answer.lasting)
        finally:
            for fd in fds:
                fd.close()

    def _uses_device(self, request: Request) -> bool:
        """Whether the request shows that the device is to work. While it is being moved, none does."""
        if request.command in SET_UP or not self.host.migration.may_run:
            return False
        body, moving = request.body, self.host.migration_index
        return not isinstance(body, m.RegionReadRequest | m.RegionWriteRequest) or body.region != moving

    def _refuse(self, request: Request, error: int) -> None:
        if not request.no_reply:
            self._put(self.connection.error(request.message_id, request.command, error))

    def _put(self, outgoing: Outgoing, fds: Sequence[int] = (), lasting: bool = False) -> None:
        if fds or outgoing.size > JOIN_LIMIT:
            self.flush()
            self._send(outgoing.buffers, fds, lasting=lasting)
        else:
            self._out.append(b"".join(outgoing.buffers))

    # The device's DMA by message

    @property
    def outstanding(self) -> int:
        """How many of the messages are not answered yet."""
        return len(self._dma)

    def send_dma_read(self, address: int, count: int, completion: Completion[Buffer]) -> None:
        """DMA_READ: see `message_dma.DmaSender`."""
        self._request(m.DmaReadRequest(address, count), completion, count)

    def send_dma_write(self, address: int, data: Buffer, completion: Completion[int]) -> None:
        """DMA_WRITE: see `message_dma.DmaSender`."""
        self._request(m.DmaWriteRequest(address, data), completion, len(data))

    def _request(self, body: m.Message, completion: Completion[Any], count: int) -> None:
        message_id, outgoing = self.connection.request(body)
        self._dma[message_id] = completion, count
        self._put(outgoing)

    def _settle(self, message_id: int, body: m.Message) -> None:
        completion, count = self._dma.pop(message_id)
        match body:
            case m.DmaReadReply():
                completion.finish(body.data)
            case m.DmaWriteReply():
                # QEMU's reply may leave the body out; then it has done all of it.
                completion.finish(count if body.count is None else body.count)

    def _fail(self, message_id: int, error: VfioUserError) -> None:
        completion, _ = self._dma.pop(message_id)
        completion.fail(error)


def _without_migration(own: capabilities.Version) -> capabilities.Version:
    """Specification: missing `migration` means "migration is not supported by the sender"."""
    return replace(own, capabilities=replace(own.capabilities, migration=None))
