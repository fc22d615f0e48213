# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user demo`: an e1000 driven by a guest's driver, moved under load, and put into a real guest."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import click
import trio
from rich.console import Console

from vfio_user.cli.demo_account import Account
from vfio_user.cli.demo_plot import draw
from vfio_user.cli.demo_tables import downtime_table, rounds_table, trial_table, verified_table
from vfio_user.cli.main import fail
from vfio_user.cli.plots import PlotError, check_plot
from vfio_user.client.background import background
from vfio_user.client.drivers.e1000 import DriverError
from vfio_user.client.drivers.e1000_traffic import TrafficError
from vfio_user.client.drivers.e1000_trial import Trial, try_e1000
from vfio_user.client.qemu.command import MachineOptions, VfioUserDevice
from vfio_user.client.qemu.lab import Lab, find_qemu
from vfio_user.client.qemu.machine import MachineError, open_machine
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError
from vfio_user.client.server_process import ServerError, ServerProcess, serving
from vfio_user.client.switch import SwitchError
from vfio_user.client.tour import WAYS, TourError, TourOptions, open_tour
from vfio_user.client.tour_report import Move, TourReport
from vfio_user.protocol.errors import VfioUserError
from vfio_user.transport.channel import PeerGone

KNOWN = (
    TrafficError,
    DriverError,
    ServerError,
    SwitchError,
    TourError,
    VfioUserError,
    MachineError,
    LabError,
    OSError,
)
GUEST_SET_UP = "ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up"
GUEST_WAIT = "for i in $(seq 100); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && break; sleep 0.1; done"
GUEST_DRIVER = r"dmesg | grep 'e1000 0000.*eth0' | sed 's/^\[[^]]*\] //'"
GUEST_PING = "ping -c 5 -i 0.2 10.0.2.2"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user has asked for; `why_not`: the reason why there is no lab."""

    frames: int
    moves: int
    rate: int
    plot: Path | None
    lab: Lab | None
    why_not: str


@click.command("demo")
@click.option(
    "--frames",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Bulk frames of each run of the driver.",
)
@click.option(
    "--moves",
    type=click.IntRange(0, 1000),
    default=len(WAYS),
    show_default=True,
    help="Live migrations, over v1 and v2 in turn.",
)
@click.option(
    "--rate",
    type=click.IntRange(100),
    default=1000,
    show_default=True,
    metavar="MBIT/S",
    help="Rate of the link between the hosts.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the migrations: FILE.png or FILE.svg.")
@click.option(
    "--qemu/--no-qemu", default=None, help="Boot a guest too (default: if there is a QEMU and a guest)."
)
def command(frames: int, moves: int, rate: int, plot: Path | None, qemu: bool | None) -> None:
    """See it work: a network card in a process of its own, driven, moved under load, every frame checked.

    Needs no privileges. Ends with 0 when everything arrived as it was sent.
    """
    if plot is not None:
        try:
            check_plot(plot)
        except PlotError as error:
            fail(str(error))
        if not moves:
            fail("--plot draws migrations: leave --moves 0 away")
    lab, why_not = (None, "not asked for") if qemu is False else _find_lab()
    if qemu and lab is None:
        fail(why_not)
    sys.exit(trio.run(_main, Account(Console()), Wanted(frames, moves, rate, plot, lab, why_not)))


def _find_lab() -> tuple[Lab | None, str]:
    """A lab with which a guest can be booted, or the reason why there is none."""
    root = lab_root()
    search = find_qemu(root)
    if search.qemu is None:
        return None, search.reason
    lab = Lab(root)
    try:
        _ = lab.kernel, lab.initrd  # to look is to check them
    except LabError as error:
        return None, str(error)
    return lab, ""


async def _main(account: Account, wanted: Wanted) -> int:
    status = 1
    async with _until_signal(account) as scope:
        with scope:
            try:
                await _demo(account, wanted)
                status = 0
            except* KNOWN as group:
                for error in _leaves(group):
                    account.failed(str(error))
        if scope.cancelled_caught:
            account.failed("interrupted")
            status = 130
    return status


@contextlib.asynccontextmanager
async def _until_signal(account: Account) -> AsyncIterator[trio.CancelScope]:
    """A scope that SIGINT, SIGTERM and SIGHUP cancel, so that everything is put away."""
    scope = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:

        async def watch() -> None:
            async for _ in signals:
                scope.cancel()

        async with background() as nursery:
            nursery.start_soon(watch)
            yield scope


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _demo(account: Account, wanted: Wanted) -> None:
    # In /tmp whatever TMPDIR says: a UNIX socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="vfio-user-", dir="/tmp") as name:
        folder = Path(name)
        account.title("The server: an Intel 82540EM (e1000), in a process of its own")
        async with serving("e1000", folder / "nic.sock", ["--net", "echo"]) as server:
            account.step(f"vfio-user serve e1000 --net echo: process {server.pid}, listening")
            try:
                trials = [await _try(account, server, wanted.frames, shared) for shared in (True, False)]
                account.print(trial_table(trials))
                report = await _tour(account, wanted, folder)
                await _guest(account, server, wanted.lab, wanted.why_not)
            except* PeerGone as group:
                raise await server.explain("the server has ended the connection") from group
            account.title("The end")
            await server.stop()
            account.step("the server ended with status 0 and removed its socket")
    verified = sum(trial.verified for trial in trials)
    if report is not None:
        verified += report.traffic.frames + report.beacons
    account.done(f"{verified:,} frames came exactly as they were sent")


async def _try(account: Account, server: ServerProcess, frames: int, shared: bool) -> Trial:
    how = "mapped memory: the device reaches it itself" if shared else "private memory: all DMA by message"
    account.title(f"A driver with {how}")
    return await try_e1000(server, frames, shared, account)


async def _tour(account: Account, wanted: Wanted, folder: Path) -> TourReport | None:
    account.title("Live migration: a card under load, moved between two processes")
    if not wanted.moves:
        account.step("left out: not asked for")
        return None
    async with open_tour(folder, TourOptions(rate=wanted.rate * 125e3)) as tour:
        pids = " and ".join(f"{place.name}, process {place.server.pid}" for place in tour.places.values())
        account.step(f"servers {pids}; a switch between them")
        for way in islice(cycle(WAYS), wanted.moves):
            await tour.dwell()
            with account.moving(f"{tour.home.name} to {tour.home.other}") as tell:
                move = await tour.move(way, tell)
            account.step(_story(move))
        await tour.dwell()
        report = await tour.finish()
        account.step("all frames have come home; driver, card, servers and switch agree")
    for table in (rounds_table, downtime_table, verified_table):
        account.print(table(report))
    if wanted.plot is not None:
        draw(report, wanted.plot)
        account.step(f"drawn: {wanted.plot}")
    return report


def _story(move: Move) -> str:
    name = f"{move.source} to {move.destination}, {' to '.join(move.protocols)}"
    downtime = f"{move.report.downtime.total:.0f} ms of downtime"
    return f"{name}: {downtime}, {move.frames:,} frames meanwhile"


async def _guest(account: Account, server: ServerProcess, lab: Lab | None, why_not: str) -> None:
    account.title("A real guest: Linux with its own e1000 driver, under QEMU")
    if lab is None:
        account.step(f"left out: {why_not}")
        return
    account.step(f"booting, QEMU {'.'.join(map(str, lab.qemu.version))}")
    before = await server.ask_counters()
    options = MachineOptions(devices=[VfioUserDevice(server.path)], memory_mib=128)
    async with open_machine(lab, options) as guest:
        await guest.wait_boot()
        account.step("the guest has booted")
        account.quote(await guest.check(GUEST_DRIVER))
        await guest.check(f"{GUEST_SET_UP}; {GUEST_WAIT}")
        account.step(f"in the guest: {GUEST_PING}")
        account.quote(await guest.check(GUEST_PING))
        await guest.power_off()
    after = await server.ask_counters()
    sent, size, interrupts = (
        after[name] - before[name] for name in ("net_sent_frames", "net_sent_bytes", "irqs_intx")
    )
    account.step(
        f"the guest is off; for it the device has sent {sent} frames ({size:,} bytes) "
        f"and {interrupts} interrupts"
    )
