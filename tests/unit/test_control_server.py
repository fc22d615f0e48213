# SPDX-License-Identifier: BSD-3-Clause
"""The control socket over a real one: who may use it, what it takes, and stop, resume, reset, shutdown."""

import errno
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from migration.control_bed import (
    SMALL_RAM,
    opened,
    refused,
    save,
    serving,
    set_state,
)
from vfio_user.client.control import ControlClient, ControlLost, open_control
from vfio_user.client.errors import RemoteError
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.protocol import json_rpc
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.json_rpc import RpcError
from vfio_user.server import control
from vfio_user.server.control import ControlServer, may_control
from vfio_user.transport.listener import ListenError


def test_who_may_control() -> None:
    assert may_control(0, 1000)
    assert may_control(1000, 1000)
    assert not may_control(1001, 1000)
    assert may_control(0, 0)
    assert not may_control(1, 0)


def test_the_peer_is_who_the_kernel_says() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert control.peer_uid(ours) == os.getuid()


async def test_somebody_else_is_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "peer_uid", lambda sock: 4711)
    monkeypatch.setattr(os, "geteuid", lambda: 4712)
    async with serving(tmp_path) as served, open_control(served.control_path) as controller:
        with pytest.raises(ControlLost):
            await controller.call("state")


async def test_the_file_is_for_its_owner_and_goes_at_the_end(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(tmp_path) as served:
            assert stat.S_IMODE(served.control_path.stat().st_mode) == 0o600
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o777  # the umask was put back
            with pytest.raises(ListenError, match="served by another process"):
                ControlServer(served.server, "native", served.control_path, lambda: None)
            (tmp_path / "file").touch()
            with pytest.raises(ListenError, match="not a socket"):
                ControlServer(served.server, "native", tmp_path / "file", lambda: None)
    finally:
        os.umask(before)
    assert not served.control_path.exists()


class Raw:
    """A connection that says anything."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def ask(self, line: bytes) -> Any:
        await self.stream.send_all(line)
        data = b""
        while not data.endswith(b"\n"):
            part = await self.stream.receive_some(65536)
            if not part:
                return data
            data += part
        return json.loads(data)


@asynccontextmanager
async def raw(path: Path) -> AsyncIterator[Raw]:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.connect(os.fspath(path))
    async with trio.SocketStream(sock) as stream:
        yield Raw(stream)


async def test_bad_requests_get_an_error_and_the_connection_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, raw(served.control_path) as connection:
        for line, code in (
            (b"nonsense\n", json_rpc.PARSE_ERROR),
            (b"[]\n", json_rpc.INVALID_REQUEST),
            (b'{"jsonrpc":"2.0","id":1,"method":"fly"}\n', json_rpc.METHOD_NOT_FOUND),
            (b'{"jsonrpc":"2.0","id":1,"method":"stop","params":{"wait":"x"}}\n', json_rpc.INVALID_PARAMS),
            (b'{"jsonrpc":"2.0","id":1,"method":"stop","params":{"wait":true}}\n', json_rpc.INVALID_PARAMS),
            (b'{"jsonrpc":"2.0","id":1,"method":"stop","params":{"speed":1}}\n', json_rpc.INVALID_PARAMS),
            (b'{"jsonrpc":"2.0","id":1,"method":"write-through"}\n', json_rpc.INVALID_PARAMS),
            (b'{"jsonrpc":"2.0","id":1,"method":"save"}\n', json_rpc.INVALID_PARAMS),
        ):
            assert (await connection.ask(line))["error"]["code"] == code, line
        both = b'{"jsonrpc":"2.0","method":"stop"}\n{"jsonrpc":"2.0","id":5,"method":"state"}\n'
        answer = await connection.ask(both)
        assert (answer["id"], answer["result"]["migration"]["state"]) == (5, "STOP")  # a notification works


async def test_a_huge_request_ends_its_connection_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, open_control(served.control_path) as other:
        async with raw(served.control_path) as connection:
            answer = await connection.ask(b"x" * (json_rpc.MAX_LINE + 1))
            assert answer["error"]["code"] == json_rpc.INVALID_REQUEST
            assert await connection.stream.receive_some(1) == b""
        assert (await other.call("state"))["model"] == "scratch"


async def test_descriptors_that_nobody_wants_are_closed(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, open_control(served.control_path) as controller:
        await controller.call("state")
        before = len(os.listdir("/proc/self/fd"))
        with (tmp_path / "f").open("wb") as file:
            for method in ("state", "fly", "load"):
                with pytest.raises(RpcError):
                    await controller.call(method, fd=file.fileno())
        folder = os.open(tmp_path, os.O_RDONLY)
        with refused("no file, pipe or stream socket"):
            await controller.call("load", fd=folder)
        os.close(folder)
        assert len(os.listdir("/proc/self/fd")) == before


async def test_more_controllers_than_there_is_room_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as served, trio.open_nursery() as nursery:
        for _ in range(control.MAX_CONTROLLERS):
            controller = await nursery.start(_stay, served.control_path)
        async with open_control(served.control_path) as one_more:
            with pytest.raises(ControlLost):
                await one_more.call("state")
        assert "was turned away: 16 are connected already" in caplog.text
        assert (await controller.call("state"))["engine"] == "native"
        nursery.cancel_scope.cancel()


async def _stay(path: Path, task_status: trio.TaskStatus[ControlClient] = trio.TASK_STATUS_IGNORED) -> None:
    async with open_control(path) as controller:
        await controller.call("state")
        task_status.started(controller)
        await trio.sleep_forever()


# State, stop, resume, reset, shutdown


async def test_state_with_and_without_a_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, open_control(served.control_path) as controller:
        state = await controller.call("state")
        assert state["client"] == {"attached": False, "served": 0, "migrates_by": None}
        assert not state["running"]
        async with open_vmm(served.path, SMALL_RAM) as vmm:
            await vmm.read(0, 0)
            state = await controller.call("state")
            assert state["client"] == {"attached": True, "served": 1, "migrates_by": None}
            assert state["running"]
            assert state["bus_master"]
            assert state["memory"] == {"mapped": 1 << 20, "file": 0, "message": 0}
            assert state["dirty_log"]["owner"] is None


async def test_a_stopped_device_does_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        vmm.ram.write(0x1000, b"x" * 100)
        assert await controller.call("stop") == {"running": False, "unanswered_dma": 0}
        assert await controller.call("stop") == {"running": False, "unanswered_dma": 0}
        await vmm.write(0, 0xFE0, 0x1000, width=8)
        await vmm.write(0, 0xFE8, 0x2000, width=8)
        await vmm.write(0, 0xFF0, 100)
        await vmm.write(0, 0xFF8, 1)
        assert await vmm.read(0, 0xFFC) == 1  # busy, and stays so
        assert vmm.ram.read(0x2000, 100) == bytes(100)
        assert (await controller.call("state"))["migration"] == {
            "available": True,
            "state": "STOP",
            "owner": "controller",
            "reason": "",
        }
        assert await controller.call("resume") == {"running": True}
        await vmm.intx.wait()
        assert vmm.ram.read(0x2000, 100) == b"x" * 100
        assert await controller.call("resume") == {"running": True}


async def test_stop_waits_for_what_the_client_owes(tmp_path: Path) -> None:
    """By message: the writes that were sent before the stop are answered, and none is sent after."""
    options = VmmOptions(((0, 1 << 20),), shared=False)
    async with opened(tmp_path, options=options) as (served, controller, vmm):
        await vmm.write(0, 0xFE8, 0x80000, width=8)
        await vmm.write(0, 0xFF0, 0x70000)
        await vmm.write(0, 0xFF8, 1)
        assert (await controller.call("stop"))["unanswered_dma"] == 0
        assert served.server.outstanding == 0
        await controller.call("resume")
        await vmm.intx.wait()
        assert await vmm.read(0, 0xFF4) == 0x70000


async def test_the_client_and_a_controller_do_not_migrate_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        migration = served.server.host.migration
        await controller.call("stop")
        with pytest.raises(RemoteError) as raised:
            await set_state(vmm, MigrationState.RUNNING)
        assert raised.value.errno == errno.EBUSY
        await controller.call("resume")
        await set_state(vmm, MigrationState.PRE_COPY)
        for method in ("stop", "resume"):
            with refused("the client moves the device itself"):
                await controller.call(method)
        with refused("the client moves"):
            await save(controller, tmp_path / "f")
        assert migration.state is MigrationState.PRE_COPY
        await set_state(vmm, MigrationState.RUNNING)
        await controller.call("stop")


async def test_a_reset_by_the_client_ends_a_stop(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        await controller.call("stop")
        await vmm.client.reset()
        state = await controller.call("state")
        assert (state["running"], state["migration"]["owner"]) == (True, "client")


async def test_reset_and_shutdown(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await vmm.write(0, 0, 42)
        await controller.call("stop")
        assert await controller.call("reset") == {"running": True}
        assert await vmm.read(0, 0) == 0
        assert await controller.call("shutdown") == {}
        with trio.fail_after(5):
            await served.ended.wait()
