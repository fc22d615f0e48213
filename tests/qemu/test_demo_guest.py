# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user demo` where a QEMU is found: it boots the guest too, and says what came of it."""

import re
import sys
from pathlib import Path

import pytest
import trio

from vfio_user.client.qemu.lab import Lab
from vfio_user.client.tour import WAYS

MAIN = "from vfio_user.cli.main import main; main()"

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]


async def test_all_of_the_demo(lab: Lab, tmp_path: Path) -> None:
    """The guest and its ping; the four kinds of moves, and their picture."""
    plot = tmp_path / "run.svg"
    words = [sys.executable, "-c", MAIN, "demo", "--qemu", "--frames", "50", "--plot", str(plot)]
    with trio.fail_after(500):
        done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
    output = " ".join(done.stdout.decode().split())  # lines are broken at 80 columns
    assert (done.returncode, done.stderr) == (0, b""), output
    check_moves(output)
    assert plot.read_text().startswith("<?xml")
    check_guest(output, lab)
    assert re.search(r"All well: [\d,]+ frames came exactly as they were sent, in \d+\.\d s\.", output)


def check_moves(output: str) -> None:
    told = re.findall(r"(\w to \w), (v\d to v\d): \d+ ms of downtime, [\d,]+ frames meanwhile", output)
    assert [protocols for _, protocols in told] == [" to ".join(way) for way in WAYS]
    assert [way for way, _ in told] == ["A to B", "B to A"] * 2


def check_guest(output: str, lab: Lab) -> None:
    assert f"booting, QEMU {'.'.join(map(str, lab.qemu.version))}" in output
    assert re.search(r"\| e1000 0000:\S+ eth0: .*52:54:00:12:34:56", output)
    assert "5 packets transmitted, 5 packets received, 0% packet loss" in output
    told = re.search(r"has sent (\d+) frames \(([\d,]+) bytes\) and (\d+) interrupts", output)
    assert told is not None, output
    frames, size, interrupts = (int(text.replace(",", "")) for text in told.groups())
    assert frames >= 6  # who has 10.0.2.2, and five pings
    assert 98 * 5 + 42 <= size <= 1514 * frames
    assert interrupts > 5
