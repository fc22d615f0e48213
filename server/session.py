# SPDX-License-Identifier: BSD-3-Clause
"""One client's state: takes its bytes, gives replies, carries the device's DMA messages. No sockets."""

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any

from vfio_user.device_models.device import Device
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.tasks import Completion
from vfio_user.protocol import capabilities
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import PCI_NUM_REGIONS, Role
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError, VfioUserError
from vfio_user.protocol.events import BadReply, ErrorReply, Event, Outgoing, Rejected, Reply, Request
from vfio_user.server.fastpath import RegionTables, serve_run
from vfio_user.server.handlers import HANDLERS, SET_UP, Answer
from vfio_user.server.host import ServerHost
from vfio_user.transport.channel import JOIN_LIMIT

logger = logging.getLogger(__name__)

Send = Callable[[Sequence[Buffer], Sequence[int]], None]
"""Takes the buffers and descriptors of whole messages; never waits. The descriptors stay the caller's."""


class Session:
    """From the connect of a client to its end. Raises StreamLost when the client's bytes make no sense."""

    def __init__(self, device: Device, host: ServerHost, send: Send, own: capabilities.Version) -> None:
        self.device = device
        self.host = host
        self.connection = Connection(Role.SERVER)
        self.num_regions = max(PCI_NUM_REGIONS, max(device.regions) + 1)
        self.max_data_xfer_size = own.capabilities.max_data_xfer_size
        self.max_send_fds = 0
        self._own = own
        self._send = send
        self._tables = RegionTables(device.regions)
        self._out: list[bytes] = []
        self._dma: dict[int, tuple[Completion[Any], int]] = {}

    def negotiate(self, request: m.VersionRequest) -> m.VersionReply:
        """VERSION: what both sides may do from now on."""
        agreed, reply = capabilities.accept(self._own, request)
        self.connection.max_message_size = agreed.max_message_size
        self.connection.max_receive_fds = agreed.max_receive_fds
        self.max_data_xfer_size = agreed.max_data_xfer_size
        self.max_send_fds = agreed.max_send_fds
        self.host.attach(self, max_dma_maps=agreed.max_dma_maps, max_transfer=agreed.max_data_xfer_size)
        return reply

    def receive(self, nbytes: int, fds: Sequence[Any]) -> None:
        """Take `nbytes` that were put into the connection's buffer, and `fds`; answer what is complete."""
        connection = self.connection
        connection.received(nbytes, fds)
        while True:
            if self.host.running and not connection.queued_fds:
                connection.start = serve_run(
                    self._tables, connection.buffer, connection.start, connection.end, self._out
                )
                if connection.start == connection.end:
                    break
            event = connection.next_event()
            if event is None:
                break
            self._handle(event)
        self.flush()

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
                logger.info("refused command %d: %s", event.command_number, event.reason)
                if not event.no_reply:
                    self._put(self.connection.error(event.message_id, event.command_number, event.error))
            case Reply():
                self._settle(event.message_id, event.body)
            case ErrorReply():
                reason = f"the client answered {errno.errorcode.get(event.error, event.error)}"
                self._fail(event.message_id, DeviceError(reason, event.error))
            case BadReply():
                logger.info("bad reply to command %d: %s", event.command_number, event.reason)
                if event.command is not None:
                    self._fail(event.message_id, RemoteProtocolError(event.reason))

    def _answer(self, request: Request) -> None:
        fds: list[Any] = list(request.fds)
        if request.command not in SET_UP and not self.host.running:
            self.host.resume()  # the client has set itself up and begins to use the device
        try:
            answer = HANDLERS[request.command](self, request.body, fds)
        except VfioUserError as error:
            logger.info("%s refused: %s", request.command.name, error.reason)
            self._refuse(request, error.errno)
        except Exception:
            logger.exception("the device failed in %s", request.command.name)
            self._refuse(request, errno.EIO)
        else:
            if not request.no_reply:
                self._reply(request, answer)
        finally:
            for fd in fds:
                fd.close()

    def _refuse(self, request: Request, error: int) -> None:
        if not request.no_reply:
            self._put(self.connection.error(request.message_id, request.command, error))

    def _reply(self, request: Request, answer: Answer) -> None:
        self._put(self.connection.reply(request, answer.body), answer.fds)

    def _put(self, outgoing: Outgoing, fds: Sequence[int] = ()) -> None:
        if fds or outgoing.size > JOIN_LIMIT:
            self.flush()
            self._send(outgoing.buffers, fds)
        else:
            self._out.append(b"".join(outgoing.buffers))

    # The device's DMA by message

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
