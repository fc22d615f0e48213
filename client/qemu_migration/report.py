# SPDX-License-Identifier: BSD-3-Clause
"""What a migration tells while it runs (`Progress`) and at its end (`Report`)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from vfio_user.client.qemu_migration.request import Writes
from vfio_user.protocol.errors import VfioUserError

PAGE = 4096


class Step(Enum):
    """Where a migration is; the order is that of a successful one."""

    CONNECT = "connect to both QEMUs and to every device"
    CHECK = "check that the guest can be moved"
    RECEIVE = "stop the destination's devices"
    LOG = "start the dirty logs"
    MEASURE = "measure what the devices write"
    STATE = "begin to move the devices' states"
    SETTINGS = "set QEMU's capabilities and limits"
    PRECOPY = "copy memory while the guest runs"
    STOP = "stop the devices"
    HAND_OVER = "hand over logs, interrupts and states"
    LAST_PASS = "let QEMU send the last pages"
    RESTORE = "restore QEMU's view of the devices"
    START = "start the devices and the guest"
    FINISH = "announce the guest, and put the source away"
    DONE = "done"


class Where(Enum):
    """Whose fault a failure is, as far as one can tell."""

    SOURCE = "source"
    DESTINATION = "destination"
    HERE = "the migration itself"


class Outcome(Enum):
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class MoveError(VfioUserError):
    """A migration cannot go on; the text says why, `where` on which side."""

    def __init__(self, reason: str, where: Where = Where.HERE) -> None:
        super().__init__(reason)
        self.where = where


class Refused(MoveError):
    """The guest cannot be moved, or needs no help to be; nothing has been touched. `reasons` has them all."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Progress:
    """Told at every step, and several times a second while memory is copied. Bytes of guest memory by QEMU's
    count; `device_pages` are in the servers' logs, `state` bytes of the devices' states have come over."""

    step: Step
    seconds: float
    """Since the beginning."""
    sent: int = 0
    left: int = 0
    total: int = 0
    passes: int = 0
    device_pages: int = 0
    state: int = 0
    write_through: bool = False
    way_back: str = ""
    """What is being undone, or has come of it, once the move has failed."""


@dataclass(frozen=True, slots=True)
class Round:
    """One of QEMU's passes over memory. `stopped`: the guest was stopped in it, once it had run `ms_running`.
    `at` and `ms` are milliseconds, `pages` of 4 KiB (those of zeros too), `bytes` on the wire."""

    number: int
    at: float
    ms: float
    pages: int
    bytes: int
    stopped: bool = False
    ms_running: float = 0.0


@dataclass(frozen=True, slots=True)
class Downtime:
    """Milliseconds from QEMU's word that the source's CPUs stand still to that that the destination's run, by
    what they went to."""

    stop: float = 0.0
    """Until all devices stand still."""
    hand_over: float = 0.0
    """Logs, interrupts and QEMU's view of the devices, all at once (`DeviceReport`)."""
    last_pass: float = 0.0
    """QEMU sends the last pages and its own devices; the ends of our devices' states arrive."""
    restore: float = 0.0
    """QEMU's view of the devices."""
    start: float = 0.0
    """Devices and CPUs."""

    @property
    def total(self) -> float:
        return self.stop + self.hand_over + self.last_pass + self.restore + self.start


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What was done for one device. Milliseconds, from the stop for `state`; they ran side by side."""

    id: str
    model: str
    write_through: bool = False
    state_bytes: int = 0
    pages_handed_over: int = 0
    """Those that only its server knew of, however few of them were left when it began to write through."""
    message_writes: int = 0
    message_bytes: int = 0
    """What it wrote by message since memory was copied, and the bytes of that: QEMU has seen each write, and
    counts the pages among those that it sends again."""
    intx_lowered: bool = False
    stop_ms: float = 0.0
    log_ms: float = 0.0
    state_ms: float = 0.0
    intx_ms: float = 0.0
    view_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    step: Step
    where: Where
    reason: str

    def __str__(self) -> str:
        return f"while it was to {self.step.value} ({self.where.value}): {self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """The end of a migration, whatever it was. `source` and `destination` say in words what each side is at;
    `guest` is where the guest is now: "source", "destination", "nowhere" when it is lost, or "unknown" when
    nobody can say. `by_hand`: what is left to the user, in this order."""

    outcome: Outcome
    guest: str
    source: str
    destination: str
    seconds: float
    writes: Writes
    rounds: tuple[Round, ...] = ()
    downtime: Downtime = field(default_factory=Downtime)
    """Nothing of a move that failed."""
    stood_still: float = 0.0
    """Milliseconds for which the guest of a move that failed stood still before it went on at the source; 0:
    it did not stand still, or does yet."""
    qemu_downtime: float = 0.0
    """Milliseconds, by the source QEMU's own account."""
    devices: tuple[DeviceReport, ...] = ()
    ram: Mapping[str, int] = field(default_factory=dict)
    """QEMU's own figures: total, transferred, normal and zero pages, …"""
    samples: tuple[Progress, ...] = ()
    failure: Failure | None = None
    notes: tuple[str, ...] = ()
    """Mishaps that changed nothing."""
    by_hand: tuple[str, ...] = ()

    @property
    def pages(self) -> int:
        """Pages that QEMU sent, with those that were sent again."""
        return self.ram.get("normal", 0) + self.ram.get("duplicate", 0)

    @property
    def device_pages(self) -> int:
        """Pages that only the servers knew of."""
        return sum(device.pages_handed_over for device in self.devices)

    @property
    def seen_pages(self) -> int:
        """Pages that QEMU sent again as it saw them written: by the CPUs, and by devices by message. It tells
        no more; of devices `DeviceReport` has the bytes."""
        once = self.ram.get("total", 0) // (self.ram.get("page-size", 0) or PAGE)
        return max(0, self.pages - once - self.device_pages)

    @property
    def message_writes(self) -> int:
        return sum(device.message_writes for device in self.devices)

    @property
    def message_bytes(self) -> int:
        return sum(device.message_bytes for device in self.devices)

    @property
    def state_bytes(self) -> int:
        return sum(device.state_bytes for device in self.devices)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON knows it, with the sums."""
        plain: dict[str, Any] = _plain(asdict(self))
        plain["downtime"]["total"] = self.downtime.total
        return {**plain, **{name: getattr(self, name) for name in _SUMS}}


_SUMS = ("pages", "seen_pages", "device_pages", "message_writes", "message_bytes", "state_bytes")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name.lower().replace("_", "-")
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
