# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user migrate`: a running guest and its vfio-user devices, from one QEMU to another."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NoReturn

import click
import trio
from rich.console import Console

from vfio_user.cli.main import fail
from vfio_user.cli.migrate_plot import draw
from vfio_user.cli.migrate_tables import plain, story, tables
from vfio_user.cli.plots import PlotError, check_plot
from vfio_user.client.background import background
from vfio_user.client.qemu_migration.migrate import GuestMigration
from vfio_user.client.qemu_migration.report import (
    MoveError,
    Outcome,
    Progress,
    Refused,
    Report,
    Step,
)
from vfio_user.client.qemu_migration.request import (
    MOST_DOWNTIME,
    Limits,
    Request,
    RequestError,
    Writes,
    parse_device,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFAULTS = Limits()


@click.command("migrate")
@click.argument("uri")
@click.option("--source-qmp", required=True, metavar="ADDRESS", help="QMP of the QEMU with the guest.")
@click.option("--destination-qmp", required=True, metavar="ADDRESS", help="QMP of the QEMU that waits.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    required=True,
    metavar="ID=SOURCE_CONTROL,DESTINATION_CONTROL",
    help="A device by its id= in both QEMUs, and the control sockets of its servers. Once for each device.",
)
@click.option(
    "--downtime-limit",
    type=click.IntRange(1, MOST_DOWNTIME),
    metavar="MILLISECONDS",
    help="QEMU stops the guest once it thinks that it can send the rest in this time. Default: as QEMU is "
    "set (300 if nobody has set it), which most guests bear. For calls or games 30 to 100. More for a guest "
    "that writes more than the network takes: it never gets there, and is given back at --timeout.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULTS.timeout,
    show_default=True,
    metavar="SECONDS",
    help="Give up, and let the guest go on at the source, when it takes longer.",
)
@click.option(
    "--writes",
    type=click.Choice([writes.value for writes in Writes]),
    default=Writes.AUTO.value,
    show_default=True,
    help="How QEMU comes to know of pages that a device writes through its mapping.",
)
@click.option("--report", type=click.Path(path_type=Path), help="Write what was measured, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: FILE.png or FILE.svg.")
def command(
    uri: str,
    source_qmp: str,
    destination_qmp: str,
    devices: tuple[str, ...],
    downtime_limit: int | None,
    timeout: float,
    writes: str,
    report: Path | None,
    plot: Path | None,
) -> None:
    """Move a running guest with its vfio-user devices between two unmodified QEMUs.

    URI is the way of QEMU's own stream, as tcp:HOST:PORT or unix:PATH. The destination's QEMU was started as
    the source's, with -incoming defer (or -incoming URI) and -S. A QMP ADDRESS is a socket's path or
    HOST:PORT. Ctrl-C gives the guest back to the source, unless all of it has arrived at the destination.

    Ends with 0 when the guest runs at the destination, 1 when the move failed (and says where the guest is),
    2 when nothing was touched. See docs/qemu-migration.md.
    """
    try:
        request = Request(
            source_qmp,
            destination_qmp,
            tuple(map(parse_device, devices)),
            uri,
            Limits(downtime=downtime_limit, timeout=timeout),
            Writes(writes),
        )
        _check_files(report, plot)
    except (RequestError, PlotError) as error:
        fail(str(error))
    sys.exit(trio.run(_main, request, report, plot))


def _check_files(report: Path | None, plot: Path | None) -> None:
    """RequestError, PlotError: what is to be written at the end could not be."""
    if report is not None and plot is not None and os.path.realpath(report) == os.path.realpath(plot):
        raise RequestError(f"--report and --plot are the same file, {plot}: give two")
    if plot is not None:
        check_plot(plot)
    if report is not None:
        folder = report.absolute().parent
        if report.is_dir() or not folder.is_dir():
            raise RequestError(f"--report {report}: give a file in a folder that is there")
        if not os.access(report if report.exists() else folder, os.W_OK):
            raise RequestError(f"--report {report}: no permission to write there")


async def _main(request: Request, report_path: Path | None, plot: Path | None) -> int:
    console = Console()
    with Display(console) as display:
        migration = GuestMigration(request, display.tell)
        try:
            async with _signals_cancel(migration, display):
                report = await migration.run()
        except Refused as error:
            _refuse(error.reasons)
        except MoveError as error:  # before anything was touched
            fail(str(error))
    complaints = list(_write(report, report_path, plot))  # first: whatever the output is good for
    with _quiet_when_closed(console):
        _show(console, report)
        for complaint in complaints:
            _say(console, f"not written: {complaint}")
    return 0 if report.outcome is Outcome.COMPLETED else 1


def _refuse(reasons: tuple[str, ...]) -> NoReturn:
    """A line for each reason, and exit status 2."""
    *others, last = reasons
    for reason in others:
        click.echo(f"vfio-user: {' '.join(reason.split())}", err=True)
    fail(last)


@contextlib.asynccontextmanager
async def _signals_cancel(migration: GuestMigration, display: "Display") -> AsyncIterator[None]:
    with trio.open_signal_receiver(*SIGNALS) as signals:

        async def watch() -> None:
            async for _ in signals:
                display.say("interrupted: the guest is given back to the source, if it still can be")
                migration.cancel()

        async with background() as nursery:
            nursery.start_soon(watch)
            yield


@contextlib.contextmanager
def _quiet_when_closed(console: Console) -> Iterator[None]:
    """An output that is closed or full decides nothing about a guest: from then on nothing is printed. Rich
    makes SystemExit of a closed pipe."""
    try:
        yield
    except (OSError, SystemExit):
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), console.file.fileno())  # else what is in its buffer fails at the end
        console.quiet = True


class Display:
    """A line for each step; on a terminal a line below that moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._step: Step | None = None

    def __enter__(self) -> "Display":
        with _quiet_when_closed(self._console):
            if self._console.is_terminal:
                self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        with _quiet_when_closed(self._console):
            self._status.stop()

    def say(self, text: str) -> None:
        with _quiet_when_closed(self._console):
            _say(self._console, text)

    def tell(self, progress: Progress) -> None:
        """While the guest stands still nothing is drawn: that would be downtime."""
        if progress.way_back:
            self.say(f"{progress.seconds:8.2f} s  way back: {progress.way_back}")
            return
        if progress.step is not self._step:
            self._step = progress.step
            if progress.step in _QUIET:
                return
            self.say(f"{progress.seconds:8.2f} s  {progress.step.value}")
        if progress.step is Step.PRECOPY:
            with _quiet_when_closed(self._console):
                self._status.update(plain(story(progress)))


_QUIET = frozenset({Step.STOP, Step.HAND_OVER, Step.LAST_PASS, Step.RESTORE, Step.START})


def _show(console: Console, report: Report) -> None:
    if report.downtime.total:
        for table in tables(report):
            console.print(table)
    if report.stood_still:
        _say(
            console, f"the guest stood still for {report.stood_still:,.1f} ms before it went on at the source"
        )
    for note in report.notes:
        _say(console, f"note: {note}")
    if report.failure is not None:
        _say(console, f"the migration was {_ENDED[report.outcome]} {report.failure}")
    _say(console, f"source: {report.source}")
    _say(console, f"destination: {report.destination}")
    for number, line in enumerate(report.by_hand, 1):
        _say(console, f"by hand, {number}: {line}")


def _say(console: Console, text: str) -> None:
    """One line, however long: a command in it is there to be copied. A terminal breaks it by itself."""
    console.print(plain(text), soft_wrap=True)


_ENDED = {Outcome.FAILED: "given up", Outcome.CANCELLED: "cancelled", Outcome.COMPLETED: "completed"}


def _write(report: Report, path: Path | None, plot: Path | None) -> Iterator[str]:
    """Says what could not be written; it changes nothing of the move."""
    if path is not None:
        try:
            path.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        except OSError as error:
            yield str(error)
    if plot is not None:
        try:
            draw(report, plot)
        except OSError as error:
            yield str(error)
