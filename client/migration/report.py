# SPDX-License-Identifier: BSD-3-Clause
"""What a migration is told (`Limits`), what it tells while it runs (`Progress`) and at its end (`Report`)."""

from dataclasses import dataclass, field
from enum import Enum

from vfio_user.protocol.errors import VfioUserError


class Step(Enum):
    """Where a migration is; the order is that of a successful one."""

    CHECK = "check that both sides can migrate"
    PREPARE = "prepare the destination (RESUMING)"
    LOG = "start the dirty log"
    PRECOPY = "copy while the guest runs"
    PAUSE = "stop the guest's processors"
    QUIESCE = "stop traffic between the devices (P2P)"
    STOP = "stop the devices (STOP_COPY)"
    MEMORY = "copy the last dirty pages"
    STATE = "move the devices' state"
    VERIFY = "compare the two memories"
    LOAD = "let the destination take the state over"
    SWITCH = "move the guest's side of the devices"
    START = "start the destination"
    FINISH = "put the source away (STOP)"
    DONE = "done"


class Where(Enum):
    """Whose fault a failure is, as far as one can tell."""

    SOURCE = "source"
    DESTINATION = "destination"
    FILE = "file"
    HERE = "the migration itself"


class Outcome(Enum):
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class MigrationError(VfioUserError):
    """A migration cannot begin, or cannot go on; the text says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a migration may take. Times are in seconds; None is no limit.

    `downtime`: the guest is stopped as soon as what is left of memory fits into it, by the rate seen so far.
    `rounds`: at most so many rounds before the stop; then the guest is stopped in any case if `force`,
    else the migration gives up. `round` is how long one round may read the state of one running device,
    which may have something new for ever. `timeout` is for all of it, `recovery` for the way back after a
    failure.
    """

    downtime: float = 0.1
    rounds: int = 16
    force: bool = True
    round: float = 1.0
    timeout: float | None = None
    recovery: float = 10.0

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.downtime < 0 or self.recovery <= 0:
            raise ValueError(f"these limits cannot be met: {self}")


@dataclass(frozen=True, slots=True)
class Progress:
    """Told after each step and while a round runs: bytes are those of the round so far and to come."""

    step: Step
    round: int
    sent: int
    left: int
    seconds: float
    """Since the beginning."""


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the dirty pages: `pages` of 4 KiB and `bytes` of memory, and `state` bytes of the
    devices. `at` and `ms` are milliseconds: its begin since that of the migration, and how long it took."""

    number: int
    pages: int
    bytes: int
    state: int
    at: float
    ms: float
    stopped: bool = False
    """The guest stood still: the last round."""


@dataclass(frozen=True, slots=True)
class Downtime:
    """Milliseconds that the guest stood still, by what they went to."""

    pause: float = 0.0
    """Waiting for accesses under way."""
    stop: float = 0.0
    """Stopping the devices."""
    memory: float = 0.0
    """The last round."""
    state: float = 0.0
    """Reading the state at the source and writing it at the destination."""
    load: float = 0.0
    """Checking and applying it there."""
    start: float = 0.0
    """Interrupts, network and the devices' start."""

    @property
    def total(self) -> float:
        return self.pause + self.stop + self.memory + self.state + self.load + self.start


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong: at which step, on which side, with which device (None: not one of them)."""

    step: Step
    where: Where
    device: int | None
    reason: str

    def __str__(self) -> str:
        device = "" if self.device is None else f", device {self.device}"
        return f"at {self.step.name} ({self.where.value}{device}): {self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """The end of a migration, whatever it was.

    `source_runs`: the guest runs on at the source, on all of its devices; when it does not, and should,
    `source_reason` says why. `notes` are mishaps that changed nothing. `state` is the number of bytes of
    each device's state.
    """

    outcome: Outcome
    rounds: tuple[Round, ...] = ()
    downtime: Downtime = field(default_factory=Downtime)
    state: tuple[int, ...] = ()
    failure: Failure | None = None
    source_runs: bool = False
    source_reason: str = ""
    notes: tuple[str, ...] = ()
    ms: float = 0.0
    verified_pages: int = 0
    """Pages that were compared at both sides and were equal."""
    verify_ms: float = 0.0
    """How long that took; not a part of `downtime`."""

    def check(self) -> "Report":
        """This report, if the migration was completed. MigrationError with the reason otherwise."""
        if self.outcome is not Outcome.COMPLETED:
            raise MigrationError(str(self))
        return self

    @property
    def pages(self) -> int:
        """Pages sent, with those that were sent again."""
        return sum(one.pages for one in self.rounds)

    @property
    def bytes(self) -> int:
        """Bytes of memory and state that were sent."""
        return sum(one.bytes + one.state for one in self.rounds)

    def __str__(self) -> str:
        text = f"migration {self.outcome.value}"
        if self.failure is not None:
            text += f" {self.failure}"
        if self.source_reason:
            text += f"; the source does not run: {self.source_reason}"
        return text
