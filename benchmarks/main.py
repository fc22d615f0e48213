# SPDX-License-Identifier: BSD-3-Clause
"""The command line: which benchmarks, how many rounds, and the report."""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.benchmarks.report import TABLE_WIDTH, as_json, table_of
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.suites import SUITES, Suite
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError

NAMES = (*SUITES,)


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(NAMES), help="Run just this; repeatable.")
@click.option("--rounds", type=click.IntRange(1), help="Alternating rounds of each benchmark.")
@click.option("--quick", is_flag=True, help="Few rounds: a first impression.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to a file too.")
def command(names: tuple[str, ...], rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Measure our server beside its peers in alternating rounds, and print the ratios and the marks."""
    # A pipe or a file has no width: the table takes what it needs.
    console, results = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH), Results()
    lab = Lab(lab_root())
    with tempfile.TemporaryDirectory(prefix="vfio-user-bench-", dir="/tmp") as folder:
        for name in names or NAMES:
            _run(name, SUITES[name], lab, Path(folder), rounds, quick, console, results)
    figures = results.figures()
    if figures:
        console.print(table_of(figures, "ratio = ours / peer, median of alternating rounds"))
    for line in results.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    if json_path is not None:
        document = as_json(figures, machine(), results.left_out)
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(0 if figures else 1)


def _run(
    name: str,
    suite: Suite,
    lab: Lab,
    folder: Path,
    rounds: int | None,
    quick: bool,
    console: Console,
    results: Results,
) -> None:
    count = rounds or (suite.quick_rounds if quick else suite.rounds)
    try:
        with suite.open(lab, folder) as one_round, Progress(console=console, transient=True) as progress:
            for number in progress.track(range(count), description=suite.text):
                one_round(number, results)
    except (BenchmarkError, LabError) as error:
        results.left_out.append(f"{name}: {error}")


def machine() -> Mapping[str, Any]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
