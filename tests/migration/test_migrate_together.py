# SPDX-License-Identifier: BSD-3-Clause
"""Four devices of one VM moved together. Each rings the next one's doorbell by DMA, all the time.

The kernel's rule (linux/vfio.h, "RUNNING_P2P"): in a P2P state a device starts nothing, so that no other
device is touched, but takes and remembers what it is asked.
"""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from migration.moving import MOVES, PATIENCE, Server, Yard, leave_out_p2p, open_yard, seeded, watched
from migration.relay import ASKED, DOORBELL, ENTRIES, ENTRY, ERRORS, INDEX, LOG, NEXT, PASSED, Relay
from vfio_user.client.attachment import Attachment
from vfio_user.client.fake_vmm import DEFAULT_OPTIONS, FakeVmm, VmmOptions
from vfio_user.client.memory import FIXED_SIZE, GuestRam
from vfio_user.client.migration.migrate import Options, migrate
from vfio_user.client.migration.report import Limits, Outcome, Step
from vfio_user.client.migration.v2 import V2Driver
from vfio_user.client.peers import join_peers
from vfio_user.protocol.constants import MigrationState

COUNT = 4
LOG_ADDRESS = 0x100000
MEMORY = ((0, 0xA0000), (LOG_ADDRESS, 1 << 20))


class Machine:
    """Four VMMs with one memory, each on a server of its own."""

    def __init__(
        self,
        ram: GuestRam,
        attachments: Sequence[Attachment],
        late: list[MigrationState],
        servers: Sequence[Server] = (),
    ) -> None:
        self.ram = ram
        self.late = late
        """The state of a device that was written to by another one while it stood still, each time."""
        self.servers = tuple(servers)
        """As far as they are in this process."""
        self._attachments = tuple(attachments)
        self.vmms: tuple[FakeVmm, ...] = tuple(one.vmm for one in attachments)

    async def join(self) -> None:
        await join_peers(self.vmms)

    async def start(self) -> None:
        """Every device knows the next one's doorbell; the first is rung."""
        await self.join()
        for index, vmm in enumerate(self.vmms):
            following = self.vmms[(index + 1) % COUNT].bars[0].address + DOORBELL
            await vmm.write(0, NEXT, following, 8)
            await vmm.write(0, LOG, LOG_ADDRESS, 8)
            await vmm.write(0, INDEX, index)
        await self.vmms[1].write(0, DOORBELL, 1)

    async def passed(self) -> int:
        """How far they are."""
        return max([await vmm.read(0, PASSED) for vmm in self.vmms])

    async def wait_passed(self, number: int) -> None:
        with trio.fail_after(PATIENCE):
            while await self.passed() < number:  # noqa: ASYNC110  # nobody tells
                await trio.sleep(0.001)

    async def check(self, last: int) -> None:
        """Every number up to `last` was logged, by whose turn it was; no DMA has failed."""
        log = self.ram
        for number in range(max(1, last - ENTRIES + COUNT), last + 1):
            place = LOG_ADDRESS + number % ENTRIES * ENTRY.size
            assert log.unpack(ENTRY, place) == (number, number % COUNT)
        for vmm in self.vmms:
            assert not await vmm.read(0, ERRORS)

    async def close(self) -> None:
        for attachment in self._attachments:
            await attachment.close()


async def open_machine(yard: Yard, *, incoming: bool) -> Machine:
    ram = GuestRam(seals=FIXED_SIZE)
    ram.add_file(MEMORY)
    late: list[MigrationState] = []
    servers = [yard.serve(watched(Relay, late)) for _ in range(COUNT)]
    come = yard.incoming if incoming else yard.start
    attachments = [
        await come(server, ram, vmm_options(index, yard.options)) for index, server in enumerate(servers)
    ]
    return Machine(ram, attachments, late, servers)


def vmm_options(index: int, options: VmmOptions = DEFAULT_OPTIONS) -> VmmOptions:
    """Of the VMM of one of the devices: their BARs are apart."""
    return replace(options, memory=MEMORY, bar_window=0xE000_0000 + (index << 20))


async def move_around(folder: Path, moves: int, chance: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        async with open_yard(folder) as yard:
            here = await open_machine(yard, incoming=False)
            stack.callback(here.ram.close)
            await here.start()
            for _ in range(moves):
                there = await open_machine(yard, incoming=True)
                stack.callback(there.ram.close)
                await here.wait_passed(await here.passed() + chance.randrange(100))
                limits = Limits(rounds=chance.randrange(3))
                options = Options("v2", "v2", switch=there.join)
                report = await migrate(here.vmms, there.vmms, limits=limits, options=options)
                assert report.check().notes == ()
                assert here.late == []
                last = await here.passed()  # it stands still there, and shows where
                await here.close()
                here = there
                await here.wait_passed(last + 50)
                await here.check(last)


@pytest.mark.timeout(0)
async def test_they_are_moved_while_they_ring_each_other(tmp_path: Path) -> None:
    with seeded("together") as chance:
        await move_around(tmp_path, MOVES, chance)


async def test_a_client_that_leaves_out_p2p_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test before looks at is what goes wrong then."""
    leave_out_p2p(monkeypatch)
    with pytest.raises(AssertionError, match=r"STOP_COPY|RESUMING|<MigrationState.STOP"):
        await move_around(tmp_path, 50, random.Random(1))


@pytest.mark.parametrize(
    ("quiet", "busy"),
    [
        (MigrationState.RUNNING_P2P, MigrationState.RUNNING),
        (MigrationState.PRE_COPY_P2P, MigrationState.PRE_COPY),
    ],
)
async def test_in_a_p2p_state_a_device_starts_nothing_and_remembers_a_doorbell(
    tmp_path: Path, quiet: MigrationState, busy: MigrationState
) -> None:
    with contextlib.ExitStack() as stack:
        async with open_yard(tmp_path) as yard:
            machine = await open_machine(yard, incoming=False)
            stack.callback(machine.ram.close)
            vmm = machine.vmms[2]
            driver = await V2Driver.open(vmm.client)
            assert driver is not None
            await machine.start()
            for _ in range(5):
                await machine.wait_passed(await machine.passed() + 20)
                await driver.enter(busy)
                await driver.enter(quiet)
                with trio.fail_after(PATIENCE):
                    while await vmm.read(0, ASKED) == await vmm.read(0, PASSED):  # noqa: ASYNC110
                        await trio.sleep(0.001)
                before = [await one.read(0, PASSED) for one in machine.vmms]
                asked = await vmm.read(0, ASKED)
                await trio.sleep(0.02)
                assert [await one.read(0, PASSED) for one in machine.vmms] == before
                assert await vmm.read(0, ASKED) == asked == max(before) + 1
                await driver.enter(busy)
            await machine.wait_passed(await machine.passed() + 20)
            await machine.check(await machine.passed())


async def test_several_devices_without_p2p_states_are_refused(tmp_path: Path) -> None:
    """v1 has none: a doorbell would come to a device whose state has been read."""
    with contextlib.ExitStack() as stack:
        async with open_yard(tmp_path) as yard:
            here = await open_machine(yard, incoming=False)
            there = await open_machine(yard, incoming=True)
            stack.callback(here.ram.close)
            stack.callback(there.ram.close)
            await here.start()
            report = await migrate(here.vmms, there.vmms, options=Options(source="v1"))
            assert (report.outcome, report.source_runs) == (Outcome.FAILED, True)
            assert report.failure is not None
            assert report.failure.step is Step.CHECK
            assert "device 0, 1, 2, 3 has none" in report.failure.reason
            await here.wait_passed(await here.passed() + 20)
