# SPDX-License-Identifier: BSD-3-Clause
"""What a tour (`vfio_user.client.tour`) was like: moves, frames, and whether all figures agree."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from vfio_user.client.drivers.e1000 import DriverCounters
from vfio_user.client.drivers.e1000_traffic import BulkReport
from vfio_user.client.migration.report import Report

BUCKET = 0.01
"""Seconds: the resolution of the rate of frames."""
_NEVER = ("net_sent_dropped", "net_sent_malformed", "net_received_dropped")
_NEVER_BY_CARD = ("received_dropped", "received_missed", "transmitted_malformed", "dma_errors")


@dataclass(frozen=True, slots=True)
class Move:
    """One move. Times are in seconds since the begin of the tour; `paused`: the guest was stopped.

    `frames` were verified meanwhile; `held` were on their way to the card when it was stopped, and were
    given to it at the destination.
    """

    source: str
    destination: str
    protocols: tuple[str, str]
    report: Report
    begun: float
    paused: float
    ended: float
    frames: int
    held: int

    @property
    def still(self) -> float:
        """Milliseconds that the guest stood still: the downtime, and the comparison of the memories."""
        return self.report.downtime.total + self.report.verify_ms


@dataclass(frozen=True, slots=True)
class TourReport:
    """`counted` is the sum of what each server has counted while the guest was with it; `card` is what the
    card itself says in the end, which is a part of its state. `switched` are the frames that came to the
    switch, `beacons` those that it sent unasked, and `rates` those that came back and were verified in each
    `BUCKET` since the begin."""

    moves: tuple[Move, ...]
    traffic: BulkReport
    beacons: int
    driver: DriverCounters
    counted: Mapping[str, int]
    card: Mapping[str, int]
    switched: int
    rates: tuple[int, ...]
    silence: float
    """The longest time between two frames, in milliseconds."""

    def problem(self) -> str:
        """What does not agree; empty when everything does."""
        sent, received = self.driver.frames_sent, self.driver.frames_received
        expected = {"net_sent_frames": sent, "net_received_frames": received} | dict.fromkeys(_NEVER, 0)
        wrong = [
            f"{name} {self.counted[name]}, not {n}" for name, n in expected.items() if self.counted[name] != n
        ]
        wrong += [f"{name} {self.card[name]}, not 0" for name in _NEVER_BY_CARD if self.card[name]]
        if self.switched != sent:
            wrong.append(f"{self.switched} frames at the switch, not {sent}")
        return f"over all moves: {', '.join(wrong)}" if wrong else ""


class Meter:
    """When frames came."""

    def __init__(self) -> None:
        self.frames = 0
        self.rates: list[int] = []
        self.silence = 0.0
        """The longest time between two, in seconds."""
        self._begun = self._last = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since the begin."""
        return time.perf_counter() - self._begun

    def take(self, done: int) -> None:
        """Another one has come, and `done` in all."""
        now = time.perf_counter()
        if done > 1:
            self.silence = max(self.silence, now - self._last)
        self._last, self.frames = now, done
        bucket = int((now - self._begun) / BUCKET)
        self.rates += [0] * (bucket + 1 - len(self.rates))
        self.rates[bucket] += 1
