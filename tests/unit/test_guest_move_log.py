# SPDX-License-Identifier: BSD-3-Clause
"""What tests of moves make of a guest's log: which frames that hung are a move's fault."""

import pytest

from guest_moves.nic import complaints

MOVES = """\
[   99.000000] e1000 0000:00:04.0 eth0: NIC Link is Up 1000 Mbps Full Duplex
[  101.500000] vfio-user: moved; it stood still 1.500 s ago
[  121.000000] vfio-user: moved; it stood still 1.000 s ago
"""


def hang(told: float, age: int) -> str:
    """As the driver tells it; `age` in jiffies."""
    lines = ["Detected Tx Unit Hang", "  Tx Queue             <0>", "  TDH                  <5>"]
    lines += ["buffer_info[next_to_clean]", f"  time_stamp           <{0xFFFB6C2A:x}>"]
    lines += ["  next_to_watch        <6>", f"  jiffies              <{0xFFFB6C2A + age:x}>"]
    lines[0] = f"e1000 0000:00:04.0 eth0: {lines[0]}"
    return "".join(f"[{told:12.6f}] {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("told", "age", "counts"),
    [
        (101.0, 300, True),  # sent before the standstill at 100
        (103.0, 270, True),  # sent after it
        (106.0, 1700, True),  # it was told late
        (99.9, 500, False),  # told before
        (110.0, 300, False),  # sent long after
        (123.2, 300, True),  # after the second one
    ],
)
def test_a_hang_counts_in_a_move(told: float, age: int, counts: bool) -> None:
    assert len(complaints(MOVES + hang(told, age))) == counts


def test_a_line_that_nobody_serves_is_a_complaint() -> None:
    assert complaints(MOVES) == []
    assert len(complaints(MOVES + '[ 1.0] irq 22: nobody cared (try booting with the "irqpoll" option)')) == 1
