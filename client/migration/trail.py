# SPDX-License-Identifier: BSD-3-Clause
"""Where a migration is just now, so that a failure can be told with its place, and how long it takes."""

import time
from collections.abc import Callable

from vfio_user.client.migration.driver import reason
from vfio_user.client.migration.report import Failure, Progress, Step, Where

Say = Callable[[Progress], None]


class Trail:
    """The present step, side and device; `say` is told of every new step, and of the bytes in a round."""

    def __init__(self, say: Say) -> None:
        self.step = Step.CHECK
        self.where = Where.HERE
        self.device: int | None = None
        self.notes: list[str] = []
        self._say = say
        self._round = 0
        self._begun = time.perf_counter()
        self._mark = self._begun

    def begin(self, step: Step) -> None:
        """A new step. How long the last one took is in `lap`."""
        self.step = step
        self.at(Where.HERE)
        self.tell(0, 0)

    def at(self, where: Where, device: int | None = None) -> None:
        """What is done next is done there."""
        self.where, self.device = where, device

    def tell(self, sent: int, left: int, number: int | None = None) -> None:
        if number is not None:
            self._round = number
        self._say(Progress(self.step, self._round, sent, left, self.ms / 1000))

    @property
    def ms(self) -> float:
        """Since the beginning."""
        return (time.perf_counter() - self._begun) * 1000

    def lap(self) -> float:
        """Milliseconds since the last `lap`."""
        now, before = time.perf_counter(), self._mark
        self._mark = now
        return (now - before) * 1000

    def failure(self, error: BaseException) -> Failure:
        return Failure(self.step, self.where, self.device, reason(error))

    def note(self, text: str) -> None:
        """A mishap that changes nothing."""
        self.notes.append(f"{self.step.name}: {text}")
