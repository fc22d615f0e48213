# SPDX-License-Identifier: BSD-3-Clause
"""libvfio-user's sample `server`, unmodified, as source and as destination of a migration by our client.

The sample: BAR0 is a time (seconds since the epoch) at which it fires INTx and then writes and reads 4 KiB
of the first DMA region by message; BAR1 is 12 KiB of memory, of which it sends all, in pre-copy and once
more when stopped, together with BAR0's time.
"""

import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from vfio_user.client.fake_vmm import FakeVmm, VmmOptions, open_vmm
from vfio_user.client.guest import GuestDevice, open_guest
from vfio_user.client.migration.migrate import Migration, Options, compare_memory, migrate
from vfio_user.client.migration.report import Limits, Outcome, Step, Where
from vfio_user.client.migration.sink import Sink
from vfio_user.client.migration.v1 import V1Driver
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.process import Child, running
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.values import Payload

pytestmark = [pytest.mark.lab]

BAR1_SIZE = 0x3000
STATE_SIZE = BAR1_SIZE + 8
MEMORY = ((0, 1 << 20), (1 << 32, 1 << 20))
OPTIONS = VmmOptions(memory=MEMORY)


def listens(path: Path) -> bool:
    """Whether somebody listens there. To try would be a client, and the sample takes only one."""
    accepting = "00010000"  # __SO_ACCEPTCON
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == accepting for line in lines)


@contextlib.asynccontextmanager
async def sample(lab: Lab, folder: Path, name: str) -> AsyncIterator[tuple[Path, Child]]:
    path = folder / name
    async with running([str(lab.sample("server")), "-v", str(path)], folder / f"{name}.log") as child:
        with trio.fail_after(60):
            while not listens(path):  # noqa: ASYNC110  # nobody tells
                await trio.sleep(0.005)
        yield path, child


@contextlib.asynccontextmanager
async def both(lab: Lab, folder: Path) -> AsyncIterator[tuple[FakeVmm, FakeVmm, Child, Child]]:
    """A started source, and a destination that waits for a guest; the servers' processes."""
    async with (
        sample(lab, folder, "source") as (source_path, source_child),
        sample(lab, folder, "destination") as (destination_path, destination_child),
        open_vmm(source_path, OPTIONS) as source,
        open_vmm(destination_path, OPTIONS, start=False) as destination,
    ):
        await destination.start_incoming()
        yield source, destination, source_child, destination_child


LATER = 100
"""Seconds: an alarm in a migration that does not end in time at the destination is none that the sample can
set: it refuses one that is past, and forgets one for this very second."""


async def set_alarm(device: FakeVmm | GuestDevice, seconds: int) -> int:
    """Let it fire INTx at a whole second: so many from now, and half a one more or less."""
    alarm = round(time.time()) + seconds
    await device.write(0, 0, alarm, 8)
    return alarm


async def scribble(device: GuestDevice, last: list[bytes]) -> None:
    """A guest that rewrites BAR1 until it is moved. (It must not while the server does DMA: that would take
    its message for the reply.)"""
    noise, here = random.Random(1), device.vmm
    while device.vmm is here:
        data = noise.randbytes(BAR1_SIZE)
        last[:] = [data]
        await device.vmm.client.region_write(1, 0, data)


async def dma_done(vmm: FakeVmm) -> None:
    """After the interrupt it writes and reads by message; until then any other message would confuse it."""
    with trio.fail_after(60):
        while vmm.ram.counters.reads < 1:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.005)
    await trio.sleep(0.02)


async def fires(vmm: FakeVmm) -> None:
    """It runs, and keeps a new alarm."""
    await set_alarm(vmm, 1)
    with trio.fail_after(60):
        await vmm.intx.wait()
    await dma_done(vmm)


async def bar1_is(vmm: FakeVmm, data: bytes) -> bool:
    """Whether BAR1 has it. The sample's server ignores the offset of a read, so all at once."""
    return await vmm.client.region_read(1, 0, BAR1_SIZE) == data


async def test_its_server_is_migrated_under_a_busy_guest(libvfio_lab: Lab, tmp_path: Path) -> None:
    async with both(libvfio_lab, tmp_path) as (source, destination, _, child):
        source.ram.write(0x1000, b"guest memory below the hole")
        async with open_guest([source]) as guest:
            device, written = guest.devices[0], [b""]
            alarm = await set_alarm(device, 5)
            guest.start(scribble, device, written)
            await trio.sleep(0.05)
            limits = Limits(rounds=3, round=0.05)
            report = (await migrate(source, destination, guest=guest, limits=limits)).check()
            # The interrupt was set at the source, and comes at the destination.
            with trio.fail_after(60):
                await device.intx.wait()
            assert time.time() >= alarm
            await dma_done(destination)
            await guest.pause()
            assert await bar1_is(destination, written[0])
        assert source.intx.count == 0
        # It writes 4 KiB of `A` to the first region that it was given, by message.
        assert destination.ram.read(0, 4096) == b"A" * 4096
        assert source.ram.read(0, 4096) == bytes(4096)
        assert destination.ram.read(0x1000, 27) == b"guest memory below the hole"
        assert compare_memory(source.ram, destination.ram) == [0]
        assert report.notes == ()
        assert report.verified_pages == 512
        assert [one.stopped for one in report.rounds] == [False, False, False, True]
        assert report.rounds[0].pages == 512
        # In pre-copy it has something new after each write, and gives it whole each time.
        *running_rounds, last = report.rounds
        assert all(one.state and one.state % BAR1_SIZE == 0 for one in running_rounds)
        assert last.state == STATE_SIZE
        assert report.state == (sum(one.state for one in report.rounds),)
        assert 0 < report.downtime.total < 5000
        assert "server" in child.log_text()


async def test_from_one_to_the_next(libvfio_lab: Lab, tmp_path: Path) -> None:
    noise, hops = random.Random(2), 4
    async with contextlib.AsyncExitStack() as stack:
        vmms = []
        for number in range(hops + 1):
            path, _ = await stack.enter_async_context(sample(libvfio_lab, tmp_path, f"server{number}"))
            vmms.append(await stack.enter_async_context(open_vmm(path, OPTIONS, start=not number)))
            if number:
                await vmms[-1].start_incoming()
        await set_alarm(vmms[0], LATER)
        async with open_guest([vmms[0]]) as guest:
            for number, (here, there) in enumerate(itertools.pairwise(vmms)):
                data = noise.randbytes(BAR1_SIZE)
                await guest.devices[0].vmm.client.region_write(1, 0, data)
                here.ram.write(0x3000 * number, b"hop %d" % number)
                (await migrate(here, there, guest=guest)).check()
                assert await bar1_is(there, data)
                assert compare_memory(here.ram, there.ram) == []
        assert all(vmms[-1].ram.read(0x3000 * n, 5) == b"hop %d" % n for n in range(hops))


async def test_cancelled_in_pre_copy_it_runs_on(libvfio_lab: Lab, tmp_path: Path) -> None:
    """The specification's table has no way from pre-copy to running; this server knows one."""
    async with both(libvfio_lab, tmp_path) as (source, destination, _, _):
        async with open_guest([source]) as guest:
            device, written = guest.devices[0], [b""]
            await set_alarm(device, LATER)
            guest.start(scribble, device, written)
            limits = Limits(rounds=10_000, downtime=0, round=0.05)
            migration = Migration(
                source,
                destination,
                guest=guest,
                limits=limits,
                progress=lambda progress: migration.cancel() if progress.round == 2 else None,
            )
            report = await migration.run()
            assert (report.outcome, report.source_runs) == (Outcome.CANCELLED, True)
            assert report.failure is not None
            assert report.failure.step is Step.PRECOPY
            await trio.sleep(0.02)
            await guest.pause()
            assert await bar1_is(source, written[0])
            await fires(source)
        for vmm in (source, destination):
            driver = await V1Driver.open(vmm.client)
            assert driver is not None
            assert await driver.state() is MigrationState.RUNNING


class Spoiled:
    """What lies between the hosts drops the last byte of the state."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.open, self.memory, self.setup = sink.open, sink.memory, sink.setup
        self.complete, self.abandon = sink.complete, sink.abandon

    async def state(self, device: int, data: Payload) -> None:
        await self._sink.state(device, data[:-1])


async def test_a_state_that_it_refuses_leaves_the_source_running(libvfio_lab: Lab, tmp_path: Path) -> None:
    async with both(libvfio_lab, tmp_path) as (source, destination, _, _):
        async with open_guest([source]) as guest:
            await set_alarm(guest.devices[0], LATER)
            options = Options(link=Spoiled)
            report = await migrate(source, destination, guest=guest, options=options)
            assert report.failure is not None
            assert (report.failure.where, report.failure.device) == (Where.DESTINATION, 0)
            assert "EINVAL" in report.failure.reason
            assert report.source_runs
            await fires(source)
        assert destination.ram.counters.writes == 0


@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize("step", [Step.PREPARE, Step.LOG, Step.PRECOPY, Step.STOP, Step.STATE, Step.START])
async def test_a_server_that_is_killed(libvfio_lab: Lab, tmp_path: Path, victim: str, step: Step) -> None:
    async with both(libvfio_lab, tmp_path) as (source, destination, source_child, destination_child):
        child = source_child if victim == "source" else destination_child

        async with open_guest([source]) as guest:
            await set_alarm(guest.devices[0], LATER)
            report = await migrate(
                source,
                destination,
                guest=guest,
                progress=lambda progress: child.popen.kill() if progress.step is step else None,
            )
            if victim == "source" and step is Step.START:
                assert report.outcome is Outcome.COMPLETED  # it was needed no longer
                return
            assert report.failure is not None
            assert report.failure.where.value == victim
            assert report.source_runs == (victim == "destination")
            assert bool(report.source_reason) != report.source_runs
            if report.source_runs:
                await fires(source)
