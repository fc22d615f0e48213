# SPDX-License-Identifier: BSD-3-Clause
"""The backend `stream:PATH`: frames over a UNIX stream socket, as QEMU's `-netdev stream` frames them.

Each frame follows its length, four bytes, big-endian. passt and every QEMU stream server speak it. When
the far end goes, the link goes down, and it comes back with the far end.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable

from vfio_user.device_models.backends import Backend
from vfio_user.device_models.net import CallLater, Cancellable, Receiver
from vfio_user.device_models.segmentation import ETHERNET_HEADER
from vfio_user.server.net.errors import BackendError
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)

LENGTH_SIZE = 4
MAX_FRAME = 69_632
"""The longest frame that QEMU takes (68 KiB); a longer one means that the framing is lost."""
PADDED_SIZE = 60
"""An Ethernet frame is filled up to this, without FCS."""
RECEIVE_BUFFER = 128 * 1024
QUEUE_LIMIT = 256 * 1024
"""Bytes that wait for a slow far end; frames beyond are dropped."""
RECONNECT_INTERVAL = 1_000_000_000
"""Nanoseconds between attempts to reach a far end that is gone."""


class StreamBackend(Backend):
    """Frames to and from a stream socket. Raises `BackendError` if nobody listens at the start."""

    def __init__(self, path: str, poller: Poller, call_later: CallLater) -> None:
        super().__init__()
        self.path = path
        self._poller = poller
        self._call_later = call_later
        self._timer: Cancellable | None = None
        self._inbox = Inbox(self._take)
        self._paused = False
        self._queue: deque[bytes] = deque()  # the first may be the rest of a frame
        self._queued = 0
        self._socket: socket.socket | None = connect(path)
        self._sends_later = False

    def attach(self, receiver: Receiver) -> None:
        super().attach(receiver)
        self._watch()

    def _watch(self) -> None:
        if self._socket is not None:
            self._poller.unregister(self._socket.fileno())
            self._poller.register(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            count = self._inbox.fill(self._socket)
        except BlockingIOError:
            return
        except OSError as error:
            self._disconnect(str(error))
            return
        if count:
            self._deliver()
        else:
            self._disconnect("the far end has closed it")

    def _deliver(self) -> None:
        """Offer every complete frame; stop reading when one is refused."""
        try:
            refused = not self._inbox.deliver()
        except FramingError as error:
            self._disconnect(str(error))
            return
        if refused and self._socket is not None:
            self._paused = True
            self._poller.unregister(self._socket.fileno())

    def _take(self, frame: bytes) -> bool:
        if len(frame) >= ETHERNET_HEADER:
            return self._offer(frame)
        self.counts.received_dropped += 1
        return True

    def ready(self) -> None:
        if self._paused:
            self._paused = False
            self._deliver()
            if not self._paused:
                self._watch()

    def _transmit_frames(self, frames: list[bytes]) -> int:
        """A connection that is broken is found out by the reader, not in the middle of a device's work."""
        bare = [without_padding(frame) if len(frame) == PADDED_SIZE else frame for frame in frames]
        framed = [len(frame).to_bytes(LENGTH_SIZE, "big") + frame for frame in bare]
        accepted = [one for one in framed if self._has_room(len(one))]
        self._queue += accepted
        if not self._sends_later:
            try:
                self._flush()
            except OSError:
                self._clear_queue()
                return len(frames)
        return len(frames) - len(accepted)

    def _has_room(self, length: int) -> bool:
        fits = self._queued + length <= QUEUE_LIMIT
        self._queued += length if fits else 0
        return fits

    def _flush(self) -> None:
        """Send what is queued. A frame that was begun is finished before anything else is sent."""
        assert self._socket is not None
        try:
            sent = self._socket.send(b"".join(self._queue))
        except BlockingIOError:
            sent = 0
        self._queued -= sent
        while self._queue and sent >= len(self._queue[0]):
            sent -= len(self._queue.popleft())
        if sent:
            self._queue[0] = self._queue[0][sent:]
        self._watch_writable(self._flush_later if self._queue else None)

    def _watch_writable(self, callback: Callable[[], None] | None) -> None:
        if callback is None and not self._sends_later:
            return  # the way of nearly every frame
        assert self._socket is not None
        self._sends_later = callback is not None
        self._poller.watch_writable(self._socket.fileno(), callback)

    def _flush_later(self) -> None:
        try:
            self._flush()
        except OSError as error:
            self._disconnect(str(error))

    def _clear_queue(self) -> None:
        self._queue.clear()
        self._queued = 0

    def _disconnect(self, reason: str) -> None:
        logger.warning("stream:%s: connection lost: %s; trying to reconnect", self.path, reason)
        self.counts.sent_dropped += len(self._queue)
        self._release()
        self._timer = self._call_later(RECONNECT_INTERVAL, self._reconnect)
        self._set_carrier(False)

    def _reconnect(self) -> None:
        try:
            self._socket = connect(self.path)
        except BackendError:
            self._timer = self._call_later(RECONNECT_INTERVAL, self._reconnect)
            return
        logger.info("stream:%s: connected again", self.path)
        self._watch()
        self._set_carrier(True)

    def _release(self) -> None:
        """Forget the connection and what belongs to it."""
        self._clear_queue()
        self._inbox.clear()
        self._paused = False
        if self._socket is not None:
            self._watch_writable(None)
            self._poller.unregister(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        self._release()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connect(path: str) -> socket.socket:
    """A non-blocking connection to the stream server at `path`."""
    if not path:
        raise BackendError("stream: where to? Give the path of the socket: stream:PATH")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
    except (OSError, ValueError) as error:
        connection.close()
        raise BackendError(f"stream:{path}: {_advice(error)}") from None
    return connection


def _advice(error: OSError | ValueError) -> str:
    match error:
        case FileNotFoundError():
            return "no such socket; start passt, or whatever listens there, first"
        case ConnectionRefusedError():
            return "nobody listens there; start passt, or whatever made the socket, again"
        case PermissionError():
            return "no permission to connect; run as the user who started the far end"
        case BlockingIOError():
            return "the far end takes no more connections; stop another client of it first"
        case _:
            return f"{getattr(error, 'strerror', None) or error}; give the path of a UNIX stream socket"


def without_padding(frame: bytes) -> bytes:
    """A frame without what fills it up to Ethernet's least size; only an IP packet says how long it is.

    A stream needs no padding, and passt of 2023 (Debian 12) drops a TCP segment that has some, such as
    every bare ACK of Linux' e1000 driver, which pads itself.
    """
    match frame[12:14]:
        case b"\x08\x00":
            size = int.from_bytes(frame[16:18], "big")
        case b"\x86\xdd":
            size = 40 + int.from_bytes(frame[18:20], "big")
        case _:
            return frame
    return frame[: ETHERNET_HEADER + size] if size >= 20 else frame


class FramingError(Exception):
    """What came cannot be a length: where frames begin is not known any more."""


class Inbox:
    """Bytes in, frames out. `take` gets each frame; False: it is refused, and comes again."""

    def __init__(self, take: Callable[[bytes], bool]) -> None:
        self._take = take
        self._buffer = bytearray(RECEIVE_BUFFER)
        self._end = 0

    def fill(self, connection: socket.socket) -> int:
        """Receive once; the number of bytes, 0 at the end. There is room: a refused frame stops reading."""
        count = connection.recv_into(memoryview(self._buffer)[self._end :])
        self._end += count
        return count

    def deliver(self) -> bool:
        """Give every complete frame away, until one is refused (False). Raises `FramingError`."""
        buffer, begin, taken = self._buffer, 0, True
        while taken and self._end - begin >= LENGTH_SIZE:
            start = begin + LENGTH_SIZE
            stop = start + int.from_bytes(buffer[begin:start], "big")
            if stop - start > MAX_FRAME:
                raise FramingError(f"a frame of {stop - start} bytes is announced, {MAX_FRAME} is the limit")
            if stop > self._end:
                break
            taken = self._take(bytes(memoryview(buffer)[start:stop]))
            begin = stop if taken else begin
        rest = max(0, self._end - begin)  # `take` may have closed us
        buffer[:rest] = buffer[begin : self._end]
        self._end = rest
        return taken

    def clear(self) -> None:
        self._end = 0
