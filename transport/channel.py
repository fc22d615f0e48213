# SPDX-License-Identifier: BSD-3-Clause
"""A connected UNIX stream socket that carries bytes with file descriptors beside them, for both sides.

Nothing here waits except `wait_readable` and `wait_writable`: the caller asks, and gets an answer now.

The kernel cuts what it is given into buffers, and a receiver may see one without the next; QEMU takes a
header that arrives in two parts for an error. Up to `JOIN_LIMIT` bytes go in one buffer or not at all
(net/unix/af_unix.c allocates at most 32 KiB of fragments besides the linear part). So whoever joins
several messages into one `send` keeps the sum within that limit, and sends a longer message by itself.
"""

import array
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import trio

from vfio_user.protocol.constants import SCM_MAX_FD
from vfio_user.protocol.errors import StreamLost, VfioUserError
from vfio_user.transport.fds import OwnedFd, close_all, own

Buffer = bytes | bytearray | memoryview

JOIN_LIMIT = 32 * 1024
"""Bytes that the kernel takes in one piece or not at all; see the description of this module."""

QUEUE_LIMIT = 4 << 20
"""Bytes of unsent data from which on `congested` tells the owner to stop reading requests."""

SEND_BUFFER = 4 << 20
"""Bytes that the kernel is asked to buffer; an administrator may allow less (net.core.wmem_max). A reply of
megabytes is then sent while the peer reads: with the default of 208 KiB, sender and receiver on two CPUs
sleep and wake for each 52 KiB of it."""

FD_QUEUE_LIMIT = 16
"""Unsent descriptors, likewise: each is open in this process until it goes."""

_TRUNCATED = int(socket.MSG_CTRUNC)  # a plain number: `&` with an enum costs more than a microsecond
_CONTROL_SPACE = socket.CMSG_SPACE(SCM_MAX_FD * 4)
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RECEIVE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class PeerGone(VfioUserError):
    """The other end has closed or reset the connection."""

    default_errno = errno.EPIPE


class FdsLost(StreamLost):
    """The kernel could not deliver all descriptors (this process has too many open files).

    Those that came are closed. `count` bytes were received all the same.
    """

    def __init__(self, count: int) -> None:
        super().__init__("the file descriptors of a message did not all arrive: too many open files?")
        self.count = count


class _Unsent:
    """What is left of one `send`. The descriptors are duplicates, owned here, until the first byte goes."""

    __slots__ = ("data", "fds")

    def __init__(self, data: memoryview, fds: list[OwnedFd]) -> None:
        self.data = data
        self.fds = fds


class Channel:
    """Owns `sock` and makes it non-blocking."""

    def __init__(self, sock: socket.socket, *, queue_limit: int = QUEUE_LIMIT) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._sock = sock
        self._queue: deque[_Unsent] = deque()
        self.queue_limit = queue_limit
        self.pending = 0
        """Bytes that wait in the queue for `flush`."""
        self.pending_fds = 0
        """Descriptors that wait with them."""

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def congested(self) -> bool:
        """The peer does not read what it is sent: take no further requests from it for now."""
        return self.pending > self.queue_limit or self.pending_fds > FD_QUEUE_LIMIT

    def receive_into(self, view: memoryview) -> tuple[int, list[OwnedFd]] | None:
        """Read what has arrived into `view`: the number of bytes and the descriptors that came with them.

        None: nothing there now. 0 bytes: the peer has ended the stream. The kernel ends a read after a
        buffer with descriptors, so these belong to the last message that a sender's call put in there.
        Raises PeerGone on a reset and FdsLost when descriptors were cut off.
        """
        try:
            count, control, flags, _ = self._sock.recvmsg_into((view,), _CONTROL_SPACE, _RECEIVE_FLAGS)
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerGone(f"receiving failed: {error.strerror}", error.errno) from error
        if not control and not flags & _TRUNCATED:
            return count, []
        fds = _descriptors(control)
        if flags & _TRUNCATED:
            close_all(fds)
            raise FdsLost(count)
        return count, fds

    def send(self, buffers: Sequence[Buffer], fds: Sequence[int] = (), *, lasting: bool = False) -> None:
        """Send now what the kernel takes, and queue a copy of the rest; `flush` continues with it.

        `lasting`: the buffers never change again, so that a rest behind the first bytes is not copied.
        `fds` travel with the first byte of these buffers and with no byte of another call. They stay the
        caller's, who may close them on return. Raises PeerGone, or VfioUserError with the kernel's errno.
        """
        if self._queue:
            self._enqueue(b"".join(buffers), fds)
            return
        if len(buffers) == 1 and not fds:  # the way of nearly every reply
            sent = self._send_now(buffers, ())
            if sent != len(buffers[0]):
                self._keep(buffers, sent, (), lasting)
            return
        if len(buffers) > _IOV_MAX:
            buffers = (b"".join(buffers),)
        sent = self._send_now(buffers, fds)
        if sent != sum(map(len, buffers)):
            self._keep(buffers, sent, () if sent else fds, lasting)

    def flush(self) -> bool:
        """Send what is queued, as far as it goes. True: nothing is left. Raises PeerGone."""
        while self._queue:
            batch = self._next_batch()
            sent = self._send_now([unsent.data for unsent in batch], [fd.fileno() for fd in batch[0].fds])
            if not sent:
                return False
            self._dequeue(sent)
        return True

    def close(self) -> None:
        """Close the socket and every descriptor that still waits; harmless when done already."""
        for unsent in self._queue:
            close_all(unsent.fds)
        self._queue.clear()
        self.pending = self.pending_fds = 0
        self._drain()
        self._sock.close()

    def _drain(self) -> None:
        """Close what was sent to us and not read: the kernel would too, and linger (`OwnedFd.close`)."""
        with contextlib.suppress(OSError, FdsLost, PeerGone):
            self._sock.shutdown(socket.SHUT_RDWR)  # nothing further comes
            view = memoryview(bytearray(JOIN_LIMIT))
            while (received := self.receive_into(view)) is not None and received[0]:
                close_all(received[1])

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self._sock)

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._sock)

    def _send_now(self, buffers: Sequence[Buffer], fds: Sequence[int]) -> int:
        try:
            if fds:
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                return self._sock.sendmsg(buffers, control, _SEND_FLAGS)
            if len(buffers) == 1:
                return self._sock.send(buffers[0], _SEND_FLAGS)
            return self._sock.sendmsg(buffers, (), _SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
                raise PeerGone("the connection has been closed", error.errno) from error
            # ETOOMANYREFS, for one: a peer that leaves the descriptors it was sent unread.
            raise VfioUserError(f"sending failed: {error.strerror}", error.errno) from error

    def _keep(self, buffers: Sequence[Buffer], sent: int, fds: Sequence[int], lasting: bool) -> None:
        """Queue what follows the first `sent` bytes: together, or after the first bytes as it is."""
        rest = _rest(buffers, sent)
        for data in rest if lasting and sent else (b"".join(rest),):
            self._enqueue(data, fds)

    def _enqueue(self, data: Buffer, fds: Sequence[int]) -> None:
        if data:
            self._queue.append(_Unsent(memoryview(data), _duplicates(fds)))
            self.pending += len(data)
            self.pending_fds += len(fds)

    def _next_batch(self) -> list[_Unsent]:
        """The first entry, and those after it that may share its system call."""
        batch = [self._queue[0]]
        total = len(batch[0].data)
        for unsent in islice(self._queue, 1, _IOV_MAX):
            total += len(unsent.data)
            if batch[0].fds or unsent.fds or total > JOIN_LIMIT:
                break
            batch.append(unsent)
        return batch

    def _dequeue(self, sent: int) -> None:
        self.pending -= sent
        self.pending_fds -= len(self._queue[0].fds)
        close_all(self._queue[0].fds)
        self._queue[0].fds.clear()
        while sent:
            first = self._queue[0]
            taken = min(sent, len(first.data))
            first.data = first.data[taken:]
            sent -= taken
            if not first.data:
                self._queue.popleft()


def _duplicates(fds: Sequence[int]) -> list[OwnedFd]:
    copies: list[OwnedFd] = []
    try:
        for fd in fds:
            copies.append(OwnedFd(os.dup(fd)))
    except OSError as error:
        close_all(copies)
        raise VfioUserError(f"keeping a descriptor to send: {error.strerror}", error.errno) from error
    return copies


def _descriptors(control: Iterable[tuple[int, int, bytes]]) -> list[OwnedFd]:
    fds: list[OwnedFd] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds += own(numbers)
    return fds


def _rest(buffers: Sequence[Buffer], sent: int) -> list[memoryview]:
    """What follows the first `sent` bytes."""
    parts: list[memoryview] = []
    for buffer in buffers:
        skipped = min(sent, len(buffer))
        sent -= skipped
        parts.append(memoryview(buffer)[skipped:])
    return parts
