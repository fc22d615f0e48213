# SPDX-License-Identifier: BSD-3-Clause
"""Hand-over or write-through: what each page in a log will cost while the guest stands still. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfio_user.client.qemu_migration.answers import pick, whole
from vfio_user.client.qemu_migration.request import Writes

BUDGET_MS = 10.0
"""Downtime that the hand-over of all devices may take; half of what a move may cost beside QEMU's own."""
PAGE_MS = 0.06
"""A page's hand-over, and its way to the other side once more."""
LOOKS = 4
LOOK_SECONDS = 0.1
"""How often, and how far apart, the logs are looked at before anything is decided."""
_HORIZON = (1.0, 30.0)  # seconds


@dataclass(frozen=True, slots=True)
class Written:
    """What a device has written by message since its server started."""

    writes: int = 0
    bytes: int = 0


def written(state: Mapping[str, Any]) -> Written:
    """By a server's `state`; one that has made no such write may not count them. ValueError."""
    counters = pick(state, "counters")
    names = ("dma_message_writes", "dma_message_write_bytes")
    return Written(*(whole(counters, name) if name in counters else 0 for name in names))


@dataclass(slots=True)
class Growth:
    """Pages in a log, by time in seconds: a log that only grows."""

    points: list[tuple[float, int]] = field(default_factory=list)

    def add(self, at: float, pages: int) -> None:
        self.points.append((at, pages))

    @property
    def pages(self) -> int:
        return self.points[-1][1] if self.points else 0

    @property
    def rate(self) -> float:
        """Pages a second that were new, over the later half: the first ones of a device that uses the same
        memory again and again say nothing."""
        if len(self.points) < 2:
            return 0.0
        (begin, before), (end, after) = self.points[(len(self.points) - 1) // 2], self.points[-1]
        return (after - before) / (end - begin) if end > begin else 0.0


def horizon(memory: int, bandwidth: int) -> float:
    """Seconds that QEMU's copying will take at least, by what it may send a second (0: no limit)."""
    least, most = _HORIZON
    return min(max(memory / (bandwidth or 1 << 30), least), most)


def hand_over_ms(pages: int) -> float:
    return pages * PAGE_MS


def choose(writes: Writes, growths: Sequence[Growth], seconds: float) -> Writes:
    """Before the first pass: with what will be in the logs after so many seconds."""
    if writes is not Writes.AUTO:
        return writes
    expected = sum(int(one.pages + one.rate * seconds) for one in growths)
    return Writes.WRITE_THROUGH if hand_over_ms(expected) > BUDGET_MS else Writes.HAND_OVER


def too_many(pages: int) -> bool:
    """While memory is copied: from now on writing through is cheaper than what is to come."""
    return hand_over_ms(pages) > BUDGET_MS
