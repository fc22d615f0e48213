# SPDX-License-Identifier: BSD-3-Clause
"""A guest's move step by step, and each way in which it can go wrong: real servers, real control sockets, and
QEMUs without a guest that speak QMP (tests/qemu has real ones)."""

import socket
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from guest_moves.fake_qemu import FakeQemu, Refusal
from guest_moves.scene import REGISTER, Scene, home_again, opened_scene
from migration.control_bed import listen
from vfio_user.client.control import ControlLost
from vfio_user.client.qemu_migration import carry, closing, standing, way_back, whose
from vfio_user.client.qemu_migration.report import MoveError, Outcome, Refused, Step
from vfio_user.client.qemu_migration.request import Limits, Writes
from vfio_user.protocol.json_rpc import FAILED, RpcError


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened_scene(tmp_path) as scene:
        yield scene


async def test_a_guest_moves(scene: Scene) -> None:
    scene.limits = Limits(downtime=77, timeout=10)
    report = await scene.move()
    assert (report.outcome, report.guest, report.failure, report.notes) == (
        Outcome.COMPLETED,
        "destination",
        None,
        (),
    )
    assert scene.steps == list(Step)
    assert (scene.source.status, scene.destination.status) == ("postmigrate", "running")
    assert (await scene.state(scene.here))["running"] is False
    assert (await scene.state(scene.there))["running"] is True
    assert await scene.vmms[1].client.region_read(0, REGISTER, 2) == b"\xfe\xca"
    for qemu in (scene.source, scene.destination):
        assert not any(qemu.capabilities.values())
        assert qemu.parameters["downtime-limit"] == 300
    assert report.devices[0].state_bytes > 0
    assert (report.ram["normal"], report.pages, report.rounds[-1].stopped) == (7, 10, True)
    last = report.rounds[-1]
    begun_until_completed = report.downtime.stop + report.downtime.hand_over + report.downtime.last_pass
    assert last.ms - last.ms_running == pytest.approx(begun_until_completed)
    assert report.downtime.total > 0
    assert report.to_json()["outcome"] == "completed"


async def test_a_guest_that_was_paused_stays_so(scene: Scene) -> None:
    scene.source.status = "paused"
    report = await scene.move()
    assert report.outcome is Outcome.COMPLETED
    assert (scene.destination.status, scene.destination.ran) == ("paused", [])
    assert (await scene.state(scene.there))["running"] is True


async def test_what_the_device_wrote_is_handed_over_before_the_last_pass(scene: Scene) -> None:
    vmm = scene.vmms[0]
    told = listen(vmm)

    async def scribble(_qemu: FakeQemu) -> None:
        await vmm.write(0, 0xFE0, 0x1000, width=8)
        await vmm.write(0, 0xFE8, 0x2000, width=8)
        await vmm.write(0, 0xFF0, 64)
        await vmm.write(0, 0xFF8, 1)
        await vmm.intx.wait()

    async def look(_qemu: FakeQemu) -> None:
        assert told == [(0x2000, 1)]
        assert vmm.intx.count == 1
        state = await scene.state(scene.here)  # the CPUs may go on by themselves from here on
        assert (state["running"], state["blank"]) == (False, False)

    scene.source.hooks |= {"migrate": scribble, "migrate-continue": look}
    report = await scene.move()
    assert report.outcome is Outcome.COMPLETED, report.failure
    device = report.devices[0]
    assert (device.pages_handed_over, device.write_through, device.intx_lowered) == (1, False, True)
    await scene.vmms[1].intx.wait()  # the level is still high, and the destination says so


async def test_write_through_goes_on_before_the_first_pass(scene: Scene) -> None:
    on: list[bool] = []

    async def look(_qemu: FakeQemu) -> None:
        on.append((await scene.state(scene.here))["write_through"])

    scene.source.hooks["migrate"] = look
    scene.writes = Writes.WRITE_THROUGH
    report = await scene.move()
    assert (on, report.writes) == ([True], Writes.WRITE_THROUGH)
    assert (await scene.state(scene.here))["write_through"] is False


# Nothing is touched


async def test_what_cannot_be_moved_is_refused_with_all_reasons(scene: Scene) -> None:
    scene.source.capabilities["postcopy-ram"] = True
    scene.destination.status = "running"
    scene.destination.vmms = {}
    before = await scene.state(scene.here), await scene.state(scene.there)
    with pytest.raises(Refused) as refused:
        await scene.move()
    assert [
        words
        for words in ("postcopy-ram", "-incoming", "no vfio-user device 'dev'")
        if not any(words in reason for reason in refused.value.reasons)
    ] == []
    assert scene.steps == [Step.CONNECT, Step.CHECK]
    assert (await scene.state(scene.here), await scene.state(scene.there)) == before


async def test_nobody_there(scene: Scene) -> None:
    scene.destination.path = scene.destination.path.with_name("nobody")
    with pytest.raises(MoveError, match=r"the destination's QEMU: .*nobody cannot be connected to"):
        await scene.move()


@pytest.mark.parametrize("cancel", [True, False])
async def test_a_server_that_takes_no_connection(scene: Scene, tmp_path: Path, cancel: bool) -> None:
    """It hangs, and so many wait already that there is no room."""
    with socket.socket(socket.AF_UNIX) as hung, socket.socket(socket.AF_UNIX) as waiting:
        scene.servers[1].control_path = tmp_path / "hung"
        hung.bind(str(tmp_path / "hung"))
        hung.listen(0)
        waiting.connect(str(tmp_path / "hung"))
        scene.limits = Limits(timeout=60 if cancel else 0.3)
        async with trio.open_nursery() as nursery:

            async def cancel_soon() -> None:
                await trio.sleep(0.1)
                assert scene.migration is not None
                scene.migration.cancel()

            if cancel:
                nursery.start_soon(cancel_soon)
            with (
                trio.fail_after(3),
                pytest.raises(MoveError, match="cancelled" if cancel else "not done within"),
            ):
                await scene.move()
    assert scene.steps == [Step.CONNECT]


@pytest.mark.parametrize("cancel", [True, False])
async def test_a_question_that_is_not_answered(scene: Scene, cancel: bool) -> None:
    async def never(_qemu: FakeQemu) -> None:
        if cancel:
            assert scene.migration is not None
            scene.migration.cancel()
        await trio.sleep_forever()

    scene.limits = Limits(timeout=60 if cancel else 1.5)
    scene.source.hooks["query-status"] = never
    with pytest.raises(MoveError, match="cancelled" if cancel else r"not done within 1\.5 s"):
        await scene.move()
    assert scene.steps == [Step.CONNECT, Step.CHECK]


async def test_an_answer_that_says_no(scene: Scene) -> None:
    async def refuse(_qemu: FakeQemu) -> None:
        raise Refusal("never heard of")

    scene.source.hooks["query-version"] = refuse
    with pytest.raises(MoveError, match="query-version: never heard of"):
        await scene.move()


# The way back

STEPS = [Step.RECEIVE, Step.LOG, Step.MEASURE, Step.STATE, Step.SETTINGS]
STEPS += [Step.PRECOPY, Step.STOP, Step.HAND_OVER]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
async def test_cancelled_at_any_step(scene: Scene, step: Step) -> None:
    scene.writes = Writes.AUTO
    scene.limits = Limits(downtime=5, timeout=5, recovery=3)

    def cancel() -> None:
        assert scene.migration is not None
        scene.migration.cancel()

    scene.at(step, cancel)
    await home_again(scene, await scene.move(), Outcome.CANCELLED)


@pytest.mark.parametrize("arrives", [True, False])
async def test_cancelled_when_qemu_was_told_to_go_on(scene: Scene, arrives: bool) -> None:
    """The guest is where QEMU has it by then: it is not called back from a destination that has all of it."""
    going_on = trio.Event()

    async def cancel(qemu: FakeQemu) -> None:
        assert scene.migration is not None
        scene.migration.cancel()
        if not arrives:
            await going_on.wait()  # never: it is cancelled first

    scene.source.hooks["finish"] = cancel
    report = await scene.move()
    if arrives and report.outcome is Outcome.COMPLETED:
        assert (scene.source.running, scene.destination.running, report.guest) == (False, True, "destination")
        assert any("in spite of this the guest arrived: cancelled" in note for note in report.notes)
    else:
        await home_again(scene, report, Outcome.CANCELLED)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
async def test_the_destination_dies_at_any_step(scene: Scene, step: Step) -> None:
    scene.at(step, scene.destination.end)

    async def fail(qemu: FakeQemu) -> None:
        raise Refusal("the other side is gone")

    if STEPS.index(step) < STEPS.index(Step.PRECOPY):
        scene.source.hooks["migrate"] = fail
    elif step is Step.PRECOPY:
        scene.source.may_switch = trio.Event()
        scene.limits = Limits(timeout=2, recovery=3)
    else:
        scene.source.hooks["migrate-continue"] = lambda qemu: qemu.fail("failed")
    report = await scene.move()
    await home_again(scene, report)


async def test_time_is_up(scene: Scene) -> None:
    scene.source.may_switch = trio.Event()
    scene.limits = Limits(timeout=2, recovery=3)
    report = await scene.move()
    await home_again(scene, report)
    assert "not done within 2 s" in str(report.failure)


Act = Callable[[FakeQemu], Awaitable[None]]


async def test_a_state_that_cannot_be_loaded(scene: Scene) -> None:
    async def spoil(_qemu: FakeQemu) -> None:
        await scene.there.call("cancel")

    scene.source.may_switch = trio.Event()
    scene.source.hooks["migrate"] = spoil
    report = await scene.move()
    await home_again(scene, report)
    assert "cancelled" in str(report.failure)


async def test_a_guest_that_resets_its_device_meanwhile_stays(scene: Scene) -> None:
    async def reset(_qemu: FakeQemu) -> None:
        await scene.vmms[0].client.reset()
        await scene.vmms[0].write(0, REGISTER, 0xCAFE)

    scene.source.may_switch = trio.Event()
    scene.source.hooks["migrate"] = reset
    report = await scene.move()
    await home_again(scene, report)
    assert "reset" in str(report.failure)


async def test_somebody_else_cancels(scene: Scene) -> None:
    scene.source.hooks["migrate-continue"] = lambda qemu: qemu.fail("cancelled")
    report = await scene.move()
    await home_again(scene, report)
    assert "migrate-continue" in str(report.failure)


async def test_the_last_pass_fails(scene: Scene) -> None:
    scene.source.hooks["finish"] = lambda qemu: qemu.fail("failed")
    report = await scene.move()
    await home_again(scene, report)
    assert "QEMU's migration failed" in str(report.failure)


async def test_the_destination_is_lost_after_all_was_sent(scene: Scene) -> None:
    """QEMU says "completed" at the source, and the source has its guest back all the same."""
    scene.at(Step.RESTORE, scene.destination.end)
    report = await scene.move()
    await home_again(scene, report)
    assert scene.source.ran == ["cont"]


async def test_a_source_that_is_stuck_in_the_last_pass(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is full, and its main loop waits for it: nothing but `yank` is heard."""
    monkeypatch.setattr(whose, "HEARING", 0.2)
    scene.limits = Limits(downtime=100, standstill=0.5)

    async def stuck(qemu: FakeQemu) -> None:
        await qemu.yanked.wait()

    async def get_stuck(qemu: FakeQemu) -> None:
        qemu.hooks.update(dict.fromkeys(("query-migrate", "query-status"), stuck))
        await stuck(qemu)

    scene.source.hooks["finish"] = get_stuck
    report = await scene.move()
    await home_again(scene, report)
    assert "QEMU has not sent the last pages within 0.7 s" in str(report.failure)
    assert "yank" in scene.source.commands


@pytest.mark.parametrize("running", [True, False])
async def test_somebody_pauses_the_guest_while_it_is_copied(scene: Scene, running: bool) -> None:
    """It arrives as it was at the last look, and nothing before its last pages counts as downtime."""
    scene.source.may_switch = trio.Event()
    scene.source.status = "paused" if running else "running"

    async def change(qemu: FakeQemu) -> None:
        qemu.status = "running" if running else "paused"
        await qemu.tell("RESUME" if running else "STOP")
        await trio.sleep(0.5)
        qemu.may_switch.set()

    async def later(qemu: FakeQemu) -> None:
        assert qemu._nursery is not None
        qemu._nursery.start_soon(change, qemu)

    scene.source.hooks["migrate"] = later
    report = await scene.move()
    assert (report.outcome, scene.destination.running) == (Outcome.COMPLETED, running), report
    assert report.downtime.total < 400


@pytest.mark.parametrize("state_arrives", [True, False])
async def test_a_destination_that_falls_silent_when_all_was_sent(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, state_arrives: bool
) -> None:
    """As a QEMU that waits for a dead server: nobody can say what it has; the source has its guest back."""
    for module, name in ((whose, "ARRIVAL"), (way_back, "END"), (closing, "ANSWER"), (standing, "ANSWER")):
        monkeypatch.setattr(module, name, 0.1)
    scene.limits = Limits(standstill=0.7)

    async def deaf(_qemu: FakeQemu) -> None:
        await trio.sleep_forever()

    async def fall_silent(_qemu: FakeQemu) -> None:
        scene.destination.status = "deaf"
        scene.destination.hooks.update(dict.fromkeys(("query-migrate", "query-status", "quit"), deaf))

    async def late(_path: Path, chunks: AsyncIterable[bytes]) -> None:
        async for _ in chunks:
            pass
        while scene.destination.status != "deaf":  # noqa: ASYNC110 - the fake tells nobody
            await trio.sleep(0.001)
        raise ControlLost("the server is gone")

    if not state_arrives:
        monkeypatch.setattr(carry, "inline_load", late)
    scene.source.hooks["finish"] = fall_silent
    report = await scene.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
    assert scene.source.ran == ["cont"], report
    assert any("told to end, and has not answered" in note for note in report.notes)
    assert any("does not say" in note for note in report.notes) == state_arrives, report.notes


async def test_a_state_that_does_not_fit_when_qemu_is_done(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It travels during the last pass, and may be late."""

    async def late(_path: Path, chunks: AsyncIterable[bytes]) -> None:
        async for _ in chunks:
            pass
        while scene.destination.migration != "completed":  # noqa: ASYNC110 - the fake tells nobody
            await trio.sleep(0.001)
        raise RpcError(FAILED, "it does not fit")

    monkeypatch.setattr(carry, "inline_load", late)
    report = await scene.move()
    await home_again(scene, report)
    assert "it does not fit" in str(report.failure)
    assert scene.source.ran == ["cont"]
    assert scene.destination.status == "gone"


async def test_a_view_that_cannot_be_restored_ends_the_destination_first(scene: Scene) -> None:
    async def elsewhere(qemu: FakeQemu) -> None:
        qemu.vmms = {"other": qemu.vmms["dev"]}  # query-pci shows another device there

    scene.at(Step.RESTORE, lambda: scene.destination.hooks.update({"query-pci": elsewhere}))
    report = await scene.move()
    assert "no PCI device with the id 'dev'" in str(report.failure)
    assert scene.destination.status == "gone"
    await home_again(scene, report)


async def test_a_destination_that_uses_another_server_than_the_one_named(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def elsewhere(*_words: object) -> None:
        """To the server of another guest's device."""

    monkeypatch.setattr(scene.destination, "_output", elsewhere)
    report = await scene.move()
    assert "does not use the server whose control socket is named" in str(report.failure)
    assert "STOP" not in scene.source.ran
    await home_again(scene, report)


# The monitor is lost


async def test_the_source_is_lost_and_found_in_the_last_pass(scene: Scene) -> None:
    async def cut(qemu: FakeQemu) -> None:
        qemu.cut()

    scene.source.hooks["migrate-continue"] = cut
    report = await scene.move()
    assert report.outcome in (Outcome.COMPLETED, Outcome.FAILED)
    if report.outcome is Outcome.COMPLETED:
        assert (scene.source.status, scene.destination.status) == ("postmigrate", "running")
        assert any("arrived" in note for note in report.notes)
    else:
        await home_again(scene, report)


async def test_a_source_that_dies_when_all_was_sent_is_not_missed(scene: Scene) -> None:
    async def die(qemu: FakeQemu) -> None:
        assert qemu.peer is not None
        qemu.peer.status = "paused"
        await qemu.peer.migrates("completed")
        qemu.end()

    scene.source.hooks["finish"] = die
    report = await scene.move()
    assert (report.outcome, report.guest) == (Outcome.COMPLETED, "destination"), report.failure
    assert scene.destination.running
    assert "QEMU cannot be asked" in report.source


async def test_a_source_that_dies_before_all_was_sent_takes_the_guest_along(scene: Scene) -> None:
    async def die(qemu: FakeQemu) -> None:
        assert qemu.peer is not None
        await qemu.peer.migrates("failed")
        qemu.end()

    scene.source.hooks["finish"] = die
    report = await scene.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "nowhere")
    assert not scene.destination.running
    assert scene.destination.ran == []


async def test_a_server_without_a_vmm_is_no_proof_that_qemu_has_ended(scene: Scene) -> None:
    """It may have been dropped by a QEMU that lives, whose monitor cannot be reached: the guest may run."""

    async def start_and_vanish(qemu: FakeQemu) -> None:
        await qemu.start("cont")
        for vmm in qemu.vmms.values():
            vmm.client.close()
        qemu.path.unlink()
        qemu.cut()
        raise Refusal("too late")

    scene.destination.hooks["cont"] = start_and_vanish
    report = await scene.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "unknown"), report
    assert not scene.source.running


@pytest.mark.parametrize("started", [True, False])
async def test_cont_without_an_answer(scene: Scene, started: bool) -> None:
    """The monitor is cut while the destination is told to start; a new connection tells what came of it."""

    async def cut(qemu: FakeQemu) -> None:
        if started:
            await qemu.start("cont")
        qemu.cut()
        raise Refusal("too late")

    scene.destination.hooks["cont"] = cut
    report = await scene.move()
    if started:
        assert (report.outcome, report.guest) == (Outcome.COMPLETED, "destination"), report.failure
        assert not scene.source.running
    else:
        await home_again(scene, report)


async def test_cont_without_an_answer_and_nobody_to_ask(scene: Scene) -> None:
    """The monitor is gone for good, but the QEMU lives: the guest may run there, so it is started nowhere."""

    async def leave(qemu: FakeQemu) -> None:
        qemu.leave_monitor()
        raise Refusal("too late")

    scene.destination.hooks["cont"] = leave
    report = await scene.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "unknown"), report
    assert scene.source.ran == []
    assert (await scene.state(scene.here))["running"] is False
    assert f"({scene.destination.path}) was told to start it" in report.by_hand[0]
    assert report.by_hand[2] == f"then `vfio-user ctl {scene.servers[0].control_path} resume`"


async def test_what_qemu_does_not_take_back_is_said(scene: Scene) -> None:
    async def refuse(_qemu: FakeQemu) -> None:
        raise Refusal("not now")

    scene.limits = Limits(downtime=77, timeout=5, recovery=3)
    scene.at(Step.PRECOPY, lambda: scene.source.hooks.update({"migrate-set-capabilities": refuse}))
    scene.source.hooks["finish"] = lambda qemu: qemu.fail("failed")
    report = await scene.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
    said = [line.partition("` in the source's monitor")[0] for line in report.by_hand]
    assert said == [
        "`migrate_set_capability events off",
        "`migrate_set_capability pause-before-switchover off",
        "`migrate_set_parameter downtime-limit 300",
    ]


async def test_nobody_says_who_has_the_guest(scene: Scene) -> None:
    """The source's monitor hangs in the last pass."""

    async def hang(_qemu: FakeQemu) -> None:
        await trio.sleep_forever()

    async def hang_from_now_on(qemu: FakeQemu) -> None:
        qemu.hooks.update(dict.fromkeys(("query-migrate", "query-status"), hang))
        await hang(qemu)

    scene.limits = Limits(timeout=2, recovery=0.5)
    scene.source.hooks["finish"] = hang_from_now_on
    report = await scene.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "unknown"), report
    assert any("nobody has said within 0.5 s who has the guest" in note for note in report.notes)
    assert "was not told to start it" in report.by_hand[0]
    assert scene.destination.ran == []
