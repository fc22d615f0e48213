# SPDX-License-Identifier: BSD-3-Clause
"""From the samples of alternating rounds to one figure with its ratio. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all are not above (nearest rank). ValueError when there are none."""
    if not values:
        raise ValueError("no samples")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians of the rounds. `low` and `high` are the quartiles of the rounds' own ratios."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int
    more: float = 0.0
    """Median of the rounds' differences, ours - theirs."""


@dataclass(slots=True)
class Series:
    """What each round measured: ours and the peer's, taken close to each other in time."""

    pairs: list[tuple[float, float]] = field(default_factory=list)

    def add(self, ours: float, theirs: float) -> None:
        """Zero is no measurement: ValueError, so that a peer that failed is not a record."""
        if not (ours > 0 and theirs > 0 and math.isfinite(ours) and math.isfinite(theirs)):
            raise ValueError(f"no measurement: ours {ours}, the peer's {theirs}")
        self.pairs.append((ours, theirs))

    def figure(self) -> Figure:
        """The ratio is the median of the rounds' ratios: what slows both in one round drops out."""
        ratios = [ours / theirs for ours, theirs in self.pairs]
        return Figure(
            ours=statistics.median(ours for ours, _ in self.pairs),
            theirs=statistics.median(theirs for _, theirs in self.pairs),
            ratio=statistics.median(ratios),
            low=percentile(ratios, 25),
            high=percentile(ratios, 75),
            rounds=len(ratios),
            more=statistics.median(ours - theirs for ours, theirs in self.pairs),
        )
