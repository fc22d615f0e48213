# SPDX-License-Identifier: BSD-3-Clause
"""The protocol benchmarks by name: who competes, what a round is, and how many rounds there are."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from vfio_user.benchmarks import (
    dirty_runs,
    dma_runs,
    engine_runs,
    marking_runs,
    migration_runs,
    protocol_runs,
)
from vfio_user.benchmarks.results import Results
from vfio_user.client.qemu.lab import Lab

Round = Callable[[int, Results], None]
"""Takes the number of the round."""
Opener = Callable[[Lab, Path], contextlib.AbstractContextManager[Round]]


@dataclass(frozen=True, slots=True)
class Suite:
    """`open` gives the round, ready to be run as often as wanted."""

    text: str
    rounds: int
    quick_rounds: int
    open: Opener


@contextlib.contextmanager
def _messages(
    opener: Callable[[Lab, Path], contextlib.AbstractContextManager[protocol_runs.Pair]],
    run: Callable[[protocol_runs.Pair, int, Results], None],
    lab: Lab,
    folder: Path,
) -> Iterator[Round]:
    with opener(lab, folder) as pair:
        yield partial(run, pair)


class Contest(Protocol):
    """Two servers, and what of them is compared."""

    def round(self, number: int, results: Results) -> None:
        """Measure both, and add to the results."""


@contextlib.contextmanager
def _contest(
    opener: Callable[[Lab, Path], contextlib.AbstractContextManager[Contest]], lab: Lab, folder: Path
) -> Iterator[Round]:
    with opener(lab, folder) as contest:
        yield contest.round


def _sample(run: Callable[[protocol_runs.Pair, int, Results], None]) -> Opener:
    return partial(_messages, protocol_runs.against_sample, run)


SUITES: Mapping[str, Suite] = {
    "roundtrip": Suite("round trips", 15, 5, _sample(protocol_runs.round_trip)),
    "posted": Suite("posted writes", 9, 3, _sample(protocol_runs.posted)),
    "bulk": Suite("bulk reads", 7, 3, partial(_messages, protocol_runs.against_library, protocol_runs.bulk)),
    "dma": Suite("DMA_MAP", 9, 3, partial(_contest, dma_runs.against_sample)),
    "dma15": Suite(
        "DMA_MAP at 15 regions",
        5,
        3,
        partial(_contest, partial(dma_runs.against_sample, live=dma_runs.C_LIMIT - 1)),
    ),
    "engines": Suite("both engines", 9, 3, partial(_contest, engine_runs.side_by_side)),
    "dma10k": Suite("DMA_MAP at 10,000 regions", 9, 3, partial(_contest, dma_runs.against_empty)),
    "dirty": Suite("dirty reports", 9, 3, partial(_contest, dirty_runs.against_sample)),
    "mark": Suite("marking dirty pages", 15, 5, partial(_contest, marking_runs.logged_card)),
    "state": Suite("MIG_DATA_READ", 5, 2, partial(_contest, migration_runs.against_library)),
}
