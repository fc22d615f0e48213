# SPDX-License-Identifier: BSD-3-Clause
"""The device contract: what a model is (`Device`) and what it is given (`Host`).

**Who calls what.** The engine makes the host, then the device, once for each served socket. Clients come
and go; the device stays, with its state. The engine calls `Region.read` and `Region.write` for accesses,
`reset` for DEVICE_RESET, `irq_unmasked` when an interrupt can be delivered again. All of these are
synchronous and never wait: a VMM holds its own lock until they are answered.

**Tasks.** What touches guest memory is a coroutine. A handler starts it with `host.start(key, work)`,
where the key is usually a ring. It awaits only `host.dma` and `pause()`. With mapped memory an await
never suspends; without it the task really waits for the VMM's reply. A task handles a bounded batch
(64 descriptors, 64 KiB), then `await pause()`.

**After an await everything may have changed:** registers written, device reset, memory unmapped. Read
again what the decision depends on. Any await may also be the last one: a reset cuts tasks there, and so
do a move to another host and a client that leaves (the coroutine is closed: `finally` blocks run and must
not await).

**Commit.** An outside effect (a frame sent, a frame accepted) and the state that forbids its repetition
change in one step without an await between them; a write-back that is still owed is itself state. So a
task can be cut at any await and begun anew: nothing is lost, nothing happens twice.

**Order.** What tells the guest that a DMA is done (head, status, cause, interrupt) changes only after
`await dma.write(...)` has returned.

**Views.** A buffer that `dma.read` returns may be a view of guest memory. It is valid until the next
await, and is not kept in an attribute or an exception.

**Stop.** A stopped device still gets register accesses, `irq_unmasked` and `reset`. Tasks and device time
stand still, starts are remembered by the host, nothing is sent, no frame is taken from the wire (what is
accepted after the state was saved would be lost). The host fires no interrupt, but remembers the level of
INTx and fires it on `resume`, and tells of every vector that can be delivered then.

**Time** is `host.clock()` and `host.call_at()`, in nanoseconds, frozen while the device is stopped.

**State.** A device is saved while it is stopped, and restored into one that was made with the same options
and is stopped, in a process that has never seen it. `sections` and `memories` say what its state is: all
that its future depends on and that cannot be told from the rest of it. Owed work is state (how far a copy
came, which write-backs are owed); tasks and timers are not, `restored` makes them anew. A time is saved as
time left. What belongs to the connection (eventfds, the VMM's masks and mappings) is never saved; causes,
levels, the masks that the guest sets and pending bits are. A restored state comes from an untrusted
stream: no value that `load` lets pass may make the model raise, or loop, later.
"""

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Protocol

from vfio_user.device_models.regions import Buffer, Region, SharedMemory
from vfio_user.device_models.state import Section
from vfio_user.device_models.state_memory import StateMemory
from vfio_user.device_models.tasks import Work, pause
from vfio_user.device_models.timers import Timer

__all__ = [
    "Buffer",
    "Device",
    "Dma",
    "DmaError",
    "Host",
    "IrqIndex",
    "Option",
    "OptionError",
    "RegionIndex",
    "pause",
]


class RegionIndex(IntEnum):
    """Region indexes of a PCI device (linux/vfio.h)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class IrqIndex(IntEnum):
    """Interrupt indexes of a PCI device (linux/vfio.h)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class DmaError(Exception):
    """Guest memory could not be read or written; the task decides what its device does then."""

    def __init__(self, address: int, length: int, reason: str) -> None:
        super().__init__(f"DMA of {length} bytes at {address:#x}: {reason}")
        self.address = address
        self.length = length
        self.reason = reason


class Dma(Protocol):
    """Guest memory as the device sees it: addresses are IOVAs in bytes, lengths are in bytes.

    Every method raises `DmaError` when a part of the range is not mapped, is read-only on a write, or the
    bus master is off; the other parts may then have been done.
    """

    enabled: bool
    """The bus master bit; the configuration space sets it."""

    async def read(self, address: int, length: int) -> Buffer:
        """Read `length` bytes. The result may be a view: see "Views" in this module's description."""

    async def write(self, address: int, data: Buffer) -> None:
        """Write `data`; it has reached guest memory when this returns."""

    async def read_many(self, segments: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Read every (address, length) at once: without mapped memory one round trip instead of many."""

    async def write_many(self, segments: Sequence[tuple[int, Buffer]]) -> None:
        """Write every (address, data), in this order; all have reached guest memory when this returns."""

    async def write_each(self, segments: deque[tuple[int, Buffer]]) -> None:
        """As `write_many`; each leaves `segments` as soon as it has reached guest memory.

        So what is left after a cut is what is still owed. Writing the others again would not be harmless:
        the guest may have put something else there.
        """


class Host(Protocol):
    """What an engine, or a test's fake, gives to a device model."""

    @property
    def dma(self) -> Dma:
        """Guest memory."""

    @property
    def running(self) -> bool:
        """Whether the device is not stopped; see "Stop"."""

    def start(self, key: Hashable, work: Work) -> None:
        """Run the coroutine of `work` after the present message is answered; see "Tasks"."""

    def cancel(self, key: Hashable) -> None:
        """Cut the task of `key` and forget that it was started."""

    def clock(self) -> int:
        """Device time in nanoseconds."""

    def call_at(self, deadline: int, callback: Callable[[], None]) -> Timer:
        """Call back once when `clock()` has reached `deadline`."""

    def set_irq_level(self, level: bool) -> None:
        """Drive the INTx pin; the host fires, masks itself and fires again as the client wants it."""

    def trigger_irq(self, index: IrqIndex, vector: int) -> bool:
        """Fire an MSI or MSI-X vector. False: masked or without an eventfd, the caller keeps it pending."""

    def irq_enabled(self, index: IrqIndex) -> bool:
        """Whether the client has given the index at least one eventfd (SET_IRQS with trigger).

        An engine that is not told says False: then the configuration space has to decide.
        """

    def allocate_memory(self, size: int) -> SharedMemory:
        """Zeroed memory, a multiple of the page size, that the VMM may map as part of a region."""


class OptionError(ValueError):
    """An option of a model that cannot be used; the text says what is wrong and what would be right."""


@dataclass(frozen=True, slots=True)
class Option:
    """A setting of a model (`--set NAME=VALUE`), passed to its constructor as a keyword argument."""

    name: str
    parse: Callable[[str], Any]
    """Turns the text into the value; raises ValueError."""
    default: str
    help: str


class Device:
    """A PCI device model. A subclass sets `regions` and `irqs` in its constructor."""

    model: ClassVar[str]
    """Its name on the command line."""
    summary: ClassVar[str]
    """One line for `vfio-user list`."""
    options: ClassVar[tuple[Option, ...]] = ()
    state_version: ClassVar[int] = 0
    """Of the set of sections and memories; a larger one than the model's own is refused. 0: the model
    cannot be saved and restored, and the server offers no migration."""
    precise_dirty: bool = True
    """False: the model cannot tell which guest pages it has written, so that all of its mapped writable
    pages are reported as dirty."""

    regions: Mapping[int, Region]
    """By region index; CONFIG is always there."""
    irqs: Mapping[IrqIndex, int]
    """How many vectors each interrupt index has; absent: none."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def reset(self) -> None:
        """Bring the state to what it is after power-on. The host has cut all tasks and timers before."""
        raise NotImplementedError

    def irq_unmasked(self, index: IrqIndex, vector: int) -> None:
        """An MSI or MSI-X vector can be delivered again: fire it if it is pending."""

    def pend_irq(self, index: IrqIndex, vector: int) -> bool:
        """Keep an MSI or MSI-X message pending, as if `Host.trigger_irq` had just refused it: the VMM from
        which the device has moved had not delivered it. False: this model keeps none pending."""
        return False

    def counters(self) -> Mapping[str, int]:
        """Figures worth showing to a person, by name."""
        return {}

    def sections(self) -> Sequence[Section]:
        """The state, in the order in which it is applied; the same names at any time."""
        return ()

    def memories(self) -> Mapping[str, StateMemory]:
        """Memory that is too large for a section, by name; the same names and sizes at any time."""
        return {}

    def restored(self) -> None:
        """All of the state has been applied, and the host has forgotten tasks and timers: derive the rest.

        Sets timers by the time that was left, starts the tasks that have work, drives the interrupt pin.
        The host is stopped; what is started runs when it resumes.
        """
