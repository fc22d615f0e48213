# SPDX-License-Identifier: BSD-3-Clause
"""The QMP client against a monitor of a few lines; tests/qemu has the real one."""

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from vfio_user.client.qemu_migration.qmp import Qmp, QmpError, QmpLost, open_qmp, parse_address

GREETING = {"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}}, "capabilities": []}}
Send = Callable[[dict[str, Any]], Awaitable[None]]


def event(name: str, **data: object) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 5, "microseconds": 250_000}}


class Monitor:
    """Answers a command with its arguments; a few names do something else."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.held = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        await self._send(stream, GREETING)
        rest, decoder = "", json.JSONDecoder()
        async for data in stream:
            rest += data.decode()
            while rest:  # commands follow each other without a separator, and come whole in these tests
                message, end = decoder.raw_decode(rest)
                rest = rest[end:].lstrip()
                await self._execute(stream, message)

    async def _execute(self, stream: trio.SocketStream, message: dict[str, Any]) -> None:
        name, args = message["execute"], message.get("arguments", {})
        self.seen.append(name)
        answer: dict[str, Any] = {"return": args}
        if name == "refused":
            answer = {"error": {"class": "CommandNotFound", "desc": "never heard of"}}
        elif name == "stop":
            await self._send(stream, event("STOP"))
            await self._send(stream, event("MIGRATION", status="active"))
        elif name == "quit":
            await stream.aclose()
            return
        elif name == "hold":
            await self.held.wait()
        await self._send(stream, answer | {key: message[key] for key in ("id",) if key in message})

    async def _send(self, stream: trio.SocketStream, message: dict[str, Any]) -> None:
        await stream.send_all(json.dumps(message).encode() + b"\r\n")


@contextlib.asynccontextmanager
async def monitor(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """A TCP monitor on loopback: its address."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await handler(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        port = listener.socket.getsockname()[1]
        yield f"127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


@pytest.fixture
async def qmp() -> AsyncIterator[Qmp]:
    async with monitor(Monitor().serve) as address, open_qmp(address) as connection:
        yield connection


async def test_commands_answers_and_refusals(qmp: Qmp) -> None:
    assert await qmp.execute("migrate-set-parameters", **{"downtime-limit": 20}) == {"downtime-limit": 20}
    with pytest.raises(QmpError, match="refused: never heard of") as caught:
        await qmp.execute("refused")
    assert (caught.value.error_class, caught.value.description) == ("CommandNotFound", "never heard of")
    assert await qmp.execute("name", name="x") == {"name": "x"}
    assert not qmp.lost.is_set()


async def test_several_commands_at_once_keep_their_order() -> None:
    peer = Monitor()
    async with monitor(peer.serve) as address, open_qmp(address) as qmp:
        commands = [(f"c{number}", {"n": number}) for number in range(50)]
        assert await qmp.execute_all(commands) == [{"n": number} for number in range(50)]
        assert peer.seen[1:] == [name for name, _ in commands]
        with pytest.raises(QmpError, match="refused"):
            await qmp.execute_all([("refused", {}), ("after", {})])
        assert peer.seen[-1] == "after"


async def test_events_before_an_answer_are_there_with_it(qmp: Qmp) -> None:
    with qmp.listen() as everything, qmp.listen("MIGRATION") as some:
        await qmp.execute("stop")
        assert [seen.name for seen in everything.ready()] == ["STOP", "MIGRATION"]
        (migration,) = some.ready()
        assert some.ready() == []
    assert (migration.data, migration.time) == ({"status": "active"}, 5.25)


async def test_waiting_for_an_event_of_a_name(qmp: Qmp) -> None:
    names: list[str] = []
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            names.append((await qmp.wait_event("MIGRATION", "RESET")).name)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await qmp.execute("stop")
    assert names == ["MIGRATION"]


async def test_the_end_of_the_connection_reaches_everyone(qmp: Qmp) -> None:
    with qmp.listen("STOP") as events:
        await qmp.execute("stop")
        with pytest.raises(QmpLost, match="ended during quit"):
            await qmp.execute("quit")
        with trio.fail_after(5):
            await qmp.lost.wait()
        assert "QEMU has ended the connection" in qmp.lost_reason
        with pytest.raises(QmpLost, match="QEMU has ended the connection"):
            await qmp.execute("after")
        assert (await events.next()).name == "STOP"
        with pytest.raises(QmpLost, match="QEMU has ended"):
            await events.next()
    with pytest.raises(QmpLost):
        await qmp.wait_event("STOP")


async def test_a_cancelled_command_leaves_the_connection_usable() -> None:
    peer = Monitor()
    async with monitor(peer.serve) as address, open_qmp(address) as qmp:
        with trio.move_on_after(0.01) as scope:
            await qmp.execute("hold")
        assert scope.cancelled_caught
        peer.held.set()
        assert await qmp.execute("next", a=1) == {"a": 1}


async def test_no_monitor_at_all(tmp_path: Path) -> None:
    with pytest.raises(QmpLost, match="cannot be connected to: No such file"):
        async with open_qmp(str(tmp_path / "absent")):
            pass


async def test_a_monitor_that_serves_another_client_is_silent() -> None:
    async def silent(_stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with monitor(silent) as address:
        with pytest.raises(QmpLost, match="no greeting within"):
            async with open_qmp(address, timeout=0.02):
                pass


@pytest.mark.parametrize(
    ("said", "reason"),
    [(b"", "connection ended"), (b"SSH-2.0-OpenSSH\r\n", "no QMP monitor"), (b"{}\r\n", "no QMP monitor")],
)
async def test_something_else_than_a_monitor(said: bytes, reason: str) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(said)
        await stream.aclose()

    async with monitor(handler) as address:
        with pytest.raises(QmpLost, match=reason):
            async with open_qmp(address):
                pass


async def test_two_connections_share_a_thread_that_ends_with_the_last() -> None:
    before = threading.active_count()
    async with monitor(Monitor().serve) as address, open_qmp(address) as first:
        async with open_qmp(address) as second:
            assert await first.execute("a", a=1) == {"a": 1}
            assert await second.execute("b", b=1) == {"b": 1}
            assert threading.active_count() == before + 1
        assert await first.execute("a", a=2) == {"a": 2}
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("/run/qmp", "/run/qmp"),
        ("/run/a:1", "/run/a:1"),
        ("qmp", "qmp"),
        ("host:4444", ("host", 4444)),
        ("[::1]:4444", ("::1", 4444)),
        ("host:name", "host:name"),
    ],
)
def test_addresses(address: str, parsed: object) -> None:
    assert parse_address(address) == parsed
