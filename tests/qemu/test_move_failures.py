# SPDX-License-Identifier: BSD-3-Clause
"""What can go wrong during a move: the guest goes on at the source with its device, and nowhere else."""

import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
import trio

from guest_moves.by_qemu import set_bandwidth
from guest_moves.by_tool import move, request
from guest_moves.counts import SOAK
from guest_moves.cut_wire import Wire, open_wire
from guest_moves.killed import give_back, killed_at
from guest_moves.nic import GUEST, HOST, NIC, complaints
from guest_moves.pinger import Pinger, pinging
from vfio_user.client.control import open_control
from vfio_user.client.qemu.command import MachineOptions
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import Model, Moving, Side, one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import bring_up, ping
from vfio_user.client.qemu_migration.migrate import GuestMigration
from vfio_user.client.qemu_migration.qmp import Qmp, QmpLost, open_qmp
from vfio_user.client.qemu_migration.report import Outcome, Progress, Report, Step
from vfio_user.client.qemu_migration.request import Limits, Writes
from vfio_user.client.qemu_migration.way_back import END

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(900)]

SLOW = 2 << 20
"""Bytes a second: the guest's memory then takes seconds, and what happens in between does."""
LIMITS = Limits(timeout=120, stop=30, standstill=60, recovery=8)
"""Of time-outs only that for the way back may come where none is meant to."""


BUSY = 3


@dataclass
class Bench:
    """What an injection can reach. `kill` ends the destination's or the source's part of it."""

    moving: Moving
    destination: Side
    source_wire: Wire
    destination_wire: Wire
    nursery: trio.Nursery
    migration: GuestMigration = field(init=False)

    def cancel(self) -> None:
        self.migration.cancel()

    def kill_destination(self) -> None:
        self.destination.machine.child.signal(signal.SIGKILL)

    def kill_destination_server(self) -> None:
        self.destination.kill_server(NIC.id)

    def freeze_destination(self) -> None:
        """It takes nothing more, and the source waits for it in the middle of the last pages."""
        self.destination.machine.child.signal(signal.SIGSTOP)
        self.nursery.start_soon(_end_later, self.destination)

    def cut_source(self) -> None:
        self.source_wire.cut()

    def drop_source(self) -> None:
        self.source_wire.drop()

    def drop_destination(self) -> None:
        self.destination_wire.drop()

    def cut_destination(self) -> None:
        self.destination_wire.cut()

    def freeze_source_server(self) -> None:
        """It does not stop its device, nor anything else, for a while."""
        server = self.moving.here.servers[NIC.id].popen
        server.send_signal(signal.SIGSTOP)
        self.nursery.start_soon(_go_on, server)

    def end_source_server(self, id: str) -> None:
        """It reads what QEMU has sent before it ends. The kernel resets the connection of one that did not,
        and QEMU 11.1.3 then aborts: its `vfio_user_recv_hdr` sets an error that is set already."""
        self.moving.here.kill_server(id, signal.SIGTERM)

    def nothing(self) -> None:
        pass


async def _go_on(server: object) -> None:
    await trio.sleep(1.5)
    server.send_signal(signal.SIGCONT)  # type: ignore[attr-defined]


async def _end_later(side: Side) -> None:
    await trio.sleep(25)
    side.machine.child.signal(signal.SIGKILL)


@dataclass(frozen=True)
class Case:
    """`inject` happens at the first progress of `step`; `slow`: while most of memory is still to come."""

    step: Step
    inject: Callable[[Bench], None]
    outcome: Outcome = Outcome.FAILED
    slow: bool = False
    limits: Limits = LIMITS
    quick: bool = True
    """Also outside of the soak test."""
    still: float = 1.0
    """Seconds in which the guest may be silent; while memory is copied its CPUs never stop."""


CASES: Mapping[str, Case] = {
    "cancelled while memory is copied": Case(Step.PRECOPY, Bench.cancel, Outcome.CANCELLED, slow=True),
    "cancelled at the hand-over": Case(Step.HAND_OVER, Bench.cancel, Outcome.CANCELLED, quick=False),
    "time is up": Case(Step.PRECOPY, Bench.nothing, slow=True, limits=replace(LIMITS, timeout=2)),
    "destination killed while memory is copied": Case(
        Step.PRECOPY, Bench.kill_destination, slow=True, quick=False
    ),
    "destination killed at the hand-over": Case(Step.HAND_OVER, Bench.kill_destination),
    "destination killed in the last pass": Case(Step.LAST_PASS, Bench.kill_destination, quick=False),
    "destination hangs in the last pass": Case(
        # 3 s and twice 0.3 until it is given up, 1 s to be heard by the source.
        Step.LAST_PASS,
        Bench.freeze_destination,
        limits=replace(LIMITS, standstill=3),
        quick=False,
        still=6,
    ),
    "destination's server killed": Case(Step.PRECOPY, Bench.kill_destination_server, slow=True, quick=False),
    # Its end may be met only when QEMU has sent all: the destination's QEMU, deaf without its server, then
    # has a time to end before the source's guest goes on.
    "destination's server killed at the hand-over": Case(
        Step.HAND_OVER, Bench.kill_destination_server, still=1 + END
    ),
    "source's monitor lost": Case(Step.PRECOPY, Bench.cut_source, slow=True),
    "destination's monitor lost": Case(Step.PRECOPY, Bench.cut_destination, slow=True, quick=False),
    "destination's monitor lost at the hand-over": Case(Step.HAND_OVER, Bench.cut_destination),
    # Frozen for 1.5 s, and the guest's accesses with it.
    "the device does not stop": Case(
        Step.STOP, Bench.freeze_source_server, limits=replace(LIMITS, stop=0.5), still=3
    ),
}


@contextlib.asynccontextmanager
async def bench(moving: Moving) -> AsyncIterator[Bench]:
    destination = await moving.prepare()
    folder = destination.folder
    async with (
        open_wire(folder / "source.wire", moving.here.qmp) as source_wire,
        open_wire(folder / "destination.wire", destination.qmp) as destination_wire,
        trio.open_nursery() as nursery,
    ):
        yield Bench(moving, destination, source_wire, destination_wire, nursery)


async def attempt(one: Bench, case: Case) -> Report:
    """The move, with the case's mishap in it."""
    wanted = replace(
        request(one.moving, one.destination, limits=case.limits),
        source_qmp=str(one.source_wire.path),
        destination_qmp=str(one.destination_wire.path),
    )
    waiting = [case.inject]

    def tell(progress: Progress) -> None:
        if progress.step is case.step and waiting:
            waiting.pop()(one)

    one.migration = GuestMigration(wanted, tell)
    with trio.fail_after(150):
        return await one.migration.run()


async def runs(side: Side) -> bool:
    """Whether a QEMU is there, and its guest runs. One that has lost its server is deaf for 5 s at a time."""
    with trio.fail_after(90):
        while side.machine.child.popen.poll() is None:
            with contextlib.suppress(QmpLost):
                async with open_qmp(str(side.qmp), timeout=30) as qmp:
                    return await runs_and_stays(qmp)
            await trio.sleep(0.1)
    return False


async def runs_and_stays(qmp: Qmp) -> bool:
    """It runs, and still does once it is not being sent anywhere."""
    while (await qmp.execute("query-status"))["running"]:
        if (await qmp.execute("query-migrate")).get("status") not in ("setup", "active", "cancelling"):
            return True
        await trio.sleep(0.1)
    return False


@contextlib.asynccontextmanager
async def guest_with_nic(
    lab: Lab, namespace: Namespace, *others: Model
) -> AsyncIterator[tuple[Moving, Pinger]]:
    places, options = one_host(namespace, f"{HOST}/24"), MachineOptions(memory_mib=192)
    async with open_moving(lab, options, [NIC, *others], places) as moving:
        await bring_up(moving.guest, f"{GUEST}/24")
        await moving.guest.check("dmesg -c")
        async with pinging(namespace, GUEST) as pinger:
            yield moving, pinger


async def test_the_source_goes_on(lab: Lab, namespace: Namespace, scribbler: Model) -> None:
    async with guest_with_nic(lab, namespace, scribbler) as (moving, pinger):
        for name, case in CASES.items():
            if not (case.quick or SOAK):
                continue
            await set_bandwidth(moving.here, SLOW if case.slow else SLOW << 11)
            prepared = trio.current_time()
            async with bench(moving) as one:
                begun = trio.current_time()
                report = await attempt(one, case)
            print(f"{name}: {report.failure}; {report.source}; {report.destination}; {report.notes}")
            assert (report.outcome, report.guest) == (case.outcome, "source"), name
            assert not await runs(one.destination), name
            await pinger.next_answer()
            assert await runs(moving.here), name
            # It never stood still for longer than it took to find out. What a QEMU that starts beside it
            # costs on this machine is the measure of how busy that is.
            silence, usual = pinger.silence(begun, trio.current_time()), pinger.silence(prepared, begun)
            print(f"{name}: silent for {silence:.3f} s; {usual:.3f} s before")
            assert silence < case.still + BUSY * usual, name
            await one.destination.close()
        await moving.guest.check("true")
        assert complaints(await moving.guest.kernel_log()) == []
        await set_bandwidth(moving.here)
        await killed_before_the_start(moving, pinger)
        await move(moving, destination=await moving.prepare(keep_stopped=False))
        await pinger.next_answer()
        await the_source_server_dies(moving, scribbler.id)
        # The card beside it works as ever.
        await pinger.next_answer()
        await ping(moving.guest, HOST, 20)


@pytest.mark.soak  # of another device than the card in the test above
async def test_the_card_is_lost(lab: Lab, namespace: Namespace) -> None:
    async with guest_with_nic(lab, namespace) as (moving, _):
        await the_source_server_dies(moving, NIC.id)


async def killed_before_the_start(moving: Moving, pinger: Pinger) -> None:
    """The tool is killed when all is at the destination, whose QEMU was started without -S: nothing starts
    there, and the source has its guest back by hand, as the docs say."""
    destination = await moving.prepare(keep_stopped=False)
    wanted = request(moving, destination, Writes.HAND_OVER)
    await killed_at(Step.RESTORE, wanted)
    async with open_qmp(wanted.destination_qmp) as qmp:
        assert (await qmp.execute("query-migrate"))["status"] == "completed"
        for _ in range(10):
            assert (await qmp.execute("query-status"))["status"] == "paused"
            await trio.sleep(0.05)
    async with open_control(moving.here.controls[NIC.id]) as control:
        state = await control.call("state")
    assert (state["dirty_log"]["owner"], state["write_through"], state["running"]) == (None, False, False)
    assert await give_back(wanted) == "postmigrate"
    await pinger.next_answer()
    await destination.close()
    assert complaints(await moving.guest.kernel_log()) == []


async def the_source_server_dies(moving: Moving, id: str) -> None:
    """The device is lost, and the report says so; the guest goes on without it."""
    await set_bandwidth(moving.here, SLOW)
    async with bench(moving) as one:
        limits = replace(LIMITS, recovery=30)  # QEMU, without its server, is deaf for 5 s at a time
        end = lambda bench: bench.end_source_server(id)  # noqa: E731
        report = await attempt(one, Case(Step.PRECOPY, end, slow=True, limits=limits))
    print(f"{report.failure}; {report.source}; {report.destination}; {report.notes}; {report.by_hand}")
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source")
    assert f"{id} is lost" in report.source
    others = [other for other in moving.here.controls if other != id]
    assert all(f"{other} runs" in report.source for other in others)
    lost = [line for line in report.by_hand if "the device is lost to this guest" in line]
    assert [f"the server of {id}:" in line for line in lost] == [True]
    with trio.fail_after(300):
        while not await runs(moving.here):
            assert moving.here.machine.child.popen.poll() is None, moving.here.machine.qemu_log()
            await trio.sleep(0.5)
    assert not await runs(one.destination)
    assert "alive" in await moving.guest.check("echo alive")


BACK = [
    (Step.HAND_OVER, Bench.drop_source),
    (Step.HAND_OVER, Bench.drop_destination),
    (Step.LAST_PASS, Bench.drop_source),
    (Step.LAST_PASS, Bench.drop_destination),
]


@pytest.mark.parametrize(("step", "inject"), BACK if SOAK else BACK[:1])
async def test_a_monitor_that_comes_back(
    lab: Lab, namespace: Namespace, step: Step, inject: Callable[[Bench], None]
) -> None:
    """The guest goes on, on one of the two sides, and the report says on which."""
    async with guest_with_nic(lab, namespace) as (moving, pinger):
        async with bench(moving) as one:
            report = await attempt(one, Case(step, inject))
            print(f"{report.failure}; {report.source}; {report.destination}; {report.notes}")
            arrived = report.guest == "destination"
            assert await runs(moving.here) == (not arrived)
            assert await runs(one.destination) == arrived
            await pinger.next_answer()
            if arrived:
                await moving.moved(one.destination)
        await moving.guest.check("true")
