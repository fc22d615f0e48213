# SPDX-License-Identifier: BSD-3-Clause
"""A device that fails on demand: what a server has to survive, for its tests."""

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from vfio_user.device_models.device import DmaError, Host, IrqIndex, Option, pause
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import SharedMemory, StreamedMemory, parse_size
from vfio_user.device_models.registers import Register, RegisterFile
from vfio_user.device_models.state import Apply, Fields, Reader, Section
from vfio_user.device_models.state_memory import Ranges

PLACES = (
    *("nowhere", "constructor", "reset", "region", "config", "unmask", "counters"),
    *("save", "load", "apply", "restored", "log", "take", "pending", "adopt", "state"),
)
"""Where option `fail` makes the device raise `Fault`, each time that it gets there; with "-once" behind it
only the first time. "state" raises nothing: what is saved is a state that every device refuses."""
DIRTY = {"exact": True, "unknown": False}
STORM = 10_000
"""Edges of an interrupt storm."""

RAISE, ENDLESS, DMA_READ, DMA_WRITE, STORM_INTX, STORM_MSI, CANCEL_ITSELF = range(1, 8)
"""Values of START."""

REGISTERS = (
    Register("WORD", 0x00, writable=2**32 - 1, text="works always"),
    Register("RAISES", 0x04, text="reading or writing it raises"),
    Register("WRONG_SIZE", 0x08, text="a read of it gives a byte too few"),
    Register("START", 0x0C, text="starts a task: 1 raises, 2 endless, 3 DMA read, 4 DMA write, 5 storm, ..."),
    Register("ADDRESS", 0x10, width=8, writable=2**64 - 1, text="guest address of the DMA"),
    Register("LENGTH", 0x18, writable=2**32 - 1, text="bytes of the DMA"),
    Register("DONE", 0x1C, text="tasks that ended well"),
    Register("DMA_ERRORS", 0x20, text="DMAs that failed"),
    Register("TURNS", 0x24, text="turns that the endless task has had"),
    Register("STOP", 0x28, text="any write cuts the task"),
    Register("TIMER_RAISES", 0x2C, text="any write sets a timer whose callback raises"),
)


class Fault(Exception):
    """What this device raises."""


def parse_place(text: str) -> str:
    if text.removesuffix("-once") not in PLACES:
        raise ValueError(f"it is one of {', '.join(PLACES)}, not {text!r}")
    return text


def parse_dirty(text: str) -> bool:
    if text not in DIRTY:
        raise ValueError(f"it is {' or '.join(DIRTY)}, not {text!r}")
    return DIRTY[text]


class _Registers(RegisterFile):
    """A register file with a register that answers with too few bytes."""

    def read(self, offset: int, count: int) -> bytes:
        data = super().read(offset, count)
        return data[:-1] if offset == self.cell("WRONG_SIZE").offset else data


class _Memory(StreamedMemory):
    """Memory that fails on demand."""

    def __init__(self, memory: SharedMemory, fail_at: Callable[[str], None]) -> None:
        super().__init__(memory)
        self._fail_at = fail_at

    def start_log(self) -> None:
        self._fail_at("log")
        super().start_log()

    def take(self, limit: int) -> tuple[int, int] | None:
        self._fail_at("take")
        return super().take(limit)

    @property
    def pending(self) -> int:
        self._fail_at("pending")
        return super().pending

    def adopt(self, memory: memoryview, used: Ranges | None = None) -> memoryview:
        self._fail_at("adopt")
        return super().adopt(memory, used)


class Faulty(PciDevice):
    model = "faulty"
    summary = "fails on demand: exceptions, bad DMA, endless tasks, interrupt storms; for tests of servers"
    options = (
        Option(
            "fail", parse_place, "nowhere", f"where it fails (-once: the first time): {', '.join(PLACES)}"
        ),
        Option("dirty", parse_dirty, "exact", "which pages it says that it wrote: exact, or unknown"),
        Option("memory", parse_size, "0", "size of BAR 2: 0 (none), or 4K to 1G, a power of two"),
    )
    identity = Identity(vendor_id=0x1234, device_id=0xFA17, class_code=0xFF0000)
    state_version = 1

    def __init__(self, host: Host, *, fail: str = "nowhere", dirty: bool = True, memory: int = 0) -> None:
        self.fail = fail
        self.precise_dirty = dirty
        self._fail_at("constructor")
        self._tasks: dict[int, Callable[[], Coroutine[Any, Any, None]]] = {
            RAISE: self._raise,
            ENDLESS: self._endless,
            DMA_READ: self._dma_read,
            DMA_WRITE: self._dma_write,
            STORM_INTX: self._storm_intx,
            STORM_MSI: self._storm_msi,
            CANCEL_ITSELF: self._cancel_itself,
        }
        self.registers = _Registers(
            0x1000,
            REGISTERS,
            on_read={"WORD": self._read_word, "RAISES": self._read_raises},
            on_write={
                "RAISES": self._write_raises,
                "START": self._start,
                "STOP": self._stop,
                "TIMER_RAISES": self._set_timer,
            },
        )
        bars = {0: Bar(self.registers)}
        if memory:
            failing = _Memory(host.allocate_memory(memory), self._fail_at)
            bars[2] = Bar(failing, wide=True, prefetchable=True)
        super().__init__(host, bars, msi_vectors=1, msix_vectors=1)

    def _fail_at(self, place: str) -> None:
        if self.fail.removesuffix("-once") == place:
            if self.fail != place:
                self.fail = "nowhere"
            raise Fault(f"{place} fails on demand")

    def _read_word(self, _index: int) -> int:
        self._fail_at("region")
        return self.registers.cell("WORD").value

    def _read_raises(self, _index: int) -> int:
        raise Fault("a register read fails on demand")

    def _write_raises(self, _index: int, _value: int) -> None:
        raise Fault("a register write fails on demand")

    def _start(self, _index: int, value: int) -> None:
        if value in self._tasks:
            self.registers.cell("START").value = value
            self.host.start("fault", self._task)

    def _stop(self, _index: int, _value: int) -> None:
        self.host.cancel("fault")
        self.registers.cell("START").value = 0

    async def _task(self) -> None:
        """What START says, until it is done or stopped; after a move it is begun anew."""
        start = self.registers.cell("START")
        if start.value in self._tasks:
            await self._tasks[start.value]()
        start.value = 0

    def _set_timer(self, _index: int, _value: int) -> None:
        self.host.call_at(self.host.clock(), self._timer)

    def _timer(self) -> None:
        raise Fault("a timer fails on demand")

    def _count(self, name: str) -> None:
        cell = self.registers.cell(name)
        cell.value = cell.value + 1 & 0xFFFF_FFFF

    async def _raise(self) -> None:
        await pause()
        self.registers.cell("START").value = 0
        raise Fault("a task fails on demand")

    async def _endless(self) -> None:
        while True:
            self._count("TURNS")
            await pause()

    async def _dma_read(self) -> None:
        try:
            await self.host.dma.read(
                self.registers.cell("ADDRESS").value, self.registers.cell("LENGTH").value
            )
        except DmaError:
            self._count("DMA_ERRORS")
        else:
            self._count("DONE")

    async def _dma_write(self) -> None:
        length = min(self.registers.cell("LENGTH").value, 1 << 20)
        try:
            await self.host.dma.write(self.registers.cell("ADDRESS").value, b"\xfa" * length)
        except DmaError:
            self._count("DMA_ERRORS")
        else:
            self._count("DONE")

    async def _storm_intx(self) -> None:
        for edge in range(STORM):
            self.interrupts.set_level(not edge % 2)
            if edge % 64 == 63:
                await pause()
        self.interrupts.set_level(False)
        self._count("DONE")

    async def _storm_msi(self) -> None:
        for edge in range(STORM):
            self.interrupts.notify(0)
            if edge % 64 == 63:
                await pause()
        self._count("DONE")

    async def _cancel_itself(self) -> None:
        self._count("DONE")
        self._stop(0, 0)
        await pause()
        self._count("TURNS")  # never: the cut comes at the await

    def _config_changed(self) -> None:
        self._fail_at("config")
        super()._config_changed()

    def irq_unmasked(self, index: IrqIndex, vector: int) -> None:
        self._fail_at("unmask")
        super().irq_unmasked(index, vector)

    def counters(self) -> dict[str, int]:
        self._fail_at("counters")
        return {name.lower(): self.registers.cell(name).value for name in ("DONE", "DMA_ERRORS", "TURNS")}

    def reset_state(self) -> None:
        self._fail_at("reset")
        super().reset_state()

    # State

    def state_sections(self) -> Sequence[Section]:
        return (*super().state_sections(), Section("faulty", 1, self._save, self._load))

    def _save(self) -> Fields:
        self._fail_at("save")
        return {"surprise": "?"} if self.fail == "state" else {}

    def _load(self, reader: Reader) -> Apply:
        self._fail_at("load")
        return partial(self._fail_at, "apply")

    def restored(self) -> None:
        super().restored()
        self._fail_at("restored")
        if self.registers.cell("START").value:
            self.host.start("fault", self._task)
