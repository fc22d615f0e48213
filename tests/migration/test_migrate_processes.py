# SPDX-License-Identifier: BSD-3-Clause
"""Servers that are processes of their own, as in real life, and that are killed (SIGKILL) or stopped."""

import contextlib
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migration.moving import MEMORY, MOVES, WAYS, wait_until
from migration.scratch_guest import Copier
from vfio_user.client.attachment import Attachment, attach
from vfio_user.client.background import background
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.guest import Guest, open_guest
from vfio_user.client.migration.migrate import migrate
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Limits, Outcome, Progress, Step
from vfio_user.client.server_process import ServerProcess, serving
from vfio_user.protocol.errors import VfioUserError

OPTIONS = VmmOptions(memory=MEMORY, timeout=5.0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path (a UNIX socket's has at most 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="vfio-user-", dir="/tmp") as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def two_servers(folder: Path) -> AsyncIterator[tuple[ServerProcess, ServerProcess]]:
    async with (
        serving("scratch", folder / "first", ["--set", "memory=256K"]) as first,
        serving("scratch", folder / "second", ["--set", "memory=256K"]) as second,
    ):
        yield first, second


async def run_while_it_can(copier: Copier) -> None:
    with contextlib.suppress(VfioUserError):
        await copier.run()


@contextlib.asynccontextmanager
async def busy_guest(here: Attachment) -> AsyncIterator[tuple[Guest, Copier]]:
    async with open_guest([here.vmm]) as guest:
        copier = Copier(guest.devices[0], random.Random(1))
        guest.start(run_while_it_can, copier)
        await goes_on(copier)
        yield guest, copier


async def goes_on(copier: Copier) -> None:
    before = copier.copies
    await wait_until(lambda: copier.copies > before)


@pytest.mark.timeout(0)
async def test_back_and_forth_between_two_processes(folder: Path) -> None:
    """The former source takes the guest back, whatever it had before."""
    async with two_servers(folder) as servers, background() as nursery:
        here = await attach(nursery, servers[0].path, OPTIONS)
        async with busy_guest(here) as (guest, copier):
            for number in range(1, MOVES + 1):
                there = await attach(nursery, servers[number % 2].path, OPTIONS, incoming=True)
                ways = Options(*random.Random(number).choice(WAYS))
                report = await migrate(
                    here.vmm, there.vmm, guest=guest, options=ways, limits=Limits(rounds=number % 3)
                )
                assert report.check().notes == ()
                await here.close()
                here = there
                await goes_on(copier)


@pytest.mark.parametrize(
    ("number", "step", "victim"),
    [
        pytest.param(signal.SIGKILL, Step.PRECOPY, 0, id="killed while it is read"),
        pytest.param(signal.SIGKILL, Step.LOAD, 0, id="killed when it is needed no longer"),
        pytest.param(signal.SIGKILL, Step.STATE, 1, id="killed while it is written"),
        pytest.param(signal.SIGKILL, Step.LOAD, 1, id="killed before it has loaded"),
        pytest.param(signal.SIGSTOP, Step.STATE, 1, id="stopped while it is written"),
    ],
)
async def test_a_process_that_is(folder: Path, number: signal.Signals, step: Step, victim: int) -> None:
    async with two_servers(folder) as servers, background() as nursery:
        here = await attach(nursery, servers[0].path, OPTIONS)
        there = await attach(nursery, servers[1].path, OPTIONS, incoming=True)

        def strike(now: Progress) -> None:
            if now.step is step:
                os.kill(servers[victim].pid, number)

        async with busy_guest(here) as (guest, copier):
            report = await migrate(
                here.vmm, there.vmm, guest=guest, progress=strike, limits=Limits(recovery=4)
            )
            if (victim, step) == (0, Step.LOAD):
                assert report.outcome is Outcome.COMPLETED  # it was needed no longer
                assert report.notes
                await goes_on(copier)
            else:
                assert report.outcome is Outcome.FAILED
                assert report.source_runs == bool(victim)
                if victim:
                    await goes_on(copier)
        os.kill(servers[victim].pid, signal.SIGCONT)
