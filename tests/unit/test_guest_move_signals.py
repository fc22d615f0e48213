# SPDX-License-Identifier: BSD-3-Clause
"""The process of `vfio-user migrate` gets a signal while memory is copied: the source's guest goes on."""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from guest_moves.pair import Pair, opened_pair
from vfio_user.cli.migrate import SIGNALS

COMMAND = (sys.executable, "-c", "from vfio_user.cli.main import main; main()", "migrate")


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with opened_pair(tmp_path) as pair:
        pair.qemus[0].may_switch = trio.Event()
        yield pair


def words(pair: Pair, report: Path) -> list[str]:
    source, destination = pair.qemus
    here, there = (served.control_path for served in pair.servers)
    ends = ["--source-qmp", str(source.path), "--destination-qmp", str(destination.path)]
    what = ["--device", f"dev={here},{there}", "--downtime-limit", "77", "--writes", "write-through"]
    return [*COMMAND, "tcp:127.0.0.1:4444", *ends, *what, "--report", str(report)]


async def interrupted(pair: Pair, command: list[str], number: signal.Signals) -> str:
    """What it has printed; it must end with 1."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            run = partial(
                trio.run_process, command, capture_stdout=True, stderr=subprocess.STDOUT, check=False
            )
            done: list[subprocess.CompletedProcess[bytes]] = []

            async def wait(task_status: trio.TaskStatus[trio.Process]) -> None:
                done.append(await run(task_status=task_status))

            process: trio.Process = await nursery.start(wait)
            while pair.qemus[0].migration != "active":  # noqa: ASYNC110 - the fake tells nobody
                await trio.sleep(0.01)
            assert (await pair.controls[0].call("state"))["write_through"]
            process.send_signal(number)
    assert done[0].returncode == 1, done[0].stdout
    return done[0].stdout.decode()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
async def test_a_signal_gives_the_guest_back(pair: Pair, tmp_path: Path, number: signal.Signals) -> None:
    source, destination = pair.qemus
    report = tmp_path / "report.json"
    output = await interrupted(pair, words(pair, report), number)
    told = json.loads(report.read_text())
    assert (told["outcome"], told["guest"], told["failure"]["reason"]) == ("cancelled", "source", "cancelled")
    assert "the guest is given back to the source" in output, output
    assert (source.running, source.migration, source.ran) == (True, "cancelled", [])
    assert destination.ran == []
    assert not any(source.capabilities.values())
    assert source.parameters["downtime-limit"] == 300
    state = await pair.controls[0].call("state")
    assert (state["running"], state["write_through"], state["dirty_log"]["owner"]) == (True, False, None)
