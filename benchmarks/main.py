# SPDX-License-Identifier: BSD-3-Clause
"""The command line: which benchmarks, how many rounds, and the report."""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import trio
from rich.console import Console
from rich.progress import Progress

from vfio_user.benchmarks.downtime_runs import MOVE_SUITES, open_guests
from vfio_user.benchmarks.guest_bed import open_bed
from vfio_user.benchmarks.guest_runs import GUEST_SUITES
from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.benchmarks.report import TABLE_WIDTH, as_json, payload_lines, table_of
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.suites import SUITES
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import MachineError
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError

NAMES = (*SUITES, *GUEST_SUITES, *MOVE_SUITES)
FAILURES = (BenchmarkError, LabError, MachineError, OSError, ValueError)


class Rounds(Protocol):
    """What suites of both kinds have."""

    @property
    def text(self) -> str: ...
    @property
    def rounds(self) -> int: ...
    @property
    def quick_rounds(self) -> int: ...


@dataclass(slots=True)
class Run:
    """One run of the command: what was asked for, and where its results go."""

    lab: Lab
    folder: Path
    rounds: int | None
    quick: bool
    progress: Progress
    results: Results

    def numbers(self, suite: Rounds) -> Iterable[int]:
        """The rounds of a suite, shown as they go."""
        count = self.rounds or (suite.quick_rounds if self.quick else suite.rounds)
        if not self.progress.console.is_terminal:
            self.progress.console.print(f"{suite.text}: {count} rounds", highlight=False)
            return range(count)
        return self.progress.track(range(count), description=suite.text)

    def protocol(self, names: Iterable[str]) -> None:
        for name in names:
            suite = SUITES[name]
            try:
                with suite.open(self.lab, self.folder) as one_round:
                    for number in self.numbers(suite):
                        one_round(number, self.results)
            except FAILURES as error:
                self.results.left_out.append(f"{name}: {error}")

    async def guest(self, names: Iterable[str]) -> None:
        waiting = list(names)
        try:
            async with open_bed(self.lab, self.folder) as bed:
                while waiting:
                    suite = GUEST_SUITES[waiting[0]]
                    for number in self.numbers(suite):
                        await suite.run(bed, number, self.results)
                    waiting.pop(0)
        except FAILURES as error:
            self.results.left_out.append(f"{', '.join(waiting)}: {error}")

    async def moves(self, names: Iterable[str]) -> None:
        for name in names:
            suite = MOVE_SUITES[name]
            try:
                async with open_guests(self.lab) as guests:
                    for number in self.numbers(suite):
                        await suite.run(guests, number, self.results)
            except* FAILURES as group:
                self.results.left_out.append(f"{name}: {group.exceptions[0]}")


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(NAMES), help="Run just this; repeatable.")
@click.option("--rounds", type=click.IntRange(1), help="Alternating rounds of each benchmark.")
@click.option("--quick", is_flag=True, help="Few rounds: a first impression.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to a file too.")
def command(names: tuple[str, ...], rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Measure our server beside its peers in alternating rounds, and print the ratios and the marks.

    Protocol benchmarks need the lab's libvfio-user and two CPUs; those in the guest need its QEMU and root.
    What cannot be run is left out, and the last lines say why. Exit status 1 when nothing could be measured
    or a payload arrived damaged.
    """
    # A pipe or a file has no width: the table takes what it needs.
    console, results = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH), Results()
    chosen, begun = names or NAMES, time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="vfio-user-bench-", dir="/tmp") as folder,
        Progress(console=console, transient=True) as progress,
    ):
        run = Run(Lab(lab_root()), Path(folder), rounds, quick, progress, results)
        run.protocol(name for name in chosen if name in SUITES)
        if guests := [name for name in chosen if name in GUEST_SUITES]:
            trio.run(run.guest, guests)
        if moves := [name for name in chosen if name in MOVE_SUITES]:
            trio.run(run.moves, moves)
    show(results, console, time.monotonic() - begun)
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(results, machine()), indent=2) + "\n")
    sys.exit(0 if results.series and all(results.payloads.values()) else 1)


def show(results: Results, console: Console, seconds: float) -> None:
    """The table, the payloads, and what was left out."""
    if results.series:
        title = f"ratio = ours / peer, median of alternating rounds; {seconds:.0f} s"
        console.print(table_of(results.figures(), title))
    for line in payload_lines(results.payloads):
        console.print(line, markup=False, highlight=False)
    for line in results.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)


def machine() -> Mapping[str, Any]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
