# SPDX-License-Identifier: BSD-3-Clause
"""What the demo shows of its migrations: tables, the picture, and what is said when there can be none."""

import itertools
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from rich.table import Table

from vfio_user.cli.demo_plot import draw
from vfio_user.cli.demo_tables import downtime_table, rounds_table, verified_table
from vfio_user.cli.main import main
from vfio_user.cli.plots import PlotError, check_plot
from vfio_user.client.drivers.e1000 import DriverCounters
from vfio_user.client.drivers.e1000_traffic import BulkReport
from vfio_user.client.migration.report import Downtime, Outcome, Report, Round
from vfio_user.client.tour_report import BUCKET, Meter, Move, TourReport

ROUNDS = (Round(0, 16_352, 16_352 << 12, 20, 10, 500), Round(1, 700, 700 << 12, 5000, 520, 30, True))
MIGRATION = Report(
    Outcome.COMPLETED, ROUNDS, Downtime(1, 2, 30, 4, 5, 6), (5020,), verified_pages=16_352, verify_ms=70
)
COUNTED = {
    "net_sent_frames": 100,
    "net_received_frames": 140,
    "net_sent_dropped": 0,
    "net_sent_malformed": 0,
    "net_received_dropped": 0,
}
CARD = {"received_dropped": 0, "received_missed": 0, "transmitted_malformed": 0, "dma_errors": 0}
MOVES = (
    Move("A", "B", ("v2", "v1"), MIGRATION, 0.2, 0.7, 0.9, 60, 3),
    Move("B", "A", ("v1", "v2"), MIGRATION, 1.1, 1.6, 1.8, 30, 0),
)
REPORT = TourReport(
    moves=MOVES,
    traffic=BulkReport(99, 50_000, 2.0),
    beacons=40,
    driver=DriverCounters(frames_sent=100, frames_received=140),
    counted=COUNTED,
    card=CARD,
    switched=100,
    rates=(0, 0, *[5] * 180),
    silence=118.0,
)


def shown(table: Table) -> list[str]:
    console = Console(width=80, file=StringIO(), record=True)
    console.print(table)
    return console.export_text().splitlines()


def test_figures_that_agree() -> None:
    assert REPORT.problem() == ""


@pytest.mark.parametrize("name", list(COUNTED))
def test_figures_of_servers_that_differ_are_named(name: str) -> None:
    wrong = replace(REPORT, counted=COUNTED | {name: COUNTED[name] + 1})
    assert f"{name} {COUNTED[name] + 1}, not {COUNTED[name]}" in wrong.problem()


@pytest.mark.parametrize("name", list(CARD))
def test_what_the_card_itself_has_lost_is_named(name: str) -> None:
    assert f"{name} 2, not 0" in replace(REPORT, card=CARD | {name: 2}).problem()


def test_frames_that_are_missing_at_the_switch() -> None:
    assert "99 frames at the switch, not 100" in replace(REPORT, switched=99).problem()


def test_standing_still_is_downtime_and_comparing() -> None:
    assert MOVES[0].still == 48 + 70


def test_rounds() -> None:
    lines = shown(rounds_table(REPORT))
    assert sum("16,352" in line for line in lines) == 2
    assert [line.split("│")[1].strip() for line in lines if "16,352" in line] == ["A to B", "B to A"]
    assert sum("stopped" in line and " 5,000 " in line for line in lines) == 2
    assert all(len(line) <= 80 for line in lines)


def test_downtime() -> None:
    lines = shown(downtime_table(REPORT))
    row = next(line for line in lines if "A to B" in line)
    assert [cell.strip() for cell in row.split("│")[3:-1]] == [
        "48.0",
        "1.0",
        "2.0",
        "30.0",
        "4.0",
        "5.0",
        "6.0",
    ]


def test_verified() -> None:
    text = "\n".join(shown(verified_table(REPORT)))
    for figure in (" 99 ", " 40 ", " 90 ", " 3 ", " 100 ", " 140 ", " 32,704 ", " 118 ms "):
        assert figure in text


def test_the_meter_counts_by_time() -> None:
    meter = Meter()
    assert meter.silence == 0
    for done in range(1, 4):
        meter.take(done)
    assert meter.frames == sum(meter.rates) == 3
    assert len(meter.rates) >= 1
    assert 0 <= meter.silence <= meter.now < 60
    assert len(meter.rates) <= meter.now / BUCKET + 1


# The picture


def test_an_svg(tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    check_plot(path)
    draw(REPORT, path)
    text = path.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "A network card under load" in text  # glyphs are paths; the text stays as a comment
    assert "url(http" not in text
    first = path.read_bytes()
    draw(REPORT, path)
    assert path.read_bytes() == first  # no date, no random names


@pytest.mark.parametrize("moves", [1, 4, 6, 8, 9, 40])
def test_no_text_lies_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """Of so many moves side by side, each as the first one."""
    pages: list[Figure] = []
    first = REPORT.moves[0]
    later = [replace(first, begun=4.0 * n, paused=4.0 * n + 0.9, ended=4.0 * n + 1) for n in range(moves)]
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: pages.append(figure))
    draw(replace(REPORT, moves=tuple(later), rates=(40,) * moves * 400), tmp_path / "run.png")
    pages[0].draw_without_rendering()
    for axes in pages[0].axes:
        texts = [one for one in axes.get_children() if isinstance(one, Text)] + axes.get_yticklabels()
        if legend := axes.get_legend():
            texts += legend.get_texts()
        shown = [text for text in texts if text.get_text() and text.get_visible()]
        pairs = itertools.combinations(shown, 2)
        overlaps = [
            (one.get_text(), other.get_text())
            for one, other in pairs
            if one.get_window_extent().overlaps(other.get_window_extent())
        ]
        assert overlaps == []
    assert len(pages[0].axes[0].texts) == (2 * moves if moves <= 6 else 0)


def test_a_png(tmp_path: Path) -> None:
    path = tmp_path / "run.PNG"
    check_plot(path)
    draw(REPORT, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "message"), [("run.gif", ".png or .svg"), ("run", ".png or .svg"), ("no/run.svg", "folder")]
)
def test_a_file_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(PlotError, match=message):
        check_plot(tmp_path / name)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"pip install 'vfio-user\[plot\]'"):
        check_plot(tmp_path / "run.svg")


@pytest.mark.parametrize(
    "words",
    [
        ["--plot", "run.gif"],
        ["--plot", "/nowhere/run.svg"],
        ["--plot", "run.svg", "--moves", "0"],
        ["--moves", "-1"],
        ["--rate", "0"],
        ["--frames", "many"],
    ],
)
def test_wrong_words_are_one_line_and_status_2(words: list[str]) -> None:
    done = CliRunner().invoke(main, ["demo", *words])
    assert done.exit_code == 2
    assert len(done.output.splitlines()) == 1
    assert done.output.startswith("vfio-user: ")
