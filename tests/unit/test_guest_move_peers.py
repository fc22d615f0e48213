# SPDX-License-Identifier: BSD-3-Clause
"""A guest's move among peers that answer rubbish, or nothing any more, and with an output that is closed: a
relay between the move and each server says what the server would never say."""

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import trio

from guest_moves.fake_qemu import FakeQemu, Refusal
from guest_moves.pair import move_request, opened_pair
from vfio_user.cli.main import main
from vfio_user.client.background import background
from vfio_user.client.control import ControlClient
from vfio_user.client.qemu_migration.migrate import GuestMigration
from vfio_user.client.qemu_migration.report import MoveError, Outcome, Progress, Report, Step
from vfio_user.client.qemu_migration.request import Limits, Writes

RUBBISH: list[Any] = [{}, [], {"running": False, "client": None}, 7, "state"]


class Relay:
    """Passes on what goes between a controller and a server. `spoilt`: answers in place of a method's."""

    def __init__(self, path: Path, server: Path) -> None:
        self.path = path
        self._server = server
        self.spoilt: dict[str, Any] = {}
        self.later: dict[str, dict[str, Any]] = {}
        """What is spoilt as well once a method was asked for."""
        self.hung = False
        self.asked: list[str] = []
        """The methods, in their order."""
        self.hear: Callable[[str], None] = self.asked.append
        """Is told of each."""
        self._goes_on = trio.Event()

    def hang(self) -> None:
        """As SIGSTOP: the connections stay, and nobody answers."""
        self.hung = True

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            await sock.bind(str(self.path))
            sock.listen(8)
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    peer, _ = await sock.accept()
                    nursery.start_soon(self._connect, trio.SocketStream(peer))

    async def _connect(self, controller: trio.SocketStream) -> None:
        asked: dict[Any, str] = {}
        async with (
            controller,
            await trio.open_unix_socket(str(self._server)) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._pass_on, controller, server, lambda data: self._note(asked, data))
            await self._pass_on(server, controller, lambda data: self._spoil(asked, data))
            nursery.cancel_scope.cancel()

    async def _pass_on(
        self, source: trio.SocketStream, target: trio.SocketStream, change: Callable[[bytes], bytes]
    ) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                if self.hung:
                    await self._goes_on.wait()
                await target.send_all(change(bytes(data)))
            await target.send_eof()

    def _note(self, asked: dict[Any, str], data: bytes) -> bytes:
        for line in data.splitlines():
            with suppress(ValueError, TypeError, KeyError):
                call = json.loads(line)
                asked[call["id"]] = call["method"]
                self.hear(call["method"])
                self.spoilt |= self.later.pop(call["method"], {})
        return data

    def _spoil(self, asked: dict[Any, str], data: bytes) -> bytes:
        if not self.spoilt:
            return data
        lines = [self._spoil_line(asked, line) for line in data.splitlines(keepends=True)]
        return b"".join(lines)

    def _spoil_line(self, asked: dict[Any, str], line: bytes) -> bytes:
        with suppress(ValueError, TypeError, KeyError):
            answer = json.loads(line)
            method = asked[answer["id"]]
            if method in self.spoilt:
                answer = {"jsonrpc": "2.0", "id": answer["id"], "result": self.spoilt[method]}
                return json.dumps(answer).encode() + b"\n"
        return line


@dataclass
class Peers:
    source: FakeQemu
    destination: FakeQemu
    here: Relay
    there: Relay
    control: ControlClient
    """Straight to the source's server."""
    limits: Limits = field(default_factory=lambda: Limits(timeout=8, stop=1, recovery=3))
    at: dict[Step, Callable[[], None]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)

    def tell(self, progress: Progress) -> None:
        if progress.way_back:
            self.undone.append(progress.way_back)
            raise RuntimeError("nobody listens")  # which keeps nothing from being undone
        if progress.step not in self.steps:
            self.steps.append(progress.step)
            self.at.get(progress.step, lambda: None)()

    async def move(self) -> Report:
        ends, paths = (self.source, self.destination), (self.here.path, self.there.path)
        request = move_request(ends, paths, self.limits, Writes.HAND_OVER)
        with trio.fail_after(20):
            return await GuestMigration(request, self.tell).run()


@pytest.fixture
async def peers(tmp_path: Path) -> AsyncIterator[Peers]:
    async with opened_pair(tmp_path) as pair, background() as nursery:
        a, b = pair.servers
        here, there = Relay(tmp_path / "here", a.control_path), Relay(tmp_path / "there", b.control_path)
        await nursery.start(here.serve)
        await nursery.start(there.serve)
        yield Peers(*pair.qemus, here, there, pair.controls[0])


@pytest.mark.parametrize("rubbish", RUBBISH, ids=str)
async def test_rubbish_on_the_way_back_keeps_no_row_from_running(peers: Peers, rubbish: Any) -> None:
    def spoil() -> None:
        peers.here.spoilt = {"state": rubbish}

    peers.at[Step.LAST_PASS] = spoil
    peers.source.hooks["finish"] = lambda qemu: qemu.fail("failed")
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source")
    assert peers.source.running
    assert any(
        "dev does not go on at the source: the server's answer makes no" in note for note in report.notes
    )
    state = await peers.control.call("state")
    assert (state["running"], state["dirty_log"]["owner"]) == (True, None)
    assert not any(peers.source.capabilities.values())
    assert "its guest runs; dev is in a state that cannot be told" in report.source


async def stopped_with_pages(peers: Peers) -> Any:
    """An answer to `stop`, after which the log has to be handed over."""
    configuration = await peers.control.call("configuration")
    log = {"owner": "controller", "pages": 5, "bytes": 5 << 12, "lost": False}
    return {"running": False, "unanswered_dma": 0, "dirty_log": log, "configuration": configuration}


@pytest.mark.parametrize("part", ["dirty_log", "configuration"])
@pytest.mark.parametrize("rubbish", [{}, [], {"pages": "many"}], ids=str)
async def test_half_an_answer_to_stop_leads_back(peers: Peers, part: str, rubbish: Any) -> None:
    stopped = await stopped_with_pages(peers)
    peers.at[Step.STOP] = lambda: peers.here.spoilt.update(stop=stopped | {part: rubbish})
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source")
    complaint = str(report.failure)
    assert "the server's answer makes no sense" in complaint or "does not tell the configuration" in complaint
    assert peers.source.running


@pytest.mark.parametrize("pages", ["5", -1, True, None, 1 << 60, 5.0], ids=str)
async def test_pages_that_cannot_be_lead_back(peers: Peers, pages: Any) -> None:
    """How many were handed over, as the server says."""
    stopped = await stopped_with_pages(peers)
    peers.at[Step.STOP] = lambda: peers.here.spoilt.update(
        {"stop": stopped, "log-hand-over": {"pages": pages}}
    )
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source")
    assert f"pages is {pages!r}, and should be a number" in str(report.failure)
    assert peers.source.running


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"running": None}, "running is None, and should be true or false"),
        ({"running": True}, "dev does not stop: it runs"),
        ({"unanswered_dma": "0"}, "unanswered_dma is '0', and should be a number"),
        ({"unanswered_dma": 3}, "3 accesses to guest memory have no reply"),
        ({"dirty_log": {"owner": None, "pages": 0, "lost": False}}, "somebody has ended the dirty log"),
        ({"dirty_log": {"owner": "controller", "pages": 0, "lost": True}}, "its dirty log was lost"),
        ({}, "0 of 5 dirty pages were handed over"),
    ],
    ids=str,
)
async def test_a_stop_that_is_none_leads_back(peers: Peers, changes: dict[str, Any], words: str) -> None:
    stopped = await stopped_with_pages(peers)
    peers.at[Step.STOP] = lambda: peers.here.spoilt.update(stop=stopped | changes)
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source")
    assert words in str(report.failure)
    assert peers.source.running


@pytest.mark.parametrize(
    ("step", "method"),
    [(Step.PRECOPY, "state"), (Step.STOP, "stop"), (Step.STOP, "log-hand-over")],
)
@pytest.mark.parametrize("rubbish", [{}, []], ids=str)
async def test_rubbish_at_any_step_leads_back(peers: Peers, step: Step, method: str, rubbish: Any) -> None:
    stopped = await stopped_with_pages(peers)

    def spoil() -> None:
        peers.here.spoilt = {"stop": stopped, method: rubbish}

    peers.at[step] = spoil
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source")
    assert "the server's answer makes no sense" in str(report.failure)
    assert peers.source.running
    assert (await peers.control.call("state"))["running"] is True


@pytest.mark.parametrize("method", ["state", "configuration"])
@pytest.mark.parametrize("rubbish", [{}, []], ids=str)
async def test_rubbish_before_anything_is_touched(peers: Peers, method: str, rubbish: Any) -> None:
    peers.there.spoilt = {method: rubbish}
    with pytest.raises(MoveError) as failed:
        await peers.move()
    assert "\n" not in str(failed.value)
    assert peers.steps == [Step.CONNECT, Step.CHECK]


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_server_that_never_answers_is_named(
    peers: Peers, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfio_user.client.qemu_migration.precopy.ANSWER", 0.1)
    relay = peers.here if side == "source" else peers.there
    relay.hang()
    with pytest.raises(MoveError) as failed:
        await peers.move()
    assert str(failed.value) == (
        f"dev: the {side}'s server ({relay.path}) does not answer within 0.1 s: is it the control socket?"
    )
    assert peers.steps == [Step.CONNECT, Step.CHECK]


async def test_a_server_that_hangs_holds_the_guest_up_for_a_short_time_only(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfio_user.client.qemu_migration.way_back.RESUME", 0.2)
    monkeypatch.setattr("vfio_user.client.qemu_migration.standing.ANSWER", 0.2)
    peers.limits = Limits(timeout=60, standstill=0.3, recovery=0.5)
    stopped = await stopped_with_pages(peers)
    peers.at[Step.STOP] = lambda: peers.here.spoilt.update(stop=stopped)
    peers.at[Step.HAND_OVER] = peers.here.hang
    began = trio.current_time()
    report = await peers.move()
    assert trio.current_time() - began < 6
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source")
    assert "the devices were not handed over within 0.3 s" in str(report.failure)
    assert peers.source.running
    assert any("dev does not go on at the source: no answer within 0.2 s" in note for note in report.notes)


# What runs at the destination already


class StartRefused:
    """`cont` is refused at the destination; from there on `order` has what is asked of both servers."""

    def __init__(self, peers: Peers) -> None:
        self.order: list[str] = []
        peers.here.hear = lambda method: self.order.append(f"here {method}")
        peers.there.hear = lambda method: self.order.append(f"there {method}")
        peers.destination.hooks["cont"] = self._refuse

    async def _refuse(self, _qemu: FakeQemu) -> None:
        self.order.clear()
        raise Refusal("not now")


async def test_the_destination_s_devices_stop_before_the_source_s_go_on(peers: Peers) -> None:
    refused = StartRefused(peers)
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
    calls = [call for call in refused.order if call in ("there stop", "there reset", "here resume")]
    assert calls[:3] == ["there stop", "there reset", "here resume"]
    assert peers.source.ran == ["cont"]
    assert peers.destination.ran == []
    assert (await peers.control.call("state"))["running"] is True


async def test_a_destination_that_does_not_stop_holds_nothing_up(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfio_user.client.qemu_migration.way_back.RESUME", 0.2)
    monkeypatch.setattr("vfio_user.client.qemu_migration.standing.ANSWER", 0.2)
    peers.limits = Limits(timeout=60, recovery=1)
    refused = StartRefused(peers)
    refuse = peers.destination.hooks["cont"]

    async def hang(qemu: FakeQemu) -> None:
        peers.there.hang()
        await refuse(qemu)

    peers.destination.hooks["cont"] = hang
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
    assert peers.source.running
    assert "here resume" in refused.order
    assert any("dev may run at the destination, too" in note for note in report.notes)


async def test_a_destination_that_hangs_is_no_silence(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's guest runs: that is said before anybody waits for a reset, and for that not long."""
    monkeypatch.setattr("vfio_user.client.qemu_migration.way_back.RESUME", 0.2)
    monkeypatch.setattr("vfio_user.client.qemu_migration.way_back.RESET", 0.2)
    monkeypatch.setattr("vfio_user.client.qemu_migration.standing.ANSWER", 0.2)
    peers.limits = Limits(timeout=60, standstill=0.3, recovery=30)
    peers.at[Step.LAST_PASS] = peers.there.hang
    with trio.fail_after(5):
        report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
    runs = peers.undone.index("the source's guest runs again")
    assert peers.undone[:runs] == []  # it stood still: no output may hold that up
    assert "reset the destination's devices" in peers.undone[runs:]
    assert any("dev: no answer within 0.2 s" in note for note in report.notes), report.notes


async def test_of_a_move_that_failed_the_time_is_told_that_the_guest_stood_still(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From QEMU's stop to its RESUME: not the parts that were done by then, nor what the way back took."""
    monkeypatch.setattr("vfio_user.client.qemu_migration.way_back.RESUME", 0.1)
    monkeypatch.setattr("vfio_user.client.qemu_migration.way_back.RESET", 0.5)
    monkeypatch.setattr("vfio_user.client.qemu_migration.standing.ANSWER", 0.1)
    peers.limits = Limits(timeout=60, standstill=0.3, recovery=30)
    peers.at[Step.LAST_PASS] = peers.there.hang
    report = await peers.move()
    assert report.outcome is Outcome.FAILED
    assert 300 <= report.stood_still < report.seconds * 1000 - 500
    assert report.downtime.total == 0
    assert not any(one.stopped or one.at + one.ms > report.seconds * 1000 - 800 for one in report.rounds)


async def test_what_is_undone_while_the_guest_runs_is_told_as_it_happens(peers: Peers) -> None:
    peers.source.may_switch = trio.Event()
    peers.limits = Limits(timeout=0.4, stop=1, recovery=3)
    report = await peers.move()
    assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
    assert peers.undone[0] == "reach servers whose connections were lost"
    assert "the source's guest runs again" not in peers.undone  # it never stood still
    assert not [one for one in report.samples if one.way_back]


# The output


def full() -> Any:
    """Takes nothing: ENOSPC."""
    return open("/dev/full", "w")


def nobody_reads() -> Any:
    """As after `| head -1`: EPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def run(words: list[str], output: Any) -> tuple[object, str]:
    """Exit status and standard error."""
    errors = StringIO()
    with output, redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main.main(["migrate", *words], prog_name="vfio-user")
    return ended.value.code or 0, errors.getvalue()


async def move_by_command(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, folder: Path, output: Any
) -> tuple[object, str, Any]:
    """Exit status, standard error, report. In a thread: the command has an event loop of its own."""
    monkeypatch.setattr("vfio_user.cli.migrate._signals_cancel", lambda *_: nullcontext())
    report = folder / "report.json"
    words = ["tcp:127.0.0.1:4444", "--source-qmp", str(peers.source.path), "--writes", "hand-over"]
    words += ["--destination-qmp", str(peers.destination.path), "--report", str(report)]
    words += ["--device", f"dev={peers.here.path},{peers.there.path}"]
    with trio.fail_after(20):
        status, errors = await trio.to_thread.run_sync(run, words, output)
    return status, errors, json.loads(report.read_text())


@pytest.mark.parametrize("closed", [full, nobody_reads])
async def test_a_closed_output_decides_nothing(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: Callable[[], Any]
) -> None:
    status, errors, report = await move_by_command(peers, monkeypatch, tmp_path, closed())
    assert (status, errors, report["outcome"]) == (0, "", "completed")
    assert peers.destination.running
    assert peers.there.asked.count("announce") == 1
    assert peers.here.asked.count("log-stop") == 1


@pytest.mark.parametrize("rubbish", RUBBISH, ids=str)
async def test_rubbish_after_a_good_move_changes_nothing_of_it(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rubbish: Any
) -> None:
    peers.there.later = {"announce": {"state": rubbish}}
    status, errors, report = await move_by_command(peers, monkeypatch, tmp_path, StringIO())
    assert (status, errors, report["outcome"], report["guest"]) == (0, "", "completed", "destination")
    assert "its guest runs; dev is in a state that cannot be told" in report["destination"]
