# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user migrate`: its words, its files and its exit status."""

import json
from collections.abc import AsyncIterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import trio
from rich.console import Console

from guest_moves.fake_qemu import FakeQemu, fake_pair
from migration.control_bed import SMALL_RAM, opened
from vfio_user.cli.main import main
from vfio_user.cli.migrate import Display
from vfio_user.cli.migrate_tables import story, tables
from vfio_user.client.qemu_migration.report import (
    DeviceReport,
    Downtime,
    Outcome,
    Progress,
    Report,
    Round,
    Step,
)
from vfio_user.client.qemu_migration.request import Writes


def run(words: list[str]) -> tuple[object, str, str]:
    """Exit status, standard output and error."""
    output, errors = StringIO(), StringIO()
    with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main.main(["migrate", *words], prog_name="vfio-user")
    return ended.value.code or 0, output.getvalue(), errors.getvalue()


def no_signals(*_: object) -> nullcontext[None]:
    """Signals are the main thread's, and the command runs in another one here."""
    return nullcontext()


class Bed:
    def __init__(self, folder: Path, source: FakeQemu, destination: FakeQemu) -> None:
        self.folder, self.source, self.destination = folder, source, destination
        self.words = [
            "tcp:127.0.0.1:4444",
            *("--source-qmp", str(source.path), "--destination-qmp", str(destination.path)),
            *("--device", f"dev={folder / 'a.control'},{folder / 'b.control'}", "--writes", "hand-over"),
        ]

    async def run(self, *more: str) -> tuple[object, str, str]:
        """In a thread, for it has an event loop of its own."""
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(run, [*self.words, *more])


@pytest.fixture
async def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bed]:
    monkeypatch.setattr("vfio_user.cli.migrate._signals_cancel", no_signals)
    monkeypatch.setenv("COLUMNS", "100")
    async with (
        opened(tmp_path, name="a", options=SMALL_RAM) as (_, _, vmm),
        opened(tmp_path, name="b", options=SMALL_RAM) as (_, _, other),
        fake_pair(tmp_path, {"dev": vmm}, {"dev": other}) as pair,
    ):
        yield Bed(tmp_path, *pair)


async def test_a_move_with_a_report_and_a_picture(bed: Bed) -> None:
    report, plot = bed.folder / "report.json", bed.folder / "plot.svg"
    status, output, errors = await bed.run("--report", str(report), "--plot", str(plot))
    assert (status, errors) == (0, ""), (output, errors)
    assert "copy memory while the guest runs" in output
    assert "Downtime in milliseconds" in output
    assert "destination: its guest runs; dev runs" in output
    assert "never continue it" in output
    written = json.loads(report.read_text())
    assert (written["outcome"], written["guest"], written["writes"]) == (
        "completed",
        "destination",
        "hand-over",
    )
    assert written["downtime"]["total"] > 0
    assert written["devices"][0]["id"] == "dev"
    assert plot.read_text().startswith("<?xml")


async def test_a_move_that_fails_says_who_has_the_guest(bed: Bed) -> None:
    report = bed.folder / "report.json"
    bed.source.hooks["finish"] = lambda qemu: qemu.fail("failed")
    status, output, errors = await bed.run("--report", str(report))
    assert (status, errors) == (1, "")
    assert "the migration was given up while it was to let QEMU send the last pages" in output
    assert "source: its guest runs; dev runs" in output
    written = json.loads(report.read_text())
    assert written["failure"]["where"] == "source"
    assert f"stood still for {written['stood_still']:,.1f} ms before it went on at the source" in output
    assert "Downtime" not in output


async def test_a_move_that_cannot_be_is_a_line_for_each_reason(bed: Bed) -> None:
    bed.source.capabilities |= {"postcopy-ram": True, "x-colo": True}
    status, _, errors = await bed.run()
    assert status == 2
    assert [line.partition(" the capability ")[0] for line in errors.splitlines()] == ["vfio-user:"] * 2
    assert "postcopy-ram is on at the source" in errors
    assert "migrate" not in bed.source.commands


HERE = ["--source-qmp", "/a", "--destination-qmp", "/b", "--device", "x=/c,/d"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "Missing"),
        (["tcp:h:1"], "Missing option"),
        (["h:1", *HERE[:4]], "--device"),
        (["tcp:h:1", *HERE[:5], "x"], "'x' is not ID="),
        (["tcp:h:1", *HERE, *HERE[4:]], "named twice"),
        (["nonsense", *HERE], "none that does"),
        (["file:/x", *HERE], "does not do"),
        (["exec:cat", *HERE], "one command cannot be both ends"),
        (["tcp:h:65536", *HERE], "1 to 65535"),
        *(
            (["tcp:h:1", *HERE, "--timeout", words], "timeout")
            for words in ("0", "-1", "nan", "inf", "-inf", "x")
        ),
        *(
            (["tcp:h:1", *HERE, "--downtime-limit", words], "--downtime-limit")
            for words in ("soon", "0", "-1", "2000001", "nan", "0.5")
        ),
        (["tcp:h:1", *HERE[2:], "--source-qmp", ""], "the QMP address ''"),
        (["tcp:h:1", *HERE[2:], "--source-qmp", "h:65536"], "a port from 1 to 65535"),
        (["tcp:h:1", *HERE[2:], "--source-qmp", "h:0"], "a port from 1 to 65535"),
        (["tcp:h:1", *HERE[2:], "--source-qmp", ":4444"], "needs a host"),
        (["tcp:h:1", *HERE[2:], "--source-qmp", "/tmp/../b"], "the same QEMU"),
        (["tcp:h:1", *HERE, "--report", "/tmp/x.svg", "--plot", "/tmp/./x.svg"], "the same file"),
        (["tcp:h:1", *HERE, "--writes", "never"], "--writes"),
        (["tcp:h:1", *HERE, "--plot", "/tmp/x.pdf"], ".png or .svg"),
        (["tcp:h:1", *HERE, "--report", "/nowhere/x"], "a folder that is there"),
        (["tcp:h:1", *HERE], "the source's QEMU: /a cannot be connected to"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_user.cli.migrate._signals_cancel", no_signals)
    status, _, errors = run(words)
    assert (status, errors.count("\n")) == (2, 1)
    assert complaint in errors


REPORT = Report(
    Outcome.COMPLETED,
    "destination",
    "its guest has been moved away",
    "its guest runs",
    2.5,
    Writes.WRITE_THROUGH,
    rounds=(Round(1, 900, 900, 65_000, 90 << 20), Round(2, 1800, 240, 300, 1 << 20, True, 210)),
    downtime=Downtime(3, 8, 9, 6, 4),
    qemu_downtime=21,
    devices=(
        DeviceReport("nic0", "e1000", True, 98_304, 169, 1_234_567, 98 << 30, True, 1.5, 2.5, 7.5, 3.5, 4.5),
        DeviceReport("nic1", "e1000", False, 4096, 321),
    ),
    ram={"normal": 60_000, "duplicate": 5_300, "transferred": 95 << 20, "total": 60_000 << 12},
)


def shown(report: Report) -> str:
    console = Console(file=StringIO(), width=80)
    for table in tables(report):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def cells(text: str, words: str) -> list[str]:
    """The row that begins so."""
    row = next(line for line in text.splitlines() if line.strip("│ ").startswith(words))
    return row.strip("│ ").removeprefix(words).replace("│", " ").split()


def test_the_tables_fit_80_columns() -> None:
    text = shown(REPORT)
    assert "…" not in text
    for words in ("65,000", "30.0", "65,300"):
        assert words in text, words


def test_a_pass_in_which_the_guest_stops_has_the_time_before_and_after() -> None:
    """It begins while the guest runs: all of it beside the downtime would be another figure for that."""
    text = shown(REPORT)
    assert cells(text, "pass 1") == ["65,000", "90.0", "MiB", "900"]
    assert cells(text, "pass 2") == ["300", "1.0", "MiB", "210"]
    assert cells(text, "and with the guest stopped") == ["30"]


def test_what_was_written_is_told_by_who_wrote_it() -> None:
    """Of 5,300 pages that were sent again, 490 were handed over; a count of messages is none of pages."""
    text = shown(REPORT)
    assert cells(text, "again, written by CPUs, and devices by message") == ["4,810"]
    assert cells(text, "again, handed over by devices") == ["490"]
    assert cells(text, "nic0") == ["169", "1,234,567", "100,352.0", "MiB", "96.0", "KiB"]
    assert cells(text, "nic1") == ["321", "0", "0", "B", "4.0", "KiB"]
    written = REPORT.to_json()
    assert (written["seen_pages"], written["device_pages"]) == (4810, 490)
    assert (written["message_writes"], written["message_bytes"]) == (1_234_567, 98 << 30)
    alone = replace(REPORT, devices=REPORT.devices[1:])
    assert cells(shown(alone), "again, written by CPUs") == ["4,979"]


def test_what_is_shown_while_it_runs() -> None:
    console = Console(file=StringIO(), width=100)
    looks = Progress(Step.PRECOPY, 1.0, 5 << 20, 3 << 20, 8 << 20, 2, device_pages=1500)
    with Display(console) as display:
        for step in Step:
            display.tell(replace(looks, step=step))
        display.tell(replace(looks, seconds=12.5, way_back="forget the dirty logs"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [step.value in text for step in (Step.PRECOPY, Step.STOP, Step.DONE)] == [True, False, True]
    assert "   12.50 s  way back: forget the dirty logs\n" in text
    assert story(looks) == "pass 2: 3 of 8 MiB left, 5 MiB sent; device: 1,500 pages in the log"
    late = story(replace(looks, write_through=True))
    assert late.endswith("device: writes through, 1,500 pages in the log")
    assert story(replace(looks, write_through=True, device_pages=0)).endswith("device: writes through")
