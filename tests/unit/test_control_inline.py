# SPDX-License-Identifier: BSD-3-Clause
"""States over the connection that asked for them, and controllers that vanish meanwhile."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from migration.control_bed import (
    Served,
    make_large,
    opened,
    refused,
    save,
    serving,
    until,
)
from vfio_user.client.control import ControlLost, open_control
from vfio_user.client.control_streams import inline_load, open_inline_save
from vfio_user.protocol import json_rpc
from vfio_user.protocol.json_rpc import RpcError

SAVE = b'{"jsonrpc":"2.0","id":7,"method":"save","params":{"inline":true}}\n'
LOAD = b'{"jsonrpc":"2.0","id":7,"method":"load","params":{"inline":true}}\n'
SHUTDOWN = b'{"jsonrpc":"2.0","id":8,"method":"shutdown"}\n'


async def pieces(data: bytes, size: int = 1 << 16) -> AsyncIterator[bytes]:
    for place in range(0, len(data), size):
        yield data[place : place + size]


async def inline_save(path: Path, **words: bool) -> bytes:
    async with open_inline_save(path, **words) as chunks:
        data = b"".join([chunk async for chunk in chunks])
        assert (await chunks.check())["bytes"] == len(data)
        return data


@asynccontextmanager
async def raw(path: Path) -> AsyncIterator[trio.SocketStream]:
    async with await trio.open_unix_socket(path) as stream:
        yield stream


async def everything(stream: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(5):
        while part := await stream.receive_some(65536):
            data += part
    return data


async def test_the_same_bytes_as_by_a_descriptor(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (served, controller, vmm):
        await vmm.write(2, 0x1000, 0xBEEF)
        data = await inline_save(served.control_path)
        await save(controller, tmp_path / "f")
        assert data == (tmp_path / "f").read_bytes()
        state = await controller.call("state")
        assert state["running"]
        assert state["last_transfer"] == {"method": "save", "bytes": len(data), "error": None}


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
async def test_loaded_in_pieces_of_any_size(tmp_path: Path, size: int) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await vmm.write(0, 0, 5)
        data = await inline_save(served.control_path)
        await vmm.write(0, 0, 6)
        await controller.call("stop")
        result = await inline_load(served.control_path, pieces(data, size))
        assert result == {"bytes": len(data), "running": False}
        assert await vmm.read(0, 0) == 5
        last = (await controller.call("state"))["last_transfer"]
        assert last == {"method": "load", "bytes": len(data), "error": None}


async def test_request_and_stream_in_one_piece(tmp_path: Path) -> None:
    """The bytes behind the request are state, whatever they look like."""
    async with opened(tmp_path) as (served, controller, vmm):
        await vmm.write(0, 0, 5)
        data = await inline_save(served.control_path)
        await vmm.write(0, 0, 6)
        await controller.call("stop")
        async with raw(served.control_path) as stream:
            await stream.send_all(LOAD + data)
            await stream.send_eof()
            answer = json.loads(await everything(stream))
        assert (answer["id"], answer["result"]) == (7, {"bytes": len(data), "running": False})
        assert await vmm.read(0, 0) == 5


async def test_held_and_piped_from_server_to_server(tmp_path: Path) -> None:
    """As a move does it: memory first, the rest after a stop that comes over another connection."""
    async with (
        opened(tmp_path, make_large) as (source, here, vmm),
        serving(tmp_path, make_large, "t") as target,
        open_control(target.control_path) as there,
    ):
        for offset in range(0, 16 << 20, 1 << 20):
            await vmm.write(2, offset, offset + 7)
        results: list[Any] = []

        async def carry() -> None:
            async with open_inline_save(source.control_path, hold=True) as chunks:
                results.append(await inline_load(target.control_path, chunks))
                results.append(await chunks.check())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry)
            await until(there, lambda state: state["transfer"] and state["transfer"]["bytes"])
            await vmm.write(2, 64, 99)
            await here.call("stop")
        assert [result["bytes"] for result in results] == [results[0]["bytes"]] * 2
        assert not results[1]["running"]
        memories = [
            bytes(next(iter(server.server.device.memories().values())).view)  # type: ignore[union-attr]
            for server in (source, target)
        ]
        assert memories[0] == memories[1]
        assert int.from_bytes(memories[1][64:68], "little") == 99


# Refusals


async def test_what_is_refused_before_a_stream(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await vmm.write(0, 0, 5)
        data = await inline_save(served.control_path)
        with refused("the device runs"):
            await inline_load(served.control_path, pieces(data))
        with (tmp_path / "f").open("wb") as file, refused("no descriptor inline"):
            await controller.call("save", fd=file.fileno(), inline=True)
        with refused(r"inline=true; 0 came"):
            await controller.call("save")
        assert await vmm.read(0, 0) == 5
        with pytest.raises(ControlLost, match="cannot be connected"):
            await inline_load(tmp_path / "nobody", pieces(data))


async def test_a_connection_goes_on_after_a_save_that_was_refused(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, make_large) as served,
        raw(served.control_path) as stream,
        await _held(served),
    ):
        await stream.send_all(SAVE)
        answer = json.loads(await stream.receive_some(65536))
        assert (answer["id"], answer["error"]["code"]) == (7, json_rpc.REFUSED)
        await stream.send_all(b'{"jsonrpc":"2.0","id":9,"method":"state"}\n')
        assert json.loads(await stream.receive_some(65536))["result"]["transfer"]["method"] == "load"


async def _held(served: Served) -> trio.SocketStream:
    """A load that is under way."""
    stream = await trio.open_unix_socket(served.control_path)
    await stream.send_all(LOAD)
    async with open_control(served.control_path) as controller:
        await until(controller, lambda state: state["transfer"])
    return stream


@pytest.mark.parametrize(
    "request_line",
    [
        LOAD.replace(b'"inline":true', b'"inline":1'),
        LOAD.replace(b'"inline":true', b'"inline":true,"speed":1'),
        LOAD.replace(b'"id":7,', b""),
        LOAD,
    ],
)
async def test_a_stream_that_nobody_takes_is_not_read_as_requests(
    tmp_path: Path, request_line: bytes
) -> None:
    """Where a load is refused its stream comes all the same; it may hold what looks like a request."""
    async with opened(tmp_path) as (served, controller, _):
        async with raw(served.control_path) as stream:
            await stream.send_all(request_line + SHUTDOWN)
            answer = await everything(stream)
        assert answer.count(b"\n") == 1
        assert "error" in json.loads(answer)
        await controller.call("state")
        await trio.sleep(0.03)  # longer than a shutdown waits
        assert not served.ended.is_set()


@pytest.mark.parametrize("method", [SAVE, LOAD])
async def test_a_stream_needs_a_connection_of_its_own(tmp_path: Path, method: bytes) -> None:
    async with opened(tmp_path) as (served, _, _), raw(served.control_path) as stream:
        read = b'{"jsonrpc":"2.0","id":1,"method":"guest-read","params":{"address":0,"length":1}}\n'
        await stream.send_all(read + method)
        assert b"a connection of its own" in await stream.receive_some(65536)


async def test_requests_behind_a_save_end_it(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (served, controller, vmm):
        for behind in (SHUTDOWN, b"x"):
            async with raw(served.control_path) as stream:
                await stream.send_all(SAVE.replace(b"true", b'true,"hold":true') + behind)
                await everything(stream)
            state = await until(controller, lambda state: state["transfer"] is None)
            assert state["running"]
            assert "has left" in state["last_transfer"]["error"]
        await trio.sleep(0.03)
        assert not served.ended.is_set()
        assert await vmm.read(0, 0) == 0


# What goes wrong on the way


async def test_a_stream_that_is_not_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await vmm.write(0, 0, 5)
        data = await inline_save(served.control_path)
        await controller.call("stop")
        await vmm.write(0, 0, 6)
        for bad in (b"", data[:1], data[:-1], data + b"x", data[:50] + b"?" + data[51:], b"nonsense" * 100):
            with pytest.raises(RpcError) as raised:
                await inline_load(served.control_path, pieces(bad))
            assert raised.value.code == json_rpc.FAILED
            state = await controller.call("state")
            assert (state["migration"]["state"], state["migration"]["owner"]) == ("STOP", "controller")
            assert state["last_transfer"]["error"] == raised.value.message
        await controller.call("resume")
        assert await vmm.read(0, 0) == 6


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
async def test_a_controller_that_vanishes_while_it_loads(tmp_path: Path, share: float) -> None:
    """Its end looks like the end of the stream, which has no end record then."""
    async with opened(tmp_path, make_large) as (served, controller, vmm):
        await vmm.client.region_write(2, 0, os.urandom(1 << 19))
        await vmm.write(0, 0, 5)
        data = await inline_save(served.control_path)
        await controller.call("stop")
        await vmm.write(0, 0, 6)
        async with raw(served.control_path) as stream:
            await stream.send_all(LOAD + data[: int(share * len(data))])
            await until(controller, lambda state: state["transfer"])
        state = await until(controller, lambda state: state["transfer"] is None)
        assert state["migration"]["state"] == "STOP"
        assert state["last_transfer"]["error"]
        await controller.call("resume")
        assert await vmm.read(0, 0) == 6


@pytest.mark.parametrize("taken", [0, 1, 40, 1 << 20])
@pytest.mark.parametrize("hold", [False, True])
async def test_a_controller_that_vanishes_while_it_saves(tmp_path: Path, taken: int, hold: bool) -> None:
    """With data that waits in the socket, and without; the device runs on, and can be saved again."""
    async with opened(tmp_path, make_large) as (served, controller, vmm):
        for offset in range(0, 16 << 20, 1 << 19):
            await vmm.client.region_write(2, offset, b"\xa5" * (1 << 19))
        async with raw(served.control_path) as stream:
            await stream.send_all(SAVE.replace(b"true", b'true,"hold":true') if hold else SAVE)
            await until(controller, lambda state: state["transfer"])
            while taken > 0:
                taken -= len(await stream.receive_some(taken))
        state = await until(controller, lambda state: state["transfer"] is None)
        assert state["running"]
        assert state["migration"] == {"available": True, "state": "RUNNING", "owner": "client", "reason": ""}
        assert state["last_transfer"]["error"]
        await inline_save(served.control_path)


@pytest.mark.parametrize("line", [SAVE.replace(b"true", b'true,"hold":true'), LOAD])
async def test_a_stream_is_cancelled(tmp_path: Path, line: bytes) -> None:
    async with serving(tmp_path, make_large) as served, open_control(served.control_path) as controller:
        served.server.device.regions[2].write(0, os.urandom(8 << 20))  # type: ignore[union-attr]
        async with raw(served.control_path) as stream:
            await stream.send_all(line)
            await until(controller, lambda state: state["transfer"])
            await controller.call("cancel")
            answer = await everything(stream)
        if line is LOAD:
            assert "cancelled" in json.loads(answer)["error"]["message"]
        state = await controller.call("state")
        assert (state["migration"]["state"], state["transfer"]) == ("RUNNING", None)
        assert "cancelled" in state["last_transfer"]["error"]


async def test_a_reset_spoils_a_stream(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (served, controller, vmm):
        async with open_inline_save(served.control_path, hold=True) as chunks:
            await until(controller, lambda state: state["transfer"])
            await vmm.client.reset()
            async for _ in chunks:
                pass
            with refused("reset the device"):
                await chunks.check()
        assert (await controller.call("state"))["running"]


async def test_what_the_source_raises_ends_the_load(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"vfio"
        raise ConnectionError("the other host has gone")

    async with opened(tmp_path) as (served, controller, vmm):
        await controller.call("stop")
        with pytest.raises(ConnectionError, match="other host"):
            await inline_load(served.control_path, broken())
        await until(controller, lambda state: state["transfer"] is None)
        assert (await controller.call("resume"))["running"]
        with trio.move_on_after(0.05) as scope:
            await controller.call("stop")
            await inline_load(served.control_path, _forever())
        assert scope.cancelled_caught
        await until(controller, lambda state: state["transfer"] is None)
        assert await vmm.read(0, 0) == 0


async def _forever() -> AsyncIterator[bytes]:
    yield b"vfiouser"
    await trio.sleep_forever()


async def test_a_server_that_goes_away(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (served, controller, _):
        assert served.controls is not None
        async with open_inline_save(served.control_path, hold=True) as chunks:
            await until(controller, lambda state: state["transfer"])
            served.controls.close()
            assert b"".join([chunk async for chunk in chunks]).startswith(b"vfiouser")
            with pytest.raises(ControlLost, match="cannot be connected"):
                await chunks.check()
        assert served.server.host.running


async def test_nothing_leaks(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (served, controller, _):
        await controller.call("stop")
        before = len(os.listdir("/proc/self/fd"))
        data = await inline_save(served.control_path)
        for _ in range(5):
            await inline_save(served.control_path)
            await inline_load(served.control_path, pieces(data))
            with pytest.raises(RpcError):
                await inline_load(served.control_path, pieces(data[:-1]))
            async with raw(served.control_path) as stream:
                await stream.send_all(SAVE)
        await until(controller, lambda _: len(os.listdir("/proc/self/fd")) == before)


@pytest.mark.parametrize("line", [SAVE, LOAD + b"nonsense"])
async def test_answers_that_wait_go_first(tmp_path: Path, line: bytes) -> None:
    """A controller that reads nothing for a while loses nothing: not the answers before, nor the last one."""
    state = b'{"jsonrpc":"2.0","id":1,"method":"configuration"}\n'
    async with opened(tmp_path) as (served, controller, _):
        async with raw(served.control_path) as stream:
            asked = 0
            while not await _pending(served):
                await stream.send_all(state * 100)
                asked += 100
            await stream.send_all(line)
            if line.startswith(LOAD):
                await stream.send_eof()
            await trio.sleep(0.02)
            data = await everything(stream)
        lines = data.split(b"\n", asked + 1)
        assert all(b'"space"' in answer for answer in lines[:asked])
        last = json.loads(lines[asked])
        assert last["id"] == 7
        if line is SAVE:
            assert last["result"] == {"stream": True}
            transfer = (await controller.call("state"))["last_transfer"]
            assert transfer == {"method": "save", "bytes": len(lines[asked + 1]), "error": None}
        else:
            assert last["error"]["code"] in (json_rpc.REFUSED, json_rpc.FAILED)
            assert lines[asked + 1] == b""


async def _pending(served: Served) -> bool:
    """Whether the kernel takes no more answers for a controller that does not read."""
    await trio.sleep(0.01)
    assert served.controls is not None
    return any(held._channel.pending for held in served.controls._controllers)
