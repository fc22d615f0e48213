# SPDX-License-Identifier: BSD-3-Clause
"""The command line: which benchmarks, how many rounds, and the report."""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from vfio_user.benchmarks import protocol_runs
from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.benchmarks.report import TABLE_WIDTH, as_json, table_of
from vfio_user.benchmarks.results import Results
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError


@dataclass(frozen=True, slots=True)
class Bench:
    """`run` takes (pair, number of the round, results)."""

    rounds: int
    quick_rounds: int
    run: Callable[[protocol_runs.Pair, int, Results], None]


PROTOCOL: Mapping[str, Bench] = {
    "roundtrip": Bench(15, 5, protocol_runs.round_trip),
}
NAMES = (*PROTOCOL,)


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(NAMES), help="Run just this; repeatable.")
@click.option("--rounds", type=click.IntRange(1), help="Alternating rounds of each benchmark.")
@click.option("--quick", is_flag=True, help="Few rounds: a first impression.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to a file too.")
def command(names: tuple[str, ...], rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Measure our server beside its peers in alternating rounds, and print the ratios and the marks."""
    # A pipe or a file has no width: the table takes what it needs.
    console, results = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH), Results()
    chosen = names or NAMES
    lab = Lab(lab_root())
    with tempfile.TemporaryDirectory(prefix="vfio-user-bench-", dir="/tmp") as folder:
        protocol = {name: bench for name, bench in PROTOCOL.items() if name in chosen}
        try:
            _run_protocol(protocol, lab, Path(folder), rounds, quick, console, results)
        except (BenchmarkError, LabError) as error:
            results.left_out.append(f"{', '.join(protocol)}: {error}")
    figures = results.figures()
    if figures:
        console.print(table_of(figures, "ratio = ours / peer, median of alternating rounds"))
    for line in results.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    if json_path is not None:
        document = as_json(figures, machine(), results.left_out)
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(0 if figures else 1)


def _run_protocol(
    benches: Mapping[str, Bench],
    lab: Lab,
    folder: Path,
    rounds: int | None,
    quick: bool,
    console: Console,
    results: Results,
) -> None:
    with protocol_runs.open_pair(lab, folder) as pair, Progress(console=console, transient=True) as progress:
        for name, bench in benches.items():
            count = rounds or (bench.quick_rounds if quick else bench.rounds)
            for number in progress.track(range(count), description=name):
                bench.run(pair, number, results)


def machine() -> Mapping[str, Any]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
