# SPDX-License-Identifier: BSD-3-Clause
"""What `vfio-user migrate` prints of others' words, and the figures at the ends of its tables and curves."""

import gc
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import trio
from matplotlib.figure import Figure
from rich.console import Console

from vfio_user.cli.migrate import Display, _main, _refuse, _show
from vfio_user.cli.migrate_plot import _draw_devices, curves, draw
from vfio_user.cli.migrate_tables import devices_table, rounds_table, size
from vfio_user.client.qemu_migration.migrate import GuestMigration
from vfio_user.client.qemu_migration.qemu_side import QemuSide
from vfio_user.client.qemu_migration.qmp import open_qmp
from vfio_user.client.qemu_migration.report import (
    DeviceReport,
    Downtime,
    Failure,
    Outcome,
    Progress,
    Report,
    Round,
    Step,
    Where,
)
from vfio_user.client.qemu_migration.request import DeviceRequest, Request, Writes
from vfio_user.client.qemu_migration.standing import _look_at_qemu

ODD = "/run/[vm1]/b.control [fe80::1]:4444 [/x] [bold] :smile: " + "word " * 30 + "end"
REPORT = Report(
    Outcome.FAILED,
    "source",
    f"source {ODD}",
    f"destination {ODD}",
    2.5,
    Writes.HAND_OVER,
    rounds=(Round(1, 900, 900, 65_000, 90 << 20), Round(2, 1800, 40, 0, 300, True)),
    downtime=Downtime(3, 8, 9, 6, 4),
    devices=(DeviceReport("[/x][vm1]", "e1000", state_bytes=4403),),
    ram={"normal": 60_000, "transferred": 95 << 20, "remaining": 0},
    samples=(
        Progress(Step.PRECOPY, 1.0, 50 << 20, 40 << 20, 128 << 20, 1, 0, 20),
        Progress(Step.PRECOPY, 1.7, 90 << 20, 5 << 20, 128 << 20, 1, 0, 20),
        Progress(Step.STOP, 1.8),
    ),
    failure=Failure(Step.PRECOPY, Where.SOURCE, ODD),
    notes=(f"note {ODD}",),
    by_hand=(f"`ctl {ODD}`",),
)
REQUEST = Request("/a", "/b", (DeviceRequest("x", Path("/c"), Path("/d")),), "tcp:h:1")


def printed(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_others_say_is_printed_as_it_is_and_in_one_line(terminal: bool) -> None:
    console = Console(file=StringIO(), width=80, force_terminal=terminal)
    _show(console, REPORT)
    lines = [line for line in printed(console).splitlines() if ODD in line]
    assert [line.split()[0] for line in lines] == ["note:", "the", "source:", "destination:", "by"]


def test_no_control_character_reaches_a_terminal() -> None:
    console = Console(file=StringIO(), force_terminal=True)
    Display(console).say("a\x1b]0;b\x07c\udcff")
    assert printed(console) == "a\\x1b]0;b\\x07c\\udcff\n"


def test_names_in_the_tables_are_no_markup() -> None:
    console = Console(file=StringIO(), width=120)
    console.print(devices_table(REPORT))
    assert "[/x][vm1]" in printed(console)


async def test_the_files_are_written_whatever_becomes_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def moved(_: GuestMigration) -> Report:
        return REPORT

    def broken(*_: object) -> None:
        raise RuntimeError("nothing can be shown")

    monkeypatch.setattr("vfio_user.cli.migrate.GuestMigration.run", moved)
    monkeypatch.setattr("vfio_user.cli.migrate._show", broken)
    with pytest.raises(RuntimeError):
        await _main(REQUEST, tmp_path / "nowhere" / "x.json", tmp_path / "x.svg")
    with pytest.raises(RuntimeError):
        await _main(REQUEST, tmp_path / "x.json", None)
    assert set(os.listdir(tmp_path)) == {"x.json", "x.svg"}


def test_a_line_for_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _refuse(("one\n[/x]", "two"))
    assert (ended.value.code, capsys.readouterr().err) == (2, "vfio-user: one [/x]\nvfio-user: two\n")


# Figures


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (4403, "4.3 KiB"),
        (95 << 20, "95.0 MiB"),
        (9 << 30, "9,216.0 MiB"),
    ],
)
def test_a_size_has_a_unit_that_shows_it(count: int, text: str) -> None:
    assert size(count) == text


def test_the_table_shows_small_states() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(rounds_table(REPORT))
    for words in ("4.3 KiB", "300 B", "95.0 MiB"):
        assert words in printed(console), words


def test_the_curves_end_with_the_figures_of_the_tables() -> None:
    last = curves(REPORT)[-1]
    assert (last.seconds, last.sent, last.left, last.state) == (1.84, 95 << 20, 0, 4403)
    assert len(curves(REPORT)) == 3
    assert len(curves(replace(REPORT, downtime=Downtime()))) == 2
    assert curves(replace(REPORT, samples=())) == []


def test_an_axis_of_pages_has_whole_pages_though_there_were_none(tmp_path: Path) -> None:
    draw(REPORT, tmp_path / "x.svg")
    axes = Figure().subplots()
    _draw_devices(axes, REPORT)
    assert axes.get_ylim() == (0, 1)
    assert all(tick == int(tick) for tick in axes.get_yticks())


# Whether a QEMU has ended


async def look_again(path: Path, then: str) -> tuple[str, str | None, bool]:
    """At a monitor that ended its connection: `then` nobody is there, or somebody who says little."""
    side = QemuSide(Where.SOURCE)
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen(4)
        async with trio.open_nursery() as nursery:
            leave = trio.Event()
            nursery.start_soon(greet_once, sock, leave)
            async with open_qmp(str(path)) as qmp:
                side.qmp = qmp
                leave.set()
                await qmp.lost.wait()
                if then == "leaves":
                    nursery.start_soon(greet_once, sock, leave)
                elif then != "silent":
                    sock.close()
                if then == "unlinked":
                    await trio.Path(path).unlink()
                return await _look_at_qemu(side)


async def greet_once(sock: trio.socket.SocketType, leave: trio.Event) -> None:
    peer, _ = await sock.accept()
    async with trio.SocketStream(peer) as stream:
        await stream.send_all(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        await stream.receive_some()
        await stream.send_all(b'{"return": {}, "id": "__qmp#00000"}\r\n')
        await leave.wait()


@pytest.mark.parametrize(
    ("then", "refused"), [("closed", True), ("unlinked", True), ("silent", False), ("leaves", False)]
)
async def test_a_lost_connection_alone_does_not_say_that_qemu_has_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    then: str,
    refused: bool,
) -> None:
    monkeypatch.setattr("vfio_user.client.qemu_migration.standing.ANSWER", 0.2)
    with trio.fail_after(10):
        words, state, found = await look_again(tmp_path / "qmp", then)
    gc.collect()
    assert "never retrieved" not in caplog.text
    assert (state, found) == (None, refused), words
    assert words.startswith("QEMU cannot be asked")
