# SPDX-License-Identifier: BSD-3-Clause
"""The results as one table, and as JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from vfio_user.benchmarks.marks import MEASURES, Measure
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.statistics import Figure

TABLE_WIDTH = 110
"""Columns; a report in a file or a pipe has them too."""

_STYLES = {"moonshot": "bold green", "met": "green", "missed": "red", "": ""}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _row(measure: Measure, figure: Figure) -> tuple[str, ...]:
    verdict = measure.verdict(figure.ratio, figure.more)
    style = _STYLES[verdict]
    return (
        f"{measure.text} [{measure.unit}]".replace("[", "\\["),
        _number(figure.ours),
        _number(figure.theirs),
        f"[{style}]{figure.ratio:.2f}[/]" if style else f"{figure.ratio:.2f}",
        f"{figure.low:.2f}-{figure.high:.2f}",
        measure.mark_text(),
        measure.bound(measure.moonshot),
        f"[{style}]{verdict}[/]" if style else "",
    )


def table_of(figures: Mapping[str, Figure], title: str = "") -> Table:
    """One line for each figure, in the order of the marks, under a heading for each peer."""
    table = Table("measure", title=title, title_justify="left", min_width=TABLE_WIDTH)
    for name in ("ours", "peer", "ratio", "quartiles", "mark", "moonshot"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    peer = ""
    for measure in _present(figures):
        if measure.peer != peer:
            peer = measure.peer
            table.add_section()
            table.add_row(f"[bold]against {peer}[/]")
        table.add_row(*_row(measure, figures[measure.key]))
    return table


def _present(figures: Mapping[str, Figure]) -> Iterable[Measure]:
    return (measure for key, measure in MEASURES.items() if key in figures)


def payload_lines(payloads: Mapping[str, bool]) -> Iterable[str]:
    """Whether what was transferred arrived as it was sent."""
    if not payloads:
        return
    wrong = [what for what, good in payloads.items() if not good]
    yield f"payload: {len(payloads) - len(wrong)} of {len(payloads)} transfers with the right SHA-256"
    for what in wrong:
        yield f"payload DAMAGED: {what}"


def as_json(results: Results, machine: Mapping[str, Any]) -> Any:
    """What a later run can be compared with: every figure with its mark and verdict."""
    figures = results.figures()
    rows = {
        measure.key: {
            **asdict(measure),
            **asdict(figures[measure.key]),
            "verdict": measure.verdict(figures[measure.key].ratio, figures[measure.key].more),
        }
        for measure in _present(figures)
    }
    return {
        "machine": dict(machine),
        "figures": rows,
        "payloads": results.payloads,
        "left_out": results.left_out,
    }
