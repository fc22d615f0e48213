# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user demo`: an e1000 in a second process, driven the way a guest's driver does."""

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import click
import trio
from rich.console import Console

from vfio_user.cli.demo_account import Account, Result, result_table
from vfio_user.cli.main import fail
from vfio_user.client.background import background
from vfio_user.client.drivers.e1000 import DriverError, open_e1000
from vfio_user.client.drivers.e1000_traffic import Traffic, TrafficError
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.client.qemu.command import MachineOptions, VfioUserDevice
from vfio_user.client.qemu.lab import Lab, find_qemu
from vfio_user.client.qemu.machine import MachineError, open_machine
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError
from vfio_user.client.server_process import ServerError, ServerProcess, serving
from vfio_user.protocol.errors import VfioUserError
from vfio_user.transport.channel import PeerGone

OPTIONS = {shared: VmmOptions(shared=shared, resample=True, spin=100e-6) for shared in (True, False)}
"""By whether the device may map guest memory. INTx is unmasked by an eventfd, as under KVM; the driver
looks for a reply for 100 us before it sleeps, as a busy vCPU would."""
PINGS, REGISTER_READS = 200, 500
KNOWN = (TrafficError, DriverError, ServerError, VfioUserError, MachineError, LabError, OSError)
GUEST_SET_UP = "ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up"
GUEST_WAIT = "for i in $(seq 100); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && break; sleep 0.1; done"
GUEST_DRIVER = r"dmesg | grep 'e1000 0000.*eth0' | sed 's/^\[[^]]*\] //'"
GUEST_PING = "ping -c 5 -i 0.2 10.0.2.2"


@click.command("demo")
@click.option(
    "--frames", type=click.IntRange(1), default=4000, show_default=True, help="Bulk frames per run."
)
@click.option(
    "--qemu/--no-qemu", default=None, help="Boot a guest too (default: if there is a QEMU and a guest)."
)
def command(frames: int, qemu: bool | None) -> None:
    """See it work: a network card in one process, its driver in another, every frame checked.

    Needs no privileges. Ends with 0 when everything arrived as it was sent.
    """
    lab, why_not = (None, "not asked for") if qemu is False else _find_lab()
    if qemu and lab is None:
        fail(why_not)
    sys.exit(trio.run(_main, Account(Console()), frames, lab, why_not))


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


async def _main(account: Account, frames: int, lab: Lab | None, why_not: str) -> int:
    status = 1
    async with _until_signal(account) as scope:
        with scope:
            try:
                await _demo(account, frames, lab, why_not)
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


async def _demo(account: Account, frames: int, lab: Lab | None, why_not: str) -> None:
    # In /tmp whatever TMPDIR says: a UNIX socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="vfio-user-", dir="/tmp") as folder:
        account.title("The server: an Intel 82540EM (e1000), in a process of its own")
        async with serving("e1000", Path(folder) / "nic.sock", ["--net", "echo"]) as server:
            account.step(f"vfio-user serve e1000 --net echo: process {server.pid}, listening")
            try:
                results = [await _run(account, server, frames, shared) for shared in (True, False)]
                await _guest(account, server, lab, why_not)
            except* PeerGone as group:
                raise await server.explain("the server has ended the connection") from group
            account.title("The end")
            await server.stop()
            account.step("the server ended with status 0 and removed its socket")
    account.print(result_table(results))
    verified = sum(result.verified for result in results)
    account.done(f"{verified:,} frames came back exactly as they were sent")


async def _run(account: Account, server: ServerProcess, frames: int, shared: bool) -> Result:
    """Drive the device with mapped or with private memory, then ask the server what it counted."""
    how = "mapped memory: the device reaches it itself" if shared else "private memory: all DMA by message"
    account.title(f"A driver with {how}")
    before = await server.ask_counters()
    driven = await _drive(account, server.path, frames, shared)
    result = replace(
        driven, server={name: n - before[name] for name, n in (await server.ask_counters()).items()}
    )
    if problem := result.problem():
        raise ServerError(problem)
    account.step("the server's counters of frames and of DMA agree too")
    return result


async def _drive(account: Account, path: Path, frames: int, shared: bool) -> Result:
    begun = time.perf_counter()
    async with open_vmm(path, OPTIONS[shared], step=account.step) as vmm:
        async with open_e1000(vmm) as nic:
            up = time.perf_counter() - begun
            account.step(f"reset through the I/O BAR, EEPROM sum BABA, PHY found, link up ({up:.2f} s)")
            traffic = Traffic(nic)
            peer = await traffic.resolve()
            account.step(f"ARP: {peer.ip} is at {peer.mac.hex(':')}, we are {nic.mac.hex(':')}")
            registers = await traffic.register_reads(REGISTER_READS)
            pings = await traffic.ping(PINGS)
            account.step(f"ping: {pings.count} of {pings.count} answered, p50 {pings.median * 1e6:.0f} us")
            with account.progress("UDP echo", frames) as progress:
                bulk = await traffic.bulk(frames, progress=progress)
            account.step(f"UDP echo: {bulk.frames:,} frames of 64 to 1514 bytes out and back, compared")
            segments = await traffic.segments()
            account.step(f"TCP segmentation: 60,000 bytes cut into {segments.frames} frames, sums right")
            await traffic.check_statistics()
            account.step("the device's statistics registers agree with the driver's count")
        return Result(
            shared,
            registers,
            pings,
            bulk,
            segments,
            nic.counters,
            vmm.intx.count,
            vmm.ram.counters,
            up,
            time.perf_counter() - begun,
        )


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
    frames = after["net_sent_frames"] - before["net_sent_frames"]
    account.step(f"the guest is off; the device has sent {frames} frames for it")
