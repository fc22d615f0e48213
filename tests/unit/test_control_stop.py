# SPDX-License-Identifier: BSD-3-Clause
"""What `stop` serves before the device stands still, and what becomes of one that cannot be described."""

import json
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from migration.control_bed import Served, load, opened, refused, save, until
from vfio_user.client.background import background
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.control_streams import open_inline_save
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.device_models.device import Host, RegionIndex
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol import json_rpc
from vfio_user.protocol.codec import REGION_ACCESS
from vfio_user.protocol.constants import FLAG_NO_REPLY, Command
from vfio_user.protocol.json_rpc import RpcError

REGISTER = 0x10
WRITES = 3000
"""108,000 bytes: more than one turn of the engine reads."""


def posted(value: int) -> bytes:
    size = REGION_ACCESS.size + 4
    head = REGION_ACCESS.pack(0, Command.REGION_WRITE, size, FLAG_NO_REPLY, 0, REGISTER, 0, 4)
    return head + struct.pack("<I", value)


async def stop_behind(vmm: FakeVmm, controller: ControlClient, data: bytes, **params: Any) -> Any:
    """The server gets no turn between what the client sends and the request."""
    vmm.client.link.send_raw((data,))
    return await controller.call("stop", **params)


@pytest.mark.parametrize("count", [1, WRITES])
async def test_what_was_posted_before_is_in_the_state(tmp_path: Path, count: int) -> None:
    data = b"".join(map(posted, range(1, count + 1)))
    async with opened(tmp_path) as (served, controller, vmm), opened(tmp_path, name="t") as (_, there, other):
        chunks: list[bytes] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, served, chunks)
            await until(controller, lambda state: chunks)
            assert not (await stop_behind(vmm, controller, data, describe=True))["running"]
        (tmp_path / "f").write_bytes(b"".join(chunks))
        await there.call("stop")
        await load(there, tmp_path / "f")
        assert await other.read(0, REGISTER) == count


async def keep(served: Served, chunks: list[bytes]) -> None:
    async with open_inline_save(served.control_path, hold=True) as stream:
        async for chunk in stream:
            chunks.append(bytes(chunk))


class Endless(Scratch):
    """Each write to a register lets its client send one more."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.more: Callable[[], None] = lambda: None
        write = self.regions[0].write

        def write_and_more(offset: int, data: Any) -> None:
            write(offset, data)
            self.more()

        self.regions[0].write = write_and_more  # type: ignore[method-assign]


async def test_a_client_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    async with opened(tmp_path, Endless) as (served, controller, vmm):
        device, link = served.server.device, vmm.client.link
        assert isinstance(device, Endless)
        device.more = lambda: link.send_raw((posted(1),))
        start = time.monotonic()
        with trio.fail_after(5):
            assert not (await stop_behind(vmm, controller, posted(1), wait=30))["running"]
        assert time.monotonic() - start >= 0.03
        device.more = lambda: None


async def test_the_rest_of_a_message_is_waited_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm), background() as nursery:
        data = posted(7)
        nursery.start_soon(lambda: stop_behind(vmm, controller, data[:20], wait=5000))
        await trio.sleep(0.02)
        assert served.server.host.running
        vmm.client.link.send_raw((data[20:],))
        with trio.fail_after(20):
            async with open_control(served.control_path) as second:
                await until(second, lambda state: not state["running"])
        assert await vmm.read(0, REGISTER) == 7
        assert served.server.unread == 0


async def test_without_anything_unread_no_turn_is_lost(tmp_path: Path) -> None:
    """The answer is there when the request has been taken: nobody had to be asked again."""
    async with opened(tmp_path) as (served, _, vmm):
        await vmm.read(0, 0)
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(served.control_path))
            await trio.sleep(0.01)
            raw.setblocking(False)
            timers = served.server._timers
            raw.sendall(b'{"jsonrpc":"2.0","id":1,"method":"stop"}\n')
            served.server.poller.poll()
            assert not timers.pending
            assert json.loads(raw.recv(4096))["result"] == {"running": False, "unanswered_dma": 0}


class Mute(Scratch):
    """Fails when it is to be described, and only then."""

    def fail(self) -> None:
        def read(offset: int, count: int) -> bytes:
            raise ArithmeticError("no such thing")

        self.regions[RegionIndex.CONFIG].read = read  # type: ignore[method-assign]


def mute(served: Served) -> None:
    assert isinstance(served.server.device, Mute)
    served.server.device.fail()


async def fails_to_describe(controller: ControlClient) -> None:
    with pytest.raises(RpcError, match="configuration space failed: ArithmeticError: no such") as raised:
        await controller.call("stop", describe=True)
    assert raised.value.code == json_rpc.FAILED


async def test_a_device_that_cannot_be_described_goes_on(tmp_path: Path) -> None:
    async with opened(tmp_path, Mute) as (served, controller, vmm):
        mute(served)
        before = await controller.call("state")
        await fails_to_describe(controller)
        state = await controller.call("state")
        assert (state["running"], state["migration"]) == (True, before["migration"])
        assert not served.server.host.gate.closed
        await vmm.write(0, REGISTER, 9)
        await controller.call("stop")
        await fails_to_describe(controller)  # it stood still before, and does so
        assert not (await controller.call("state"))["running"]
        assert (await controller.call("resume"))["running"]


async def test_nor_does_a_save_that_was_held_for_it_take_it_along(tmp_path: Path) -> None:
    async with opened(tmp_path, Mute) as (served, controller, _):
        mute(served)
        async with background() as nursery:
            nursery.start_soon(cut_short, served)
            await until(controller, lambda state: state["transfer"])
            await fails_to_describe(controller)
            state = await until(controller, lambda state: state["transfer"] is None)
        assert (state["running"], state["migration"]["owner"]) == (True, "client")
        assert "cancelled" in state["last_transfer"]["error"]
        await save(controller, tmp_path / "f")


async def cut_short(served: Served) -> None:
    async with open_inline_save(served.control_path, hold=True) as stream:
        async for _ in stream:
            pass


async def test_without_a_client_it_waits_for_one_as_before(tmp_path: Path) -> None:
    async with opened(tmp_path, Mute) as (served, controller, vmm):
        mute(served)
        vmm.client.close()
        await until(controller, lambda state: not state["client"]["attached"])
        await fails_to_describe(controller)
        state = await controller.call("state")
        assert (state["running"], state["migration"]["owner"]) == (False, "client")
        with refused("no controller has stopped"):
            await controller.call("blank", on=True)
