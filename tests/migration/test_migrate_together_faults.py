# SPDX-License-Identifier: BSD-3-Clause
"""Four devices that ring each other, moved together, and something fails: at every step, on either side.

All devices of the source go on, and the ring has no gap; or the report says which one is lost. On the way
back too, no device is touched by another one while it stands still.
"""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from migration.chaos import fail_once
from migration.fault_scene import STEPS
from migration.moving import Yard, open_yard
from migration.relay import ASKED
from migration.test_migrate_together import COUNT, MEMORY, Machine, open_machine, vmm_options
from vfio_user.client.attachment import attach
from vfio_user.client.background import background
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.memory import FIXED_SIZE, GuestRam
from vfio_user.client.migration.migrate import Migration, Options
from vfio_user.client.migration.report import Outcome, Progress, Report, Step, Where
from vfio_user.client.migration.v2 import V2Driver
from vfio_user.client.server_process import ServerProcess, serving
from vfio_user.protocol.constants import MigrationState

VICTIM = 2
AGAIN = 3
"""Attempts: where the ring is when it happens is a matter of chance."""
OPTIONS = VmmOptions(memory=MEMORY, timeout=5.0)
READ_OUT = (Step.LOAD, Step.SWITCH, Step.START)
"""From here on the source is needed no longer."""
TESTS = Path(__file__).resolve().parents[1]


async def attempt(here: Machine, there: Machine, step: Step, action: Callable[[Migration], None]) -> Report:
    """The action comes at that step, once."""

    def strike(now: Progress) -> None:
        if now.step is step and waiting:
            waiting.pop()(migration)

    waiting = [action]
    migration = Migration(
        here.vmms, there.vmms, options=Options("v2", "v2", switch=there.join), progress=strike
    )
    report = await migration.run()
    assert not waiting
    return report


@contextlib.asynccontextmanager
async def ringing(yard: Yard) -> AsyncIterator[Machine]:
    async with open_there(yard, incoming=False) as here:
        await here.start()
        await here.wait_passed(20)
        yield here


@contextlib.asynccontextmanager
async def open_there(yard: Yard, *, incoming: bool = True) -> AsyncIterator[Machine]:
    machine = await open_machine(yard, incoming=incoming)
    try:
        yield machine
    finally:
        await machine.close()
        machine.ram.close()


async def goes_on(machine: Machine) -> None:
    """Every device has its turn, and no number is missing."""
    await machine.wait_passed(await machine.passed() + 10 * COUNT)
    await machine.check(await machine.passed())
    assert machine.late == []


async def is_as_new(machine: Machine, dead: int | None = None) -> None:
    for index, vmm in enumerate(machine.vmms):
        if index != dead:
            driver = await V2Driver.open(vmm.client)
            assert driver is not None
            assert await driver.state() is MigrationState.RUNNING
            assert await vmm.read(0, ASKED) == 0
    assert machine.late == []


@pytest.mark.parametrize("step", [step for step in STEPS if step is not Step.FINISH])
async def test_cancelled(tmp_path: Path, step: Step) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard, ringing(yard) as here:
        for _ in range(AGAIN):
            async with open_there(yard) as there:
                report = await attempt(here, there, step, Migration.cancel)
                assert (report.outcome, report.source_runs, report.notes) == (Outcome.CANCELLED, True, ())
                await goes_on(here)
                await is_as_new(there)


@pytest.mark.parametrize("step", [step for step in STEPS if step is not Step.FINISH])
async def test_a_server_of_the_destination_is_killed(tmp_path: Path, step: Step) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard, ringing(yard) as here:
        for _ in range(AGAIN):
            async with open_there(yard) as there:
                victim = there.servers[VICTIM]
                report = await attempt(here, there, step, lambda _: victim.kill())  # noqa: B023
                assert report.failure is not None
                whose = (Where.HERE, None) if step is Step.SWITCH else (Where.DESTINATION, VICTIM)
                assert (report.failure.where, report.failure.device) == whose
                assert report.source_runs
                assert [note.split(":")[1:3] for note in report.notes] == [
                    [f" destination, device {VICTIM}", " not reset"]
                ]
                await goes_on(here)
                await is_as_new(there, dead=VICTIM)


@pytest.mark.parametrize("step", [step for step in STEPS if step is not Step.FINISH])
async def test_a_server_of_the_source_is_killed(tmp_path: Path, step: Step) -> None:
    async with (
        open_yard(tmp_path, OPTIONS) as yard,
        ringing(yard) as here,
        open_there(yard) as there,
    ):
        report = await attempt(here, there, step, lambda _: here.servers[VICTIM].kill())
        assert here.late == []
        assert not report.source_runs
        if step in READ_OUT:
            assert report.outcome is Outcome.COMPLETED
            assert any(f"source, device {VICTIM}: not put to STOP" in note for note in report.notes)
            await goes_on(there)
        else:
            assert report.source_reason.startswith(f"device {VICTIM}: ")
            await is_as_new(there)


@pytest.mark.parametrize(
    ("side", "step", "fails_at"),
    [
        ("source", Step.QUIESCE, Step.STOP),
        ("source", Step.STOP, Step.STOP),
        ("destination", Step.STATE, Step.LOAD),
        ("destination", Step.LOAD, Step.LOAD),
    ],
)
async def test_a_device_fails_and_all_go_on(tmp_path: Path, side: str, step: Step, fails_at: Step) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard, ringing(yard) as here:
        for _ in range(AGAIN):
            async with open_there(yard) as there:
                machine = here if side == "source" else there
                device = machine.servers[VICTIM].device
                report = await attempt(here, there, step, lambda _: fail_once(device))  # noqa: B023
                assert report.failure is not None
                assert (report.failure.where.value, report.failure.device) == (side, VICTIM)
                assert report.failure.step is fails_at
                assert (report.source_runs, report.notes) == (True, ())
                await goes_on(here)
                await is_as_new(there)


@contextlib.asynccontextmanager
async def open_processes(
    folder: Path, name: str, *, incoming: bool
) -> AsyncIterator[tuple[Machine, list[ServerProcess]]]:
    """As `open_machine`, each server in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with contextlib.closing(GuestRam(seals=FIXED_SIZE)) as ram:
        ram.add_file(MEMORY)
        async with background() as nursery, contextlib.AsyncExitStack() as stack:
            servers, attachments = [], []
            for index in range(COUNT):
                server = await stack.enter_async_context(
                    serving("migration.relay:Relay", folder / f"{name}{index}", environment=environment)
                )
                servers.append(server)
                options = vmm_options(index, OPTIONS)
                attachments.append(await attach(nursery, server.path, options, ram=ram, incoming=incoming))
            machine = Machine(ram, attachments, [])
            stack.push_async_callback(machine.close)
            yield machine, servers


async def test_a_process_is_killed_and_all_go_on(tmp_path: Path) -> None:
    async with (
        open_processes(tmp_path, "here", incoming=False) as (here, _),
        open_processes(tmp_path, "there", incoming=True) as (there, servers),
    ):
        await here.start()
        await here.wait_passed(20)
        report = await attempt(
            here, there, Step.STATE, lambda _: os.kill(servers[VICTIM].pid, signal.SIGKILL)
        )
        assert report.failure is not None
        assert (report.failure.where, report.failure.device) == (Where.DESTINATION, VICTIM)
        assert report.source_runs
        await goes_on(here)
        await is_as_new(there, dead=VICTIM)
