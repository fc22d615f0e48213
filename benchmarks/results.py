# SPDX-License-Identifier: BSD-3-Clause
"""Where the rounds put what they measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vfio_user.benchmarks.marks import MEASURES
from vfio_user.benchmarks.statistics import Figure, Series


@dataclass(slots=True)
class Results:
    """Series by the key of their measure, and what was left out with the reason."""

    series: dict[str, Series] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    payloads: dict[str, bool] = field(default_factory=dict)
    """Transfers with their content checked, by what they were."""

    def add(self, key: str, ours: float, theirs: float) -> None:
        """One round's pair. What `marks.MEASURES` does not have is left out, and costs nobody the others."""
        if key in MEASURES:
            self.series.setdefault(key, Series()).add(ours, theirs)
        elif (reason := f"{key}: there is no such measure") not in self.left_out:
            self.left_out.append(reason)

    def figures(self) -> Mapping[str, Figure]:
        return {key: series.figure() for key, series in self.series.items()}
