# SPDX-License-Identifier: BSD-3-Clause
"""States saved and loaded through the control socket, and whatever goes wrong meanwhile."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from migration.control_bed import (
    ignore,
    load,
    make_large,
    opened,
    refused,
    save,
    serving,
    until,
)
from vfio_user.client.background import background
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.device_models.device import pause
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol import json_rpc
from vfio_user.protocol.json_rpc import RpcError


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
                nursery.start_soon(lambda: ignore(doomed, "save", writer, hold=hold))
                await until(controller, lambda state: state["transfer"])
                with refused("a save is under way"):
                    await save(controller, tmp_path / "f")
            os.close(writer)
            state = await until(controller, lambda state: state["transfer"] is None)
        os.close(reader)
        assert state["running"]
        assert state["migration"] == {"available": True, "state": "RUNNING", "owner": "client", "reason": ""}
        await save(controller, tmp_path / "f")


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
                nursery.start_soon(ignore, doomed, "load", reader)
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
            nursery.start_soon(ignore, controller, method, writer if method == "save" else reader)
            await until(controller, lambda state: state["transfer"])
            await controller.call("cancel")
        os.close(reader)
        os.close(writer)
        assert (await controller.call("state"))["migration"]["state"] == "RUNNING"


async def test_a_client_that_resets_or_leaves_ends_a_save(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (_, controller, vmm):
        async with trio.open_nursery() as nursery:
            with (tmp_path / "f").open("wb") as file:
                nursery.start_soon(lambda: ignore(controller, "save", file.fileno(), hold=True))
                await until(controller, lambda state: state["transfer"])
                await vmm.client.reset()
        assert (await controller.call("state"))["running"]


async def test_a_reset_while_a_state_is_loaded(tmp_path: Path) -> None:
    """The load is over, and nothing of it may touch what is asked for afterwards."""
    async with opened(tmp_path) as (served, controller, vmm), open_control(served.control_path) as second:
        await controller.call("stop")
        reader, writer = os.pipe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore, controller, "load", reader)
            await until(second, lambda state: state["migration"]["state"] == "RESUMING")
            await vmm.client.reset()
            with refused("a load that a reset has spoilt"):
                await second.call("stop")
            os.write(writer, b"x")
        os.close(reader)
        os.close(writer)
        assert not (await second.call("stop"))["running"]
        assert (await second.call("state"))["migration"]["state"] == "STOP"


class Restless(Scratch):
    """Writes to guest memory again and again."""

    async def scribble(self) -> None:
        while True:
            await self.host.dma.write(0x1000, b"x" * 64)
            await pause()


async def test_a_stop_waits_for_replies_and_nothing_is_sent_after_it(tmp_path: Path) -> None:
    options = VmmOptions(((0, 1 << 20),), shared=False)  # every write is a message
    async with opened(tmp_path, Restless, options=options) as (served, controller, _):
        device = served.server.device
        assert isinstance(device, Restless)
        device.host.start("scribble", device.scribble)
        written = 0
        for _ in range(20):
            await until(controller, lambda state: state["counters"]["dma_message_writes"] > written)  # noqa: B023
            stopped = await controller.call("stop", wait=5000)
            assert stopped == {"running": False, "unanswered_dma": 0}
            written = (await controller.call("state"))["counters"]["dma_message_writes"]
            await controller.call("resume")
