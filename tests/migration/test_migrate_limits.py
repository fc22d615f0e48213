# SPDX-License-Identifier: BSD-3-Clause
"""Limits, time-outs, cancelling, page sizes of the dirty log, a device that cannot say what it wrote."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from migration.moving import WAYS, Yard, open_yard, wait_until
from vfio_user.client.attachment import Attachment
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions
from vfio_user.client.memory import PAGE
from vfio_user.client.migration.migrate import migrate
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Limits, MigrationError, Progress, Step
from vfio_user.client.migration.v1 import V1Driver
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol.constants import MigrationState

MEMORY = ((0, 0xA0000), (1 << 32, 4 << 20))
PAGES = sum(size for _, size in MEMORY) // PAGE
OPTIONS = VmmOptions(memory=MEMORY)
TARGET = 1 << 32


async def pair(yard: Yard) -> tuple[FakeVmm, FakeVmm]:
    source: Attachment = await yard.start(yard.serve(Scratch))
    destination: Attachment = await yard.incoming(yard.serve(Scratch))
    return source.vmm, destination.vmm


async def copy(vmm: FakeVmm, target: int, length: int) -> None:
    """Let the device write there."""
    for offset, value, width in ((0xFE8, target, 8), (0xFF0, length, 4), (0xFF8, 1, 4)):
        await vmm.write(0, offset, value, width)
    with trio.fail_after(5):
        while await vmm.read(0, 0xFFC) & 1:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)


@pytest.mark.parametrize("protocol", ["v1", "v2"])
async def test_an_idle_guest_takes_one_round_and_the_last(tmp_path: Path, protocol: str) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        report = (await migrate(source, destination, options=Options(protocol, protocol))).check()
        assert [(one.number, one.pages, one.stopped) for one in report.rounds] == [
            (0, PAGES, False),
            (1, 0, True),
        ]
        assert (report.pages, report.rounds[0].bytes) == (PAGES, PAGES * PAGE)
        assert report.bytes == PAGES * PAGE + report.state[0]
        assert report.rounds[0].at < report.rounds[1].at < report.ms
        assert 0 < report.downtime.total < report.ms
        assert str(report) == "migration completed"


@pytest.mark.parametrize(("source_protocol", "destination_protocol"), WAYS)
@pytest.mark.parametrize("page_size", [4096, 8192, 65536, 2 << 20])
async def test_what_the_device_writes_between_two_rounds_is_sent_again(
    tmp_path: Path, source_protocol: str, destination_protocol: str, page_size: int
) -> None:
    """In pages of any size that the log has; `verify` looks at every one."""
    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        source.ram.write(0, b"x" * 20_000)
        rounds: list[int] = []

        async def write_in_between() -> None:
            await wait_until(lambda: 0 in rounds)
            await copy(source, TARGET + 0x5800, 10_000)
            rounds.append(-1)

        def progress(now: Progress) -> None:
            if now.step is Step.PRECOPY:
                rounds.append(now.round)

        options = Options(source_protocol, destination_protocol, page_size=page_size)
        limits = Limits(rounds=3, downtime=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_in_between)
            report = await migrate(source, destination, limits=limits, options=options, progress=progress)
        again = sum(one.pages for one in report.check().rounds[1:])
        whole = page_size // PAGE
        assert 3 <= again <= 4 * max(whole, 3)
        assert destination.ram.read(TARGET + 0x5800, 10_000) == b"x" * 10_000


async def test_no_rounds_is_stop_and_copy(tmp_path: Path) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        steps: list[Step] = []
        report = await migrate(
            source, destination, limits=Limits(rounds=0), progress=lambda now: steps.append(now.step)
        )
        assert [one.stopped for one in report.check().rounds] == [True]
        assert Step.PRECOPY not in steps


@pytest.mark.parametrize("protocol", ["v1", "v2"])
async def test_a_device_that_cannot_say_what_it_wrote(tmp_path: Path, protocol: str) -> None:
    """All of its pages are dirty, always; after so many rounds the guest is stopped, or it gives up."""
    async with open_yard(tmp_path, OPTIONS) as yard:
        make = partial(Faulty, dirty=False)
        source, destination = await yard.start(yard.serve(make)), await yard.incoming(yard.serve(make))
        vmms, options = (source.vmm, destination.vmm), Options(protocol, protocol)
        limits = Limits(rounds=3, downtime=0, force=False)
        report = await migrate(*vmms, limits=limits, options=options)
        assert report.failure is not None
        assert report.failure.step is Step.PRECOPY
        assert f"{PAGES * PAGE} bytes of memory are still dirty" in report.failure.reason
        assert report.source_runs
        with pytest.raises(MigrationError, match="the guest is too busy"):
            report.check()
        report = await migrate(*vmms, limits=Limits(rounds=3, downtime=0), options=options)
        assert [one.pages for one in report.check().rounds] == [PAGES] * 4


async def test_a_time_out(tmp_path: Path) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        options = Options(switch=partial(trio.sleep, 10))
        report = await migrate(source, destination, limits=Limits(timeout=0.3), options=options)
        assert report.failure is not None
        assert report.failure.step is Step.SWITCH
        assert str(report) == "migration failed at SWITCH (the migration itself): not done within 0.3 s"
        assert report.source_runs


class CallbackError(Exception):
    """What a callback of ours raises."""


@pytest.mark.parametrize("step", [Step.PREPARE, Step.PRECOPY, Step.STOP, Step.STATE, Step.START])
async def test_a_callback_that_raises(tmp_path: Path, step: Step) -> None:
    def fail(now: Progress) -> None:
        if now.step is step:
            raise CallbackError

    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        with pytest.raises(CallbackError):
            await migrate(source, destination, progress=fail)
        await states_are(MigrationState.RUNNING, source, destination)


async def test_cancelled_from_outside(tmp_path: Path) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        options = Options(switch=trio.sleep_forever)
        with trio.move_on_after(0.3) as scope:
            await migrate(source, destination, options=options)
        assert scope.cancelled_caught
        await states_are(MigrationState.RUNNING, source, destination)


async def states_are(state: MigrationState, *vmms: FakeVmm) -> None:
    for vmm in vmms:
        driver = await V1Driver.open(vmm.client)
        assert driver is not None
        assert await driver.state() is state


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rounds", [0, 2])
async def test_v1_through_a_mapping(tmp_path: Path, mapped: bool, rounds: int) -> None:
    """The data area of our server may be mapped: then no data goes by message."""
    async with open_yard(tmp_path, OPTIONS) as yard:
        make = partial(Scratch, memory=1 << 20)
        source, destination = await yard.start(yard.serve(make)), await yard.incoming(yard.serve(make))
        await source.vmm.client.region_write(2, 0, bytes(range(256)) * 4096)
        options, limits = Options("v1", "v1", mapped=mapped), Limits(rounds=rounds)
        (await migrate(source.vmm, destination.vmm, options=options, limits=limits)).check()
        assert await destination.vmm.client.region_read(2, 0, 1 << 20) == bytes(range(256)) * 4096


@pytest.mark.parametrize(
    ("values", "wrong"),
    [({"rounds": -1}, True), ({"downtime": -1.0}, True), ({"recovery": 0}, True), ({}, False)],
)
def test_limits_that_cannot_be_met(values: dict[str, float], wrong: bool) -> None:
    make: Callable[[], Limits] = partial(Limits, **values)  # type: ignore[arg-type]
    if wrong:
        with pytest.raises(ValueError, match="cannot be met"):
            make()
    else:
        assert make().rounds == 16


async def test_a_protocol_that_the_server_does_not_speak(tmp_path: Path) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        with pytest.raises(ValueError, match="it is v1 or v2"):
            await migrate(source, destination, options=Options("v3"))
        assert (await migrate(source, source, options=Options("v2"))).failure is not None
