# SPDX-License-Identifier: BSD-3-Clause
"""The control socket of a server in this process, over a real socket, with a VMM beside it."""

import errno
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from golden import scenes
from vfio_user.client.background import background
from vfio_user.client.control import ControlClient, ControlLost, open_control
from vfio_user.client.errors import RemoteError
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions, open_vmm
from vfio_user.device_models.device import Device, Host
from vfio_user.device_models.e1000.bench import RecordingPort
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.fake_migration import restore_device
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol import json_rpc, layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import DeviceFeature, MigrationState
from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.json_rpc import RpcError
from vfio_user.server import control
from vfio_user.server.control import ControlServer, may_control
from vfio_user.server.control_device import ANNOUNCEMENTS
from vfio_user.server.engines.native import NativeServer, Settings
from vfio_user.server.migration.writer import StreamWriter
from vfio_user.transport.listener import ListenError

SMALL_RAM = VmmOptions(((0, 1 << 20),))


@dataclass
class Served:
    server: NativeServer
    path: Path
    control_path: Path
    ended: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def serving(
    folder: Path, make: Callable[[Host], Device] = Scratch, name: str = "s"
) -> AsyncIterator[Served]:
    with ExitStack() as stack:
        server = stack.enter_context(NativeServer(Settings(spin_us=0)))
        server.install(make)
        server.listen_at(folder / name)
        served = Served(server, folder / name, folder / f"{name}.control")
        controls = ControlServer(server, "native", served.control_path, served.ended.set)
        stack.callback(controls.close)
        async with background() as nursery:
            nursery.start_soon(server.run)
            yield served


def make_large(host: Host) -> Scratch:
    return Scratch(host, memory=16 << 20)


@asynccontextmanager
async def opened(
    folder: Path, make: Callable[[Host], Device] = Scratch, name: str = "s", options: VmmOptions = SMALL_RAM
) -> AsyncIterator[tuple[Served, ControlClient, FakeVmm]]:
    """A server, a controller, and a VMM."""
    async with (
        serving(folder, make, name) as served,
        open_control(served.control_path) as controller,
        open_vmm(served.path, options) as vmm,
    ):
        yield served, controller, vmm


async def save(controller: ControlClient, path: Path, **params: Any) -> Any:
    with path.open("wb") as file:
        return await controller.call("save", fd=file.fileno(), **params)


async def load(controller: ControlClient, path: Path) -> Any:
    with path.open("rb") as file:
        return await controller.call("load", fd=file.fileno())


async def copy(vmm: FakeVmm, source: int, target: int, length: int) -> None:
    """Let `scratch` copy, and wait for the interrupt."""
    await vmm.write(0, 0xFE0, source, width=8)
    await vmm.write(0, 0xFE8, target, width=8)
    await vmm.write(0, 0xFF0, length)
    await vmm.write(0, 0xFF8, 1)
    await vmm.intx.wait()
    await vmm.write(0, 0xFFC, 2)
    await vmm.intx.acknowledge()


def listen(vmm: FakeVmm) -> list[tuple[int, int]]:
    """Address and length of each DMA_WRITE that comes from now on."""
    told: list[tuple[int, int]] = []
    write = vmm.dma_write

    def note(address: int, data: m.Payload) -> None:
        told.append((address, len(data)))
        write(address, data)

    vmm.dma_write = note  # type: ignore[method-assign]
    return told


async def set_state(vmm: FakeVmm, state: MigrationState) -> None:
    """As a client that migrates its device by v2."""
    data = layouts.build(m.FeatureMigState(state, 0xFFFFFFFF))
    await vmm.client.set_feature(DeviceFeature.MIG_DEVICE_STATE, data)


def refused(match: str) -> Any:
    return pytest.raises(RpcError, match=match)


# The socket


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


async def test_more_controllers_than_there_is_room_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, trio.open_nursery() as nursery:
        for _ in range(control.MAX_CONTROLLERS):
            controller = await nursery.start(_stay, served.control_path)
        async with open_control(served.control_path) as one_more:
            with pytest.raises(ControlLost):
                await one_more.call("state")
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
        assert state["client"] == {"attached": False, "served": 0}
        assert not state["running"]
        async with open_vmm(served.path, SMALL_RAM) as vmm:
            await vmm.read(0, 0)
            state = await controller.call("state")
            assert state["client"] == {"attached": True, "served": 1}
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


# Save and load


async def test_saved_on_one_server_and_loaded_on_another(tmp_path: Path) -> None:
    async with (
        opened(tmp_path, make_large) as (_, here, vmm),
        opened(tmp_path, make_large, "t") as (_, there, other),
    ):
        await vmm.write(0, 0x10, 0xCAFE)
        await vmm.write(2, 0x80_0000, 0xBEEF)
        assert (await save(here, tmp_path / "f"))["running"]
        with refused("the device runs"):
            await load(there, tmp_path / "f")
        await there.call("stop")
        result = await load(there, tmp_path / "f")
        assert result == {"bytes": (tmp_path / "f").stat().st_size, "running": False}
        assert await there.call("resume") == {"running": True}
        assert await other.read(0, 0x10) == 0xCAFE
        assert await other.read(2, 0x80_0000) == 0xBEEF
        await vmm.write(0, 0x10, 1)
        assert await vmm.read(0, 0x10) == 1  # and the first one goes on


def make_e1000(host: Host) -> E1000:
    return E1000(host, RecordingPort())


def golden_stream() -> bytes:
    host, device = scenes.SCENES["e1000"][1]()
    restore_device(host, device, scenes.read(scenes.files("e1000")[-1]))
    writer = StreamWriter(device)
    writer.finish()
    return b"".join(iter(lambda: b"".join(writer.take(1 << 20)), b""))


async def test_the_golden_state_of_the_e1000_goes_in_and_comes_out(tmp_path: Path) -> None:
    """Before any client: what is loaded waits for one, as a device that was just made."""
    stream = golden_stream()
    (tmp_path / "golden").write_bytes(stream)
    async with serving(tmp_path, make_e1000) as served, open_control(served.control_path) as controller:
        assert (await load(controller, tmp_path / "golden"))["bytes"] == len(stream)
        assert (await controller.call("state"))["migration"]["owner"] == "client"
        await save(controller, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == stream


async def test_over_pipes_from_server_to_server(tmp_path: Path) -> None:
    """Held until a stop, as for a move: nothing of it is ever whole in one place."""
    async with (
        opened(tmp_path, make_large) as (source, here, vmm),
        serving(tmp_path, make_large, "t") as target,
        open_control(target.control_path) as there,
        open_control(tmp_path / "s.control") as second,
    ):
        for offset in range(0, 16 << 20, 1 << 20):
            await vmm.write(2, offset, offset + 7)
        results: dict[str, Any] = {}
        reader, writer = os.pipe()

        async def call(name: str, controller: ControlClient, fd: int, **params: Any) -> None:
            results[name] = await controller.call(name, fd=fd, **params)
            os.close(fd)  # the reader sees the end when both the server and we have closed it

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: call("save", here, writer, hold=True))
            nursery.start_soon(call, "load", there, reader)
            await until(second, lambda state: state["transfer"])
            await vmm.write(2, 64, 99)
            assert await second.call("stop") == {"running": False, "unanswered_dma": 0}
        assert results["save"]["bytes"] == results["load"]["bytes"]
        assert not results["save"]["running"]
        assert (await second.call("state"))["migration"]["state"] == "STOP"
        memories = [server.server.device.memories() for server in (source, target) if server.server.device]
        (moved,) = {name: bytes(memory.view) for name, memory in memories[1].items()}.values()
        assert moved == bytes(next(iter(memories[0].values())).view)
        assert int.from_bytes(moved[64:68], "little") == 99


async def until(controller: ControlClient, wanted: Callable[[Any], Any]) -> Any:
    """The state once it is as wanted."""
    with trio.fail_after(5):
        while not wanted(state := await controller.call("state")):  # noqa: ASYNC110
            await trio.sleep(0.002)
    return state


async def test_a_disk_that_is_full(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (_, controller, vmm):
        await vmm.write(0, 0, 5)
        with open("/dev/full", "wb", buffering=0) as full, refused("No space left"):  # noqa: ASYNC230
            await controller.call("save", fd=full.fileno())
        state = await controller.call("state")
        assert (state["running"], state["migration"]["state"], state["transfer"]) == (True, "RUNNING", None)
        assert await vmm.read(0, 0) == 5


SPOILERS: dict[str, Callable[[bytes], bytes]] = {
    "no end": lambda data: data[:-1],
    "begun": lambda data: data[:40],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "damaged": lambda data: data[:50] + b"?" + data[51:],
}


@pytest.mark.parametrize("how", SPOILERS)
async def test_a_stream_that_is_not_whole(tmp_path: Path, how: str) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        await vmm.write(0, 0, 5)
        await save(controller, tmp_path / "f")
        (tmp_path / "f").write_bytes(SPOILERS[how]((tmp_path / "f").read_bytes()))
        await controller.call("stop")
        await vmm.write(0, 0, 6)
        with pytest.raises(RpcError) as raised:
            await load(controller, tmp_path / "f")
        assert raised.value.code == json_rpc.FAILED
        state = await controller.call("state")
        assert (state["migration"]["state"], state["migration"]["owner"]) == ("STOP", "controller")
        assert await controller.call("resume") == {"running": True}
        assert await vmm.read(0, 0) == 6


@pytest.mark.parametrize("hold", [False, True])
async def test_a_controller_that_vanishes_while_it_saves(tmp_path: Path, hold: bool) -> None:
    async with opened(tmp_path, make_large) as (served, controller, _):
        for offset in range(0, 16 << 20, 4096):
            served.server.device.regions[2].write(offset, b"12345678")  # type: ignore[union-attr]
        reader, writer = os.pipe()
        async with background() as nursery:
            async with open_control(served.control_path) as doomed:
                nursery.start_soon(lambda: _ignore(doomed, "save", writer, hold=hold))
                await until(controller, lambda state: state["transfer"])
                with refused("a save is under way"):
                    await save(controller, tmp_path / "f")
            os.close(writer)
            state = await until(controller, lambda state: state["transfer"] is None)
        os.close(reader)
        assert state["running"]
        assert state["migration"] == {"state": "RUNNING", "owner": "client", "reason": ""}
        await save(controller, tmp_path / "f")


async def _ignore(controller: ControlClient, method: str, fd: int, **params: Any) -> None:
    with pytest.raises((ControlLost, RpcError)):
        await controller.call(method, fd=fd, **params)


async def test_a_controller_that_vanishes_while_it_loads(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await vmm.write(0, 0, 5)
        await save(controller, tmp_path / "f")
        await controller.call("stop")
        await vmm.write(0, 0, 6)
        reader, writer = os.pipe()
        os.write(writer, (tmp_path / "f").read_bytes()[:-1])
        async with background() as nursery:
            async with open_control(served.control_path) as doomed:
                nursery.start_soon(_ignore, doomed, "load", reader)
                await until(controller, lambda state: state["migration"]["state"] == "RESUMING")
            state = await until(controller, lambda state: state["transfer"] is None)
        os.close(reader)
        os.close(writer)
        assert state["migration"]["state"] == "STOP"
        await controller.call("resume")
        assert await vmm.read(0, 0) == 6


@pytest.mark.parametrize("method", ["save", "load"])
async def test_a_transfer_is_cancelled(tmp_path: Path, method: str) -> None:
    async with serving(tmp_path, make_large) as served, open_control(served.control_path) as controller:
        with refused("no save or load"):
            await controller.call("cancel")
        reader, writer = os.pipe()
        served.server.device.regions[2].write(0, os.urandom(1 << 20))  # type: ignore[union-attr]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ignore, controller, method, writer if method == "save" else reader)
            await until(controller, lambda state: state["transfer"])
            await controller.call("cancel")
        os.close(reader)
        os.close(writer)
        assert (await controller.call("state"))["migration"]["state"] == "RUNNING"


async def test_a_client_that_resets_or_leaves_ends_a_save(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (_, controller, vmm):
        async with trio.open_nursery() as nursery:
            with (tmp_path / "f").open("wb") as file:
                nursery.start_soon(lambda: _ignore(controller, "save", file.fileno(), hold=True))
                await until(controller, lambda state: state["transfer"])
                await vmm.client.reset()
        assert (await controller.call("state"))["running"]


async def test_a_reset_while_a_state_is_loaded(tmp_path: Path) -> None:
    """The load is over, and nothing of it may touch what is asked for afterwards."""
    async with opened(tmp_path) as (served, controller, vmm), open_control(served.control_path) as second:
        await controller.call("stop")
        reader, writer = os.pipe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ignore, controller, "load", reader)
            await until(second, lambda state: state["migration"]["state"] == "RESUMING")
            await vmm.client.reset()
            with refused("a load that a reset has spoilt"):
                await second.call("stop")
            os.write(writer, b"x")
        os.close(reader)
        os.close(writer)
        assert not (await second.call("stop"))["running"]
        assert (await second.call("state"))["migration"]["state"] == "STOP"


# The dirty log


async def test_the_log_is_reported_and_handed_over(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        told = listen(vmm)
        vmm.ram.write(0, bytes(range(256)) * 64)
        assert await controller.call("log-start") == {"page_size": 4096}
        await copy(vmm, 0, 0x10800, 0x2000)
        await copy(vmm, 0, 0x40000, 10)
        figures = (await controller.call("state"))["dirty_log"]
        assert figures == {"owner": "controller", "page_size": 4096, "pages": 4, "bytes": 0x4000}
        report = await controller.call("log-report")
        assert report == {
            "pages": 4,
            "bytes": 0x4000,
            "ranges": [[0x10000, 0x3000], [0x40000, 0x1000]],
            "complete": True,
        }
        with refused("the device runs"):
            await controller.call("log-hand-over")
        await controller.call("stop")
        before = vmm.ram.read(0, 1 << 20)
        result = await controller.call("log-hand-over")
        assert (result["pages"], result["bytes"]) == (4, 4)
        assert told == [(a, 1) for a in (0x10000, 0x11000, 0x12000, 0x40000)]
        assert vmm.ram.read(0, 1 << 20) == before
        assert (await controller.call("log-report"))["pages"] == 0
        served.server.host.table.find(0).dirty.mark(0x20000, 0x20000)  # type: ignore[union-attr]
        told.clear()
        result = await controller.call("log-hand-over", whole=True)
        assert (result["pages"], result["bytes"]) == (32, 0x20000)
        assert told == [(0x20000, 0x10000), (0x30000, 0x10000)]
        assert vmm.ram.read(0, 1 << 20) == before


async def test_a_hand_over_of_many_pages(tmp_path: Path) -> None:
    async with opened(tmp_path, options=VmmOptions(((0, 16 << 20),))) as (served, controller, _):
        await controller.call("log-start")
        await controller.call("stop")
        served.server.host.table.find(0).dirty.mark_all()  # type: ignore[union-attr]
        assert (await controller.call("log-hand-over"))["pages"] == 4096
        assert (await controller.call("log-report"))["pages"] == 0


async def test_what_the_client_refuses_stays_in_the_log(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await controller.call("log-start")
        await controller.call("stop")
        served.server.host.table.find(0).dirty.mark(0, 0x3000)  # type: ignore[union-attr]
        write = vmm.dma_write

        def refuse_one(address: int, data: m.Payload) -> None:
            if address == 0x1000:
                raise DeviceError("the bus master is off", errno.ENODEV)
            write(address, data)

        vmm.dma_write = refuse_one  # type: ignore[method-assign]
        with refused("1 writes failed.*ENODEV"):
            await controller.call("log-hand-over")
        assert (await controller.call("log-report"))["ranges"] == [[0x1000, 0x1000]]
        served.server.host.dma.enabled = False
        with refused("bus master is off"):
            await controller.call("log-hand-over")


async def test_the_log_has_one_owner(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        with refused("no controller has started"):
            await controller.call("log-report")
        with refused("page_size"):
            await controller.call("log-start", page_size=5000)
        await controller.call("log-start")
        with pytest.raises(RemoteError, match="EBUSY"):
            await vmm.client.dirty_pages_start()
        await controller.call("log-stop")
        await vmm.client.dirty_pages_start()
        for method in ("log-start", "log-stop"):
            with refused("the client"):
                await controller.call(method)
        assert (await controller.call("state"))["dirty_log"]["owner"] == "client"


async def test_a_report_that_clears(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        await controller.call("log-start", page_size=65536)
        await copy(vmm, 0, 0x10800, 10)
        assert (await controller.call("log-report", clear=True))["ranges"] == [[0x10000, 0x10000]]
        assert (await controller.call("log-report"))["pages"] == 0


async def test_write_through(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        told = listen(vmm)
        vmm.ram.write(0, b"abcdefgh" * 1024)
        await controller.call("log-start")
        await copy(vmm, 0, 0x10000, 4096)
        assert told == []
        assert await controller.call("write-through", on=True) == {"on": True}
        await copy(vmm, 0, 0x20000, 4096)
        assert told == [(0x20000, 4096)]
        assert vmm.ram.read(0x20000, 4096) == b"abcdefgh" * 512
        assert (await controller.call("log-report"))["ranges"] == [[0x10000, 0x1000]]
        await controller.call("write-through", on=False)
        await copy(vmm, 0, 0x30000, 4096)
        assert told == [(0x20000, 4096)]


async def test_write_through_ends_with_the_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, open_control(served.control_path) as controller:
        with refused("no client"):
            await controller.call("write-through", on=True)
        async with open_vmm(served.path, SMALL_RAM):
            await controller.call("write-through", on=True)
        state = await until(controller, lambda state: not state["client"]["attached"])
        assert not state["write_through"]


# The network


async def test_five_announcements(tmp_path: Path) -> None:
    port = RecordingPort()
    async with opened(tmp_path, lambda host: E1000(host, port)) as (served, controller, _):
        await controller.call("stop")
        with refused("stopped"):
            await controller.call("announce")
        await controller.call("resume")
        assert await controller.call("announce") == {"frames": 5}
        await trio.sleep(ANNOUNCEMENTS[-1] / 1000)
        await until(controller, lambda _: len(port.frames) == 5)
        device = served.server.device
        assert isinstance(device, E1000)
        address = device.station_address()
        assert address == device.mac.eeprom.mac
        assert len(set(port.frames)) == 1
        frame = port.frames[0]
        assert (len(frame), frame[:14]) == (60, b"\xff" * 6 + address + b"\x80\x35")
        assert frame[14:42] == bytes.fromhex("0001080006040003") + (address + bytes(4)) * 2


async def test_only_a_card_announces(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, _):
        with refused("no network card"):
            await controller.call("announce")
