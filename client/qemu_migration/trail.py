# SPDX-License-Identifier: BSD-3-Clause
"""Where a migration is, whom it told, and how long that took."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from vfio_user.client.control import ControlLost
from vfio_user.client.qemu_migration.capabilities import CannotRestore
from vfio_user.client.qemu_migration.monitor import MonitorError
from vfio_user.client.qemu_migration.qmp import QmpError, QmpLost
from vfio_user.client.qemu_migration.report import Failure, MoveError, Progress, Step, Where
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.json_rpc import RpcError

Tell = Callable[[Progress], None]

NONSENSE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What comes of an answer that is JSON, but has not what was asked for."""

TROUBLE = (
    *NONSENSE,
    *(QmpError, QmpLost, MonitorError, CannotRestore),
    *(ControlLost, RpcError, VfioUserError, OSError),
)
"""What can go wrong with a peer."""


class Trail:
    """The present step and the last progress; `tell` is told of each change."""

    def __init__(self, tell: Tell) -> None:
        self.step = Step.CONNECT
        self.begun: set[Step] = set()
        self.notes: list[str] = []
        self.samples: list[Progress] = []
        self._tell = tell
        self._start = time.perf_counter()
        self._last = Progress(Step.CONNECT, 0.0)

    def begin(self, step: Step) -> None:
        self.step = step
        self.begun.add(step)
        self.tell(replace(self._last, step=step))

    def lead_back(self, text: str) -> None:
        """Tells what is being undone; `step` stays where it failed, and it is no sample of the copying. Who
        is told may not keep the rest from being undone."""
        with contextlib.suppress(Exception):
            self._tell(replace(self._last, seconds=self.seconds, way_back=text))

    def has(self, step: Step) -> bool:
        """Whether this step was begun."""
        return step in self.begun

    def tell(self, progress: Progress) -> None:
        self._last = replace(progress, seconds=self.seconds)
        self.samples.append(self._last)
        self._tell(self._last)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def since_start(self, at: float) -> float:
        """Milliseconds from the start to a moment of `time.perf_counter`."""
        return (at - self._start) * 1000

    def failure(self, error: BaseException) -> Failure:
        where = error.where if isinstance(error, MoveError) else Where.HERE
        return Failure(self.step, where, reason(error))

    def note(self, text: str) -> None:
        """A mishap that changes nothing."""
        self.notes.append(f"{self.step.name}: {text}")


def reason(error: BaseException) -> str:
    """One line for people."""
    text = error.message if isinstance(error, RpcError) else str(error)
    line = " ".join(text.split()) or type(error).__name__
    if isinstance(error, NONSENSE):
        return f"the server's answer makes no sense: {type(error).__name__}: {line}"
    return line
