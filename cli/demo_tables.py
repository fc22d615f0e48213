# SPDX-License-Identifier: BSD-3-Clause
"""The tables of the demo. 80 columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from rich.table import Table

from vfio_user.cli.tables import make_table
from vfio_user.client.drivers.e1000_trial import Trial
from vfio_user.client.memory import PAGE
from vfio_user.client.migration.report import Downtime, Round
from vfio_user.client.tour_report import Move, TourReport

# The driver


def trial_table(trials: Sequence[Trial]) -> Table:
    """A column for each run of the driver, by what was measured."""
    heads = ("", *("mapped memory" if trial.mapped else "messages only" for trial in trials))
    table = make_table("What the driver did", heads)
    for name, value in _TRIAL.items():
        table.add_row(name, *(value(trial) for trial in trials))
    return table


def _dma(trial: Trial, way: str) -> str:
    """Accesses to guest memory by the server's count: only it knows those through a mapping."""
    count, size = (
        trial.server[f"dma_{way}_read{s}"] + trial.server[f"dma_{way}_write{s}"] for s in ("s", "_bytes")
    )
    return f"{count:,} ({size / 1e6:.1f} MB)" if count else "none"


_TRIAL: Mapping[str, Callable[[Trial], str]] = {
    "connect to link up": lambda t: f"{t.link_seconds:.2f} s",
    "register read, p50": lambda t: f"{t.registers.median * 1e6:.0f} us",
    "ping, p50": lambda t: f"{t.pings.median * 1e6:.0f} us",
    "frames received, compared": lambda t: f"{t.verified:,}",
    "UDP echo, each way": lambda t: f"{t.bulk.bits_per_second / 1e6:.0f} Mbit/s",
    "interrupts": lambda t: f"{t.interrupts:,}",
    "DMA through the mapping": lambda t: _dma(t, "mapped"),
    "DMA by message": lambda t: _dma(t, "message"),
    "time": lambda t: f"{t.seconds:.2f} s",
}

# The moves


def _name(move: Move) -> tuple[str, str]:
    source, destination = move.protocols
    return f"{move.source} to {move.destination}", f"{source} to {destination}"


def rounds_table(report: TourReport) -> Table:
    """A row for each round of each move."""
    heads = ("move", "protocol", "round", "pages", "MiB", "bytes of state", "ms")
    table = make_table("Rounds: what was dirty, and was sent", heads, left=3)
    for move in report.moves:
        for one in move.report.rounds:
            name = _name(move) if one is move.report.rounds[0] else ("", "")
            table.add_row(*name, *_round(one), end_section=one.stopped)
    return table


def _round(one: Round) -> tuple[str, ...]:
    number = "stopped" if one.stopped else f"{one.number + 1}"
    return number, f"{one.pages:,}", f"{one.bytes / 2**20:.1f}", f"{one.state:,}", f"{one.ms:.0f}"


_PARTS = [part.name for part in fields(Downtime)]


def downtime_table(report: TourReport) -> Table:
    """A row for each move: milliseconds, and what they went to."""
    table = make_table(
        "Downtime in milliseconds, and its parts", ("move", "protocol", "all", *_PARTS), left=2
    )
    for move in report.moves:
        downtime = move.report.downtime
        parts = (f"{getattr(downtime, name):.1f}" for name in _PARTS)
        table.add_row(*_name(move), f"{downtime.total:.1f}", *parts)
    return table


def verified_table(report: TourReport) -> Table:
    """What was compared over all moves; there is no report of a tour on which something was wrong."""
    table = make_table("What was verified over all moves", ("", ""))
    table.show_header = False
    for name, value in _VERIFIED.items():
        table.add_row(name, value(report))
    return table


def _sum(report: TourReport, name: str) -> int:
    return sum(getattr(move, name) for move in report.moves)


_VERIFIED: Mapping[str, Callable[[TourReport], str]] = {
    "numbered frames out and back, in order, unchanged": lambda r: f"{r.traffic.frames:,}",
    "numbered frames that came unasked, the same": lambda r: f"{r.beacons:,}",
    "of the first kind, while a move was under way": lambda r: f"{_sum(r, 'frames'):,}",
    "on the wire to a stopped card, came at the other side": lambda r: f"{_sum(r, 'held'):,}",
    "sent: driver = card's registers = servers = switch": lambda r: f"{r.driver.frames_sent:,}",
    "received: driver = card's registers = servers": lambda r: f"{r.driver.frames_received:,}",
    f"pages of memory ({PAGE // 1024} KiB) equal at both sides": lambda r: f"{_pages(r):,}",
    "longest time without a frame (moves, comparing, load)": lambda r: f"{r.silence:.0f} ms",
}


def _pages(report: TourReport) -> int:
    return sum(move.report.verified_pages for move in report.moves)
