# SPDX-License-Identifier: BSD-3-Clause
"""Guest addresses read and written by a controller, as DMA by message."""

import errno
import struct
from pathlib import Path
from typing import Any

import pytest
import trio

from conformance import wire
from conformance.raw import RawClient, connect
from migration.control_bed import listen, opened, refused, serving
from vfio_user.client.control import open_control
from vfio_user.protocol import json_rpc
from vfio_user.protocol import messages as m
from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.json_rpc import RpcError


async def test_memory_that_is_mapped_is_written_by_message_too(tmp_path: Path) -> None:
    """Also while the device is stopped; and nothing of it comes into the log, for the client knows."""
    async with opened(tmp_path) as (served, controller, vmm):
        told = listen(vmm)
        await controller.call("log-start")
        await controller.call("stop")
        assert await controller.call("guest-write", address=0x1234, data="00ffAB") == {"bytes": 3}
        assert told == [(0x1234, 3)]
        assert vmm.ram.read(0x1233, 5) == b"\0\0\xff\xab\0"
        assert await controller.call("guest-read", address=0x1234, length=3) == {"data": "00ffab"}
        assert (await controller.call("log-report"))["pages"] == 0
        whole = bytes(range(256)) * 16
        assert await controller.call("guest-write", address=0x8000, data=whole.hex()) == {"bytes": 4096}
        assert await controller.call("guest-read", address=0x8000, length=4096) == {"data": whole.hex()}
        assert not served.server.host.running


async def test_what_is_no_memory_is_reached(tmp_path: Path) -> None:
    """Where a VMM has a device of its own: nothing is mapped there."""
    async with opened(tmp_path) as (_, controller, vmm):
        registers = bytearray(64)

        def write(address: int, data: m.Payload) -> None:
            registers[address & 63 : (address & 63) + len(data)] = data

        vmm.dma_write = write  # type: ignore[method-assign]
        vmm.dma_read = lambda address, count: bytes(registers[address & 63 :][:count])  # type: ignore[method-assign]
        await controller.call("guest-write", address=0xFE00_0010, data="01020304")
        assert registers[16:20] == b"\1\2\3\4"
        assert await controller.call("guest-read", address=0xFE00_0010, length=4) == {"data": "01020304"}


async def test_what_the_client_refuses(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):

        def refuse(address: int, *_: object) -> bytes:
            raise DeviceError("the bus master is off", errno.ENODEV)

        vmm.dma_read = vmm.dma_write = refuse  # type: ignore[method-assign,assignment]
        for method, params in (("guest-read", {"length": 4}), ("guest-write", {"data": "00"})):
            with pytest.raises(RpcError, match="ENODEV") as raised:
                await controller.call(method, address=0, **params)
            assert raised.value.code == json_rpc.FAILED
        assert await vmm.read(0, 0) == 0


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("guest-read", {"address": 0}),
        ("guest-read", {"address": -1, "length": 1}),
        ("guest-read", {"address": 1 << 64, "length": 1}),
        ("guest-read", {"address": (1 << 64) - 1, "length": 2}),
        ("guest-read", {"address": 0, "length": 0}),
        ("guest-read", {"address": 0, "length": 4097}),
        ("guest-read", {"address": "0", "length": 1}),
        ("guest-write", {"address": 0}),
        ("guest-write", {"address": 0, "data": ""}),
        ("guest-write", {"address": 0, "data": "0"}),
        ("guest-write", {"address": 0, "data": "0g"}),
        ("guest-write", {"address": 0, "data": "00 11"}),
        ("guest-write", {"address": 0, "data": "\u0660\u0660"}),
        ("guest-write", {"address": 0, "data": 17}),
        ("guest-write", {"address": 0, "data": "00" * 4097}),
        ("guest-write", {"address": 1.5, "data": "00"}),
    ],
)
async def test_parameters_that_are_wrong(tmp_path: Path, method: str, params: dict[str, Any]) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        told = listen(vmm)
        with pytest.raises(RpcError) as raised:
            await controller.call(method, **params)
        assert raised.value.code == json_rpc.INVALID_PARAMS
        assert told == []


async def test_a_client_that_does_not_answer_or_leaves(tmp_path: Path) -> None:
    """What it says too late is for nobody, and spoils nothing."""
    read = {"address": 0x1000, "length": 4}
    async with serving(tmp_path) as served, open_control(served.control_path) as controller:
        with refused("no client is there"):
            await controller.call("guest-read", **read)
        async with connect(served.path) as raw:
            with refused("has not answered within 10 ms"):
                await controller.call("guest-read", **read, wait=10)
            late = await raw.receive()
            assert (late.command, late.body) == (wire.DMA_READ, struct.pack("<QQ", 0x1000, 4))
            await raw.answer(late, late.body + b"late")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_answer_once, raw, b"four")
                assert await controller.call("guest-read", **read) == {"data": b"four".hex()}
            assert served.server.outstanding == 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_leave, raw)
                with refused("the client has left"):
                    await controller.call("guest-write", address=0, data="00", wait=5000)
        with refused("no client is there"):
            await controller.call("guest-read", **read)


async def _answer_once(raw: RawClient, data: bytes) -> None:
    request = await raw.receive()
    await raw.answer(request, request.body + data)


async def _leave(raw: RawClient) -> None:
    await raw.receive()
    raw.shut()


@pytest.mark.parametrize("body", [struct.pack("<QQ", 0, 3) + b"123", struct.pack("<QQ", 0, 4), b""])
async def test_a_client_whose_answer_is_wrong(tmp_path: Path, body: bytes) -> None:
    async with (
        serving(tmp_path) as served,
        open_control(served.control_path) as controller,
        connect(served.path) as raw,
        trio.open_nursery() as nursery,
    ):

        async def answer() -> None:
            await raw.answer(await raw.receive(), body)

        nursery.start_soon(answer)
        with pytest.raises(RpcError) as raised:
            await controller.call("guest-read", address=0, length=4)
        assert raised.value.code == json_rpc.FAILED


async def test_a_controller_that_leaves_meanwhile(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, connect(served.path) as raw:
        async with open_control(served.control_path) as controller:
            with trio.move_on_after(0.01):
                await controller.call("guest-read", address=0, length=4, wait=60_000)
        request = await raw.receive()
        await raw.answer(request, request.body + b"late")
        await raw.expect_alive()
        assert served.server.outstanding == 0


async def test_a_client_that_takes_little_at_a_time(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as served,
        open_control(served.control_path) as controller,
        connect(served.path, negotiated=False) as raw,
    ):
        await raw.negotiate({"max_data_xfer_size": 1024})
        with refused("at most 1024 bytes"):
            await controller.call("guest-read", address=0, length=1025)
