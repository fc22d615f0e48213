# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user demo` as a user runs it: it succeeds, and whatever goes wrong it says so and leaves nothing."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from vfio_user.cli import demo
from vfio_user.client.drivers.e1000 import DriverCounters
from vfio_user.client.drivers.e1000_traffic import BulkReport, Measure
from vfio_user.client.drivers.e1000_trial import PINGS, Trial
from vfio_user.client.memory import DmaCounters
from vfio_user.client.qemu.lab import QemuSearch

MAIN = "from vfio_user.cli.main import main; main()"


@pytest.fixture
def running() -> Iterator[subprocess.Popen[str]]:
    """The demo, at work: its server listens and the driver is about to start."""
    words = [sys.executable, "-c", MAIN, "demo", "--no-qemu", "--frames", "1000000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        yield child
        child.kill()


def wait_for(child: subprocess.Popen[str], text: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if text in line:
            return line
    raise AssertionError(f"the demo has ended without {text!r}")


def server_pid(child: subprocess.Popen[str]) -> int:
    return int(wait_for(child, "listening").split("process ")[1].split(",")[0])


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def socket_path(pid: int) -> Path:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return Path(os.fsdecode(words[words.index(b"--socket-path") + 1]))


def cells(output: str, name: str) -> list[str]:
    """What a row of a table says, without its name."""
    line = next(line for line in output.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def numbers(output: str, name: str) -> list[float]:
    """The first number of each cell."""
    return [float(cell.split()[0].replace(",", "")) for cell in cells(output, name)]


def test_it_runs_and_says_what_ran() -> None:
    words = [sys.executable, "-c", MAIN, "demo", "--no-qemu", "--frames", "200", "--moves", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    check_trials(done.stdout)
    check_move(done.stdout)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "\x1b" not in done.stdout


def check_trials(output: str) -> None:
    frames = numbers(output, "frames received, compared")
    assert all(value > 200 + PINGS for value in frames)
    assert all(0 < value < 3 * max(frames) for value in numbers(output, "interrupts"))
    mapped, message = cells(output, "DMA through the mapping"), cells(output, "DMA by message")
    assert (mapped[1], message[0]) == ("none", "none")
    assert all(re.fullmatch(r"[\d,]{4,} \(\d+\.\d MB\)", cell) for cell in (mapped[0], message[1]))
    assert all(0 < value < 150 for value in numbers(output, "time"))


def check_move(output: str) -> None:
    assert re.search(r"A to B, v2 to v2: \d+ ms of downtime, [\d,]+ frames meanwhile", output)
    assert re.search(r"^│ A to B │ v2 to v2 │ 1 +│ 16,352 │ 63.9 │", output, re.MULTILINE)
    assert numbers(output, "pages of memory (4 KiB) equal at both sides") == [16352]
    verified = sum(numbers(output, "frames received, compared"))
    verified += numbers(output, "numbered frames out and back, in order, unchanged")[0]
    verified += numbers(output, "numbered frames that came unasked, the same")[0]
    assert f"All well: {verified:,.0f} frames came exactly as they were sent, in " in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(running: subprocess.Popen[str], number: signal.Signals) -> None:
    pid = server_pid(running)
    path = socket_path(pid)
    assert path.is_socket()
    wait_for(running, "ping:")
    running.send_signal(number)
    assert running.wait(10) == 130
    assert has_ended(pid)
    assert not path.parent.exists()


def test_a_server_that_dies_is_a_failure(running: subprocess.Popen[str]) -> None:
    pid = server_pid(running)
    wait_for(running, "ping:")
    os.kill(pid, signal.SIGKILL)
    assert "failed" in wait_for(running, "failed")
    assert running.wait(10) == 1


def test_a_server_that_dies_with_the_guest_in_it_is_a_failure() -> None:
    words = [sys.executable, "-c", MAIN, "demo", "--no-qemu", "--frames", "20", "--moves", "1000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        servers = [int(pid) for pid in re.findall(r"process (\d+)", wait_for(child, "servers A"))]
        wait_for(child, "A to B")
        os.kill(servers[1], signal.SIGKILL)
        assert "failed" in wait_for(child, "failed")
        assert child.wait(10) == 1
    assert all(has_ended(pid) for pid in servers)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="without setpriv the server has no death signal")
def test_a_demo_that_is_killed_takes_its_server_along(running: subprocess.Popen[str]) -> None:
    pid = server_pid(running)
    path, ended = socket_path(pid), os.pidfd_open(pid)
    wait_for(running, "ping:")
    running.kill()
    assert select.select([ended], [], [], 10)[0]
    os.close(ended)
    path.parent.rmdir()  # nobody was left to remove it


def test_without_a_qemu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_qemu", lambda root: QemuSearch(None, "no QEMU here; get one"))
    done = CliRunner().invoke(demo.command, ["--qemu"])
    assert done.exit_code == 2
    assert "no QEMU here" in done.output


def trial(**changes: int) -> Trial:
    server = {
        "net_sent_frames": 8,
        "net_received_frames": 8,
        "net_bad_checksums": 0,
        "irqs_intx": 3,
        "dma_message_reads": 0,
        "dma_message_writes": 0,
        "dma_errors": 0,
        "dma_mapped_writes": 20,
    }
    measure, bulk, segments = Measure(1, 1.0, 1.0), BulkReport(5, 1, 1.0), BulkReport(2, 1, 1.0)
    driver = DriverCounters(frames_sent=10, frames_received=10)
    counted = server | changes
    return Trial(True, measure, measure, bulk, segments, driver, 3, DmaCounters(), 1.0, 1.0, counted)


def test_counters_that_agree() -> None:
    assert trial().problem() == ""
    assert trial().verified == 9


@pytest.mark.parametrize("name", ["net_sent_frames", "irqs_intx", "dma_message_reads", "net_bad_checksums"])
def test_counters_that_differ_are_named(name: str) -> None:
    assert name in trial(**{name: 99}).problem()


def test_a_mapping_that_nobody_used_is_noticed() -> None:
    assert "wrong way" in trial(dma_mapped_writes=0).problem()
