# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the demo's migrations: dirty pages of each round, the rate of frames, the downtime."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from vfio_user.cli.plots import COLOURS, label_above, open_figure
from vfio_user.client.migration.report import Downtime
from vfio_user.client.tour_report import BUCKET, Move, TourReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = [part.name for part in fields(Downtime)]
_RUNNING, _STOPPED, _STILL = "#4477aa", "#cc3311", "#f6d5cd"
_SMOOTH = 3  # buckets in a step of the curve
_NAMED = 6  # moves whose names have room beside each other
_ROWS = 8  # moves whose names have room below each other


def draw(report: TourReport, path: Path) -> None:
    """Write the picture of a tour, as PNG or SVG. OSError when it cannot be written."""
    with open_figure(path, "A network card under load, moved between two servers") as figure:
        pages, rate, parts = figure.subplots(3, 1, height_ratios=(3, 3, 2))
        _draw_rounds(pages, report.moves)
        _draw_rate(rate, report)
        for axes in (pages, rate):
            _mark_stills(axes, report.moves)
            axes.set_xlim(_first_frame(report), len(report.rates) * BUCKET)
            axes.set_xlabel("seconds")
        _draw_parts(parts, report.moves)


def _first_frame(report: TourReport) -> float:
    return next((place for place, count in enumerate(report.rates) if count), 0) * BUCKET


def _name(move: Move) -> str:
    return f"{move.source} to {move.destination}, {' to '.join(move.protocols)}"


def _draw_rounds(axes: "Axes", moves: Sequence[Move]) -> None:
    for stopped, colour, label in ((False, _RUNNING, "guest runs"), (True, _STOPPED, "guest stopped")):
        rounds = [
            (move.begun + one.at / 1000, one.ms / 1000, max(one.pages, 1))
            for move in moves
            for one in move.report.rounds
            if one.stopped == stopped
        ]
        lefts, widths, heights = zip(*rounds, strict=True) if rounds else ((), (), ())
        axes.bar(lefts, heights, widths, align="edge", color=colour, edgecolor=colour, label=label)
    for move in moves[: _NAMED if len(moves) <= _NAMED else 0]:
        _label_rounds(axes, move)
    axes.set_yscale("log")
    axes.set_ylim(10, 400_000)
    axes.set_ylabel("pages of 4 KiB")
    label_above(axes, "Dirty pages of each round, as wide as it lasted")


def _label_rounds(axes: "Axes", move: Move) -> None:
    """The name of the move; how many pages the first round had, and the last."""
    first, last = move.report.rounds[0], move.report.rounds[-1]
    axes.annotate(f"{_name(move)}\n{first.pages:,}", (move.begun, first.pages * 1.2), fontsize=8)
    place = (move.begun + (last.at + last.ms) / 1000, max(last.pages, 10))
    # to the right of it: the rounds before are at its left
    text, unit = f"{last.pages:,}", "offset points"
    axes.annotate(text, place, xytext=(3, 1), textcoords=unit, fontsize=8, color=_STOPPED)


def _draw_rate(axes: "Axes", report: TourReport) -> None:
    axes.set_title("Frames that came back and were compared, a second", loc="left")
    rates = [
        sum(report.rates[place : place + _SMOOTH]) / (_SMOOTH * BUCKET)
        for place in range(0, len(report.rates), _SMOOTH)
    ]
    times = [place * _SMOOTH * BUCKET for place in range(len(rates))]
    axes.fill_between(times, rates, step="post", color="#228833", alpha=0.3, linewidth=0)
    axes.step(times, rates, where="post", color="#228833", linewidth=0.8)
    axes.set_ylim(0)
    axes.set_ylabel("frames/s")


def _mark_stills(axes: "Axes", moves: Sequence[Move]) -> None:
    """A band where the guest stood still."""
    for move in moves:
        axes.axvspan(move.paused, move.paused + move.still / 1000, color=_STILL, zorder=0)


def _draw_parts(axes: "Axes", moves: Sequence[Move]) -> None:
    title = "Downtime, and its parts (the bands above include the comparison of the memories)"
    axes.set_title(title, loc="left")
    places = range(len(moves))
    begin = [0.0] * len(moves)
    for part, colour in zip(_PARTS, COLOURS, strict=True):
        widths = [getattr(move.report.downtime, part) for move in moves]
        axes.barh(places, widths, left=begin, color=colour, label=part)
        begin = [left + width for left, width in zip(begin, widths, strict=True)]
    _name_rows(axes, moves)
    for place, move in enumerate(moves[: _ROWS if len(moves) <= _ROWS else 0]):
        axes.annotate(f" {move.report.downtime.total:.0f} ms", (begin[place], place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(begin) * 1.12)
    axes.set_xlabel("milliseconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=len(_PARTS), fontsize=8)


def _name_rows(axes: "Axes", moves: Sequence[Move]) -> None:
    """Each row's move; of very many only the numbers, as many as have room."""
    if len(moves) <= _ROWS:
        axes.set_yticks(range(len(moves)), [f"{row + 1}: {_name(move)}" for row, move in enumerate(moves)])
    else:
        rows = range(0, len(moves), -(-len(moves) // _ROWS))
        axes.set_yticks(rows, [str(row + 1) for row in rows])
        axes.set_ylabel("move")
