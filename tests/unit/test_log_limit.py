# SPDX-License-Identifier: BSD-3-Clause
"""Nobody fills the disk with log messages."""

import logging

from vfio_user.cli.log_limit import BURST, INTERVAL, LogLimit


class Bed:
    """A limit with a clock by hand, and what got through."""

    def __init__(self) -> None:
        self.now = 0.0
        self.limit = LogLimit(lambda: self.now)

    def log(self, level: int = logging.WARNING) -> str | None:
        record = logging.LogRecord("name", level, __file__, 1, "client %d dropped", (7,), None)
        return record.getMessage() if self.limit.filter(record) else None


def test_a_flood_is_cut_and_counted() -> None:
    bed = Bed()
    assert [bed.log() for _ in range(BURST)] == ["client 7 dropped"] * BURST
    assert [bed.log() for _ in range(1000)] == [None] * 1000
    bed.now = INTERVAL
    assert bed.log() == "client 7 dropped (1000 messages before it were left out)"
    assert bed.log() is None


def test_a_rest_gives_the_whole_burst_again_and_no_more() -> None:
    bed = Bed()
    for _ in range(2 * BURST):
        bed.log()
    bed.now = 1000 * INTERVAL
    assert sum(bed.log() is not None for _ in range(2 * BURST)) == BURST


def test_what_an_operator_asked_for_comes_whole() -> None:
    bed = Bed()
    assert all(bed.log(logging.INFO) for _ in range(2 * BURST))
