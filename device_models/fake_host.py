# SPDX-License-Identifier: BSD-3-Clause
"""A host for tests of device models: guest memory, interrupts and time in the hands of the test.

    host = FakeHost()
    device = Scratch(host)
    device.config.write(4, b"\\x07\\x00")              # memory, I/O, bus master
    device.regions[0].write(0xFF8, b"\\x01\\x00\\x00\\x00")
    host.run()
    assert host.irq_level

With `mapped=False` every DMA waits, as it does for a VMM that shares no memory, until `host.answer()`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from vfio_user.device_models.device import Device, DmaError, IrqIndex
from vfio_user.device_models.host import HostBase
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.tasks import Completion, Gate


@dataclass
class FakeDma:
    """Guest memory from address 0 to `len(memory)`, read-only below `writable_from`."""

    memory: bytearray
    mapped: bool = True
    enabled: bool = False
    writable_from: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    waiting: deque[Callable[[], None]] = field(default_factory=deque)
    """The accesses that the VMM has not answered yet (not `mapped`)."""
    gate: Gate = field(default_factory=Gate)
    """Passed before each access."""

    def _check(self, address: int, length: int, writable_from: int = 0) -> None:
        if not self.enabled:
            raise DmaError(address, length, "the bus master is off")
        if address < writable_from or address + length > len(self.memory):
            raise DmaError(address, length, "not mapped, or read-only")

    def _load(self, address: int, length: int) -> memoryview:
        self._check(address, length)
        self.bytes_read += length
        return memoryview(self.memory)[address : address + length]

    def _copy(self, address: int, length: int) -> bytes:
        return bytes(self._load(address, length))

    def _store(self, address: int, data: Buffer) -> None:
        self._check(address, len(data), self.writable_from)
        self.bytes_written += len(data)
        self.memory[address : address + len(data)] = data

    def _later(self, action: Callable[[], Buffer | None]) -> Completion[Buffer | None]:
        """Queue `action` for the VMM, which does it when the test lets it answer."""
        completion: Completion[Buffer | None] = Completion()

        def answer() -> None:
            try:
                result = action()
            except DmaError as error:
                completion.fail(error)
            else:
                completion.finish(result)

        self.waiting.append(answer)
        return completion

    async def read(self, address: int, length: int) -> Buffer:
        return (await self.read_many([(address, length)]))[0]

    async def write(self, address: int, data: Buffer) -> None:
        await self.write_many([(address, data)])

    async def read_many(self, segments: Sequence[tuple[int, int]]) -> list[Buffer]:
        await self.gate.passed()
        if self.mapped:
            return [self._load(address, length) for address, length in segments]
        replies = [self._later(partial(self._copy, a, n)) for a, n in segments]
        return [await reply or b"" for reply in replies]

    async def write_many(self, segments: Sequence[tuple[int, Buffer]]) -> None:
        await self.gate.passed()
        if self.mapped:
            for address, data in segments:
                self._store(address, data)
            return
        replies = [self._later(partial(self._store, a, bytes(data))) for a, data in segments]
        for reply in replies:
            await reply

    async def write_each(self, segments: deque[tuple[int, Buffer]]) -> None:
        await self.gate.passed()
        replies = [None if self.mapped else self._later(partial(self._store, a, d)) for a, d in segments]
        for reply in replies:
            if reply is None:
                self._store(*segments[0])
            else:
                await reply
            segments.popleft()

    def answer(self, count: int | None = None) -> None:
        """The VMM does `count` waiting accesses, or all; the device has not looked at the answers yet."""
        for _ in range(len(self.waiting) if count is None else min(count, len(self.waiting))):
            self.waiting.popleft()()


class FakeMemory:
    """`SharedMemory` that nobody else maps."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))


class FakeHost(HostBase):
    """A `device.Host` with everything visible: `dma.memory`, `irq_level`, `fired`, `now`."""

    def __init__(self, memory_size: int = 1 << 20, *, mapped: bool = True) -> None:
        self.now = 0
        super().__init__(lambda: self.now)
        self.dma = FakeDma(bytearray(memory_size), mapped, gate=self.gate)
        self.irq_level = False
        self.irq_rises = 0
        """How often the INTx level has risen."""
        self.enabled_irqs: set[IrqIndex] = set()
        self.masked: set[tuple[IrqIndex, int]] = set()
        self.fired: list[tuple[IrqIndex, int]] = []
        """The MSI and MSI-X messages delivered so far."""
        self.device: Device | None = None
        """Told of vectors that can be delivered again, if it is set."""

    def stop(self) -> None:
        """As an engine does when it is asked to: replies that have come are taken note of."""
        self.settle()
        super().stop()

    def resume(self) -> None:
        """Run, and tell the device of every vector that can be delivered."""
        super().resume()
        for index in (IrqIndex.MSI, IrqIndex.MSIX):
            for vector in range(self.device.irqs.get(index, 0) if self.device is not None else 0):
                self._announce(index, vector)

    def unmask(self, index: IrqIndex, vector: int) -> None:
        """Take the mask of a vector away; the device fires what is pending."""
        self.masked.discard((index, vector))
        self._announce(index, vector)

    def _announce(self, index: IrqIndex, vector: int) -> None:
        if self.device is not None and index in self.enabled_irqs and (index, vector) not in self.masked:
            self.device.irq_unmasked(index, vector)

    def set_irq_level(self, level: bool) -> None:
        self.irq_rises += level and not self.irq_level
        self.irq_level = level

    def trigger_irq(self, index: IrqIndex, vector: int) -> bool:
        if not self.running or index not in self.enabled_irqs or (index, vector) in self.masked:
            return False
        self.fired.append((index, vector))
        return True

    def irq_enabled(self, index: IrqIndex) -> bool:
        return index in self.enabled_irqs

    def allocate_memory(self, size: int) -> FakeMemory:
        return FakeMemory(size)

    def run(self, turns: int = 10_000) -> None:
        """Run the tasks until all of them have ended or wait for a DMA answer."""
        for _ in range(turns):
            if not self.tasks.ready:
                return
            self.tasks.run_ready()
        raise RuntimeError(f"tasks are still busy after {turns} turns")

    def answer(self, count: int | None = None) -> None:
        """Answer `count` waiting DMA accesses in order, or all and those that follow; then run the tasks."""
        self.run()
        while self.dma.waiting and (count is None or count > 0):
            self.dma.waiting.popleft()()
            self.run()
            count = None if count is None else count - 1

    def advance(self, nanoseconds: int) -> None:
        """Let time pass; timers fire at their deadlines, in order, and tasks run after each."""
        end = self.now + nanoseconds
        while (deadline := self.timers.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.timers.run_due()
            self.run()
        self.now = end
        self.run()
