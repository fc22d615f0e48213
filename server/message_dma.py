# SPDX-License-Identifier: BSD-3-Clause
"""DMA by message: guest memory that was not shared, read and written by the client for us.

(Specification: "VFIO_USER_DMA_READ", "VFIO_USER_DMA_WRITE".) Only a device's task waits for the replies;
nothing that is answered in-band does.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from vfio_user.device_models.device import DmaError
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.tasks import Completion, Gate
from vfio_user.protocol.constants import DEFAULT_MAX_DATA_XFER_SIZE
from vfio_user.protocol.errors import VfioUserError

T = TypeVar("T")

WINDOW = 64
"""Messages of one access under way at once: enough to hide the latency, few enough to bound the queues."""


class DmaSender(Protocol):
    """What a session does for us. It owns the message ids, and settles each completion exactly once:
    by `finish` with what the reply said, by `fail` with a VfioUserError (an error reply, a client that has
    gone). Either method may raise a VfioUserError when nothing can be sent; then nothing was.
    """

    def send_dma_read(self, address: int, count: int, completion: Completion[Buffer]) -> None:
        """Send DMA_READ; finish with the data of the reply, which nobody else changes any more."""

    def send_dma_write(self, address: int, data: Buffer, completion: Completion[int]) -> None:
        """Send DMA_WRITE; finish with the count of the reply. `data` is valid during the call only."""


class _Sent(Generic[T]):
    """A message under way, and what is said of it if it fails."""

    __slots__ = ("address", "completion", "length", "written")

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.length = length
        self.written: Callable[[], object] | None = None
        self.completion: Completion[T] = Completion()

    def error(self, reason: str) -> DmaError:
        return DmaError(self.address, self.length, reason)

    async def reply(self) -> T:
        try:
            return await self.completion
        except VfioUserError as error:
            raise self.error(error.reason) from error


class MessageDma:
    """Splits accesses into messages and keeps `WINDOW` of them under way; replies come in any order."""

    def __init__(
        self, sender: DmaSender, max_transfer: int = DEFAULT_MAX_DATA_XFER_SIZE, gate: Gate | None = None
    ) -> None:
        """`gate` is passed after each wait: no message is sent while it is closed."""
        self._sender = sender
        self._gate = gate or Gate()
        self.max_transfer = max_transfer
        """The client's max_data_xfer_size, in bytes."""

    def reader(self) -> "MessageReader":
        return MessageReader(self._sender, self.max_transfer, self._gate)

    def writer(self) -> "MessageWriter":
        return MessageWriter(self._sender, self.max_transfer, self._gate)


class MessageReader:
    """The reads of one access: `add` each range, then take its bytes with `result`, in the same order."""

    __slots__ = ("_done", "_gate", "_max_transfer", "_sender", "_sent")

    def __init__(self, sender: DmaSender, max_transfer: int, gate: Gate) -> None:
        self._sender = sender
        self._gate = gate
        self._max_transfer = max_transfer
        self._sent: deque[_Sent[Buffer]] = deque()
        self._done: deque[Buffer] = deque()

    async def add(self, address: int, length: int) -> None:
        """Ask for the range; waits only while the window is full."""
        for place, count in _pieces(address, length, self._max_transfer):
            if len(self._sent) >= WINDOW:
                self._done.append(await self._next())
                await self._gate.passed()
            sent: _Sent[Buffer] = _Sent(place, count)
            try:
                self._sender.send_dma_read(place, count, sent.completion)
            except VfioUserError as error:
                raise sent.error(error.reason) from error
            self._sent.append(sent)

    async def result(self, length: int) -> Buffer:
        """The bytes of the next range that was added, whose length is given again."""
        parts: list[Buffer] = []
        while length:
            part = self._done.popleft() if self._done else await self._next()
            parts.append(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _next(self) -> Buffer:
        sent = self._sent.popleft()
        data = await sent.reply()
        if len(data) != sent.length:
            raise sent.error(f"the client's reply has {len(data)} bytes")
        return data


class MessageWriter:
    """The writes of one access: `add` each, then `finish`."""

    __slots__ = ("_gate", "_max_transfer", "_sender", "_sent")

    def __init__(self, sender: DmaSender, max_transfer: int, gate: Gate) -> None:
        self._sender = sender
        self._gate = gate
        self._max_transfer = max_transfer
        self._sent: deque[_Sent[int]] = deque()

    async def add(self, address: int, data: Buffer, written: Callable[[], object] | None = None) -> None:
        """Send the data; waits only while the window is full. The view must then outlive that wait.

        `written` is called when all of it, and all that was added before, has reached guest memory.
        """
        view = memoryview(data)
        for place, count in _pieces(address, len(view), self._max_transfer):
            if len(self._sent) >= WINDOW:
                await self._next()
                await self._gate.passed()
            sent: _Sent[int] = _Sent(place, count)
            try:
                start = place - address
                self._sender.send_dma_write(place, view[start : start + count], sent.completion)
            except VfioUserError as error:
                raise sent.error(error.reason) from error
            self._sent.append(sent)
        if written is not None and self._sent:
            self._sent[-1].written = written

    async def finish(self) -> None:
        """Wait until everything has reached guest memory."""
        while self._sent:
            await self._next()

    async def _next(self) -> None:
        sent = self._sent.popleft()
        count = await sent.reply()
        if count != sent.length:
            raise sent.error(f"the client's reply is for {count} bytes")
        if sent.written is not None:
            sent.written()


def _pieces(address: int, length: int, most: int) -> list[tuple[int, int]]:
    if length <= most:
        return [(address, length)] if length else []
    end = address + length
    return [(place, min(most, end - place)) for place in range(address, end, most)]
