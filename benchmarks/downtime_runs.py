# SPDX-License-Identifier: BSD-3-Clause
"""How long a guest stands still when it is moved: with our e1000 by `vfio-user migrate`, with QEMU's own by
QEMU alone, and with ours while another device of ours writes 100 MB/s into guest memory."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import trio

from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.benchmarks.results import Results
from vfio_user.client.qemu.command import DEFAULT_SLOTS, MachineOptions
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import Model, Moving, Place, Side, one_host, open_moving
from vfio_user.client.qemu.namespace import open_namespace
from vfio_user.client.qemu.traffic import bring_up, ping
from vfio_user.client.qemu_migration.migrate import migrate_guest
from vfio_user.client.qemu_migration.qmp import Events, open_qmp
from vfio_user.client.qemu_migration.report import Outcome, Report, Step
from vfio_user.client.qemu_migration.request import DeviceRequest, Request

HOST, GUEST = "10.98.0.1", "10.98.0.2"
OWN, RANGE = 192 << 20, 256 << 20
"""Bytes of memory that the guest's kernel uses, and of what is left to a device that writes."""
OPTIONS = MachineOptions(memory_mib=(OWN + RANGE) >> 20, kernel_words=f"mem={OWN >> 20}M")
NIC = Model("e1000", "nic", tap=True)
WRITER = Model(
    "vfio_user.benchmarks.writing_device:Writer", "writer", ["--set", f"base={OWN}", "--set", f"size={RANGE}"]
)
RATE = 100
LEAST_RATE = 0.9 * RATE
"""MB/s that it must have written while memory was copied: what is only asked for measures nothing."""
BANDWIDTH = 4 << 30
DOWNTIME = 20
"""Milliseconds: QEMU's `downtime-limit`, for all of them. Its default of 300 is a wish to stop early."""
LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class Guests:
    """The same guest three times: with our card, with ours and the writer, and with QEMU's card."""

    ours: Moving
    written: Moving
    built_in: Moving


@contextlib.asynccontextmanager
async def open_guests(lab: Lab) -> AsyncIterator[Guests]:
    """Root is needed. Gone when the block is left."""
    if os.geteuid() != 0:
        raise BenchmarkError("network namespaces and TAPs need root: run it as root")
    async with contextlib.AsyncExitStack() as stack:
        ours = await _open(stack, lab, "ours", [NIC])
        written = await _open(stack, lab, "written", [NIC, WRITER])
        yield Guests(ours, written, await _open(stack, lab, "built-in", []))


async def _open(stack: contextlib.AsyncExitStack, lab: Lab, name: str, models: Sequence[Model]) -> Moving:
    namespace = stack.enter_context(open_namespace(f"vfio-user-bench-{os.getpid()}-{name}"))
    places = one_host(namespace, f"{HOST}/24")
    if not models:
        places = _with_card(places[0]), _with_card(places[1])
    moving = await stack.enter_async_context(open_moving(lab, OPTIONS, models, places))
    await bring_up(moving.guest, f"{GUEST}/24")
    return moving


def _with_card(place: Place) -> Place:
    """QEMU's own e1000 at the slot of ours."""
    backend = f"tap,id=n,ifname={place.taps[0]},script=no,downscript=no"
    card = f"e1000,netdev=n,bus=pcie.0,addr={DEFAULT_SLOTS['q35'][0]:x}"
    return replace(place, extra=["-netdev", backend, "-device", card])


async def move_ours(moving: Moving) -> Report:
    """BenchmarkError when the guest does not arrive."""
    destination = await _destination(moving)
    source = moving.here
    devices = [DeviceRequest(id, path, destination.controls[id]) for id, path in source.controls.items()]
    request = Request(str(source.qmp), str(destination.qmp), tuple(devices), _stream(destination))
    report = await migrate_guest(request)
    if report.outcome is not Outcome.COMPLETED:
        raise BenchmarkError(f"the guest was not moved: {report.failure}")
    await _arrived(moving, destination)
    return report


async def move_built_in(moving: Moving) -> float:
    """Milliseconds from QEMU's STOP at the source to its RESUME at the destination, by their own clocks."""
    destination = await _destination(moving)
    async with open_qmp(str(moving.here.qmp)) as here, open_qmp(str(destination.qmp)) as there:
        with here.listen("STOP") as stopped, there.listen("RESUME") as resumed, trio.fail_after(LIMIT):
            await there.execute("cont")  # the guest is to run as soon as it is there
            await there.execute("migrate-incoming", uri=_stream(destination))
            await here.execute("migrate", uri=_stream(destination))
            downtime = (await _time(resumed) - await _time(stopped)) * 1000
    await _arrived(moving, destination)
    return downtime


async def _time(events: Events) -> float:
    return (await events.next()).time


async def _destination(moving: Moving) -> Side:
    async with open_qmp(str(moving.here.qmp)) as qmp:
        await qmp.execute(
            "migrate-set-parameters", **{"max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME}
        )
    return await moving.prepare()


def _stream(destination: Side) -> str:
    return f"unix:{destination.folder / 'stream'}"


async def _arrived(moving: Moving, destination: Side) -> None:
    await moving.moved(destination)
    await ping(moving.guest, HOST, 3)


_WRITER = "$(dirname $(grep -l 0x5c82 /sys/bus/pci/devices/*/device))"
_SET_RATE = (
    f"d={_WRITER}; echo 1 > $d/enable; setpci -s $(basename $d) COMMAND=6; "
    "devmem $(head -n 1 $d/resource | cut -d ' ' -f 1) 32 "
)


async def downtime(guests: Guests, number: int, results: Results) -> None:
    """Ours, ours with the writer, and QEMU's, in an order that turns with the rounds."""
    found: dict[str, Report] = {}
    alone = 0.0
    order = ["ours", "written", "built-in"]
    for name in order[number % 3 :] + order[: number % 3]:
        if name == "built-in":
            alone = await move_built_in(guests.built_in)
        elif name == "ours":
            found["downtime"] = await move_ours(guests.ours)
        else:
            await guests.written.guest.check(f"{_SET_RATE}{RATE}")
            found["downtime.written"] = await move_ours(guests.written)
            check_rate(found["downtime.written"])
            await guests.written.guest.check(f"{_SET_RATE}0")
    for key, report in found.items():
        results.add(key, report.downtime.total, alone)
        for part, milliseconds in asdict(report.downtime).items():
            results.add(f"{key}.{part}", milliseconds, report.downtime.total)


def check_rate(report: Report) -> None:
    """BenchmarkError unless the writer wrote as much as it was to. At that rate it writes by message, and the
    report counts from the first pass to the stop."""
    begun: dict[Step, float] = {}
    for progress in report.samples:
        begun.setdefault(progress.step, progress.seconds)
    seconds = begun[Step.STOP] - begun[Step.PRECOPY]
    rate = sum(one.message_bytes for one in report.devices if one.id == WRITER.id) / seconds / 1e6
    if rate < LEAST_RATE:
        raise BenchmarkError(f"the device wrote {rate:.0f} MB/s by message instead of {RATE}")


@dataclass(frozen=True, slots=True)
class MoveSuite:
    """A row of `MOVE_SUITES`."""

    text: str
    rounds: int
    quick_rounds: int
    run: Callable[[Guests, int, Results], Awaitable[None]]


MOVE_SUITES: Mapping[str, MoveSuite] = {"downtime": MoveSuite("downtime of moves", 9, 3, downtime)}
