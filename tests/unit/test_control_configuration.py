# SPDX-License-Identifier: BSD-3-Clause
"""What `configuration` tells of a device: its space, BARs and interrupts, for any model."""

import struct
from pathlib import Path
from typing import Any

import pytest

from migration.control_bed import make_large, opened, serving
from vfio_user.client.control import open_control
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.device_models.device import Device, IrqIndex, RegionIndex
from vfio_user.device_models.e1000.bench import RecordingPort
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.regions import RamRegion
from vfio_user.protocol.json_rpc import RpcError
from vfio_user.server.control_configuration import describe, find_capabilities


class _Lines:
    """An engine's interrupts that know nothing but the level."""

    fired: dict[Any, int] = {}  # noqa: RUF012
    level = True
    unanswered = None

    def fired_vectors(self, index: IrqIndex) -> int:
        return 0x1FA if index is IrqIndex.MSIX else 0x81


class _Foreign(Device):
    """A model with a configuration space that is nobody's but its own."""

    model = "foreign"

    def __init__(self, space: bytes) -> None:
        super().__init__(FakeHost())
        config = RamRegion(len(space))
        config.write(0, space)
        self.regions = {
            RegionIndex.CONFIG: config,
            1: RamRegion(64),
            4: RamRegion(1 << 20),
            6: RamRegion(2048),
        }
        self.irqs = {}


def _space(*capabilities: tuple[int, bytes], size: int = 256) -> bytearray:
    space = bytearray(size)
    struct.pack_into("<HH", space, 0, 0x8086, 0x1234)
    struct.pack_into("<II", space, 0x14, 0xC001, 0)
    struct.pack_into("<Q", space, 0x20, 0x12_3450_000C)
    space[0x06], space[0x3D] = 0x10, 2
    link = 0x34
    for place, body in capabilities:
        space[link] = place
        space[place : place + len(body)] = body
        link = place + 1
    return space


def test_of_a_model_that_has_only_bytes() -> None:
    msix = struct.pack("<BBHII", 0x11, 0, 0xC007, 0x0000_1004, 0x0000_2004)
    msi = struct.pack("<BBH", 0x05, 0, 0x0087)
    told = describe(_Foreign(bytes(_space((0x50, msi), (0xF0, msix)))), _Lines())  # type: ignore[arg-type]
    space = bytes.fromhex(told.pop("space"))
    assert (len(space), space[:4], list(find_capabilities(space))) == (
        256,
        b"\x86\x80\x34\x12",
        [(0x05, 0x50), (0x11, 0xF0)],
    )
    flags = {"io": False, "wide": False, "prefetchable": False}
    assert told == {
        "power_on": None,
        "writable": None,
        "write_1_to_clear": None,
        "bars": [
            {"index": 1, "size": 64, "address": 0xC000} | flags | {"io": True},
            {"index": 4, "size": 1 << 20, "address": 0x12_3450_0000}
            | flags
            | {"wide": True, "prefetchable": True},
        ],
        "rom_size": 2048,
        "msix": {
            "vectors": 8,
            "enabled": True,
            "masked": True,
            "table": {"bar": 4, "offset": 0x1000},
            "pba": {"bar": 4, "offset": 0x2000},
            "fired": "fa",
        },
        "msi": {"vectors": 8, "enabled": True, "fired": "81"},
        "intx": {"pin": 2, "level": True, "unanswered": None},
    }


def test_capabilities_that_lead_nowhere() -> None:
    """A list that bites its tail, one that ends in the header, a capability cut by the end of the space."""
    space = _space((0x40, b"\x09\0"), (0x50, b"\x09\x40"))
    assert list(find_capabilities(bytes(space))) == [(9, 0x40), (9, 0x50)]
    space[0x51] = 0x3C
    assert list(find_capabilities(bytes(space))) == [(9, 0x40), (9, 0x50)]
    cut = describe(_Foreign(bytes(_space((0xF8, b"\x11\0\0")))), _Lines())  # type: ignore[arg-type]
    assert (cut["msix"], cut["msi"]) == (None, None)
    space[0x06] = 0
    assert list(find_capabilities(bytes(space))) == []


def test_a_configuration_space_that_is_too_small() -> None:
    with pytest.raises(RpcError, match="64 of 64 bytes"):
        describe(_Foreign(bytes(64)), _Lines())  # type: ignore[arg-type]


async def test_of_a_device_that_a_guest_has_set_up(tmp_path: Path) -> None:
    async with opened(tmp_path, make_large) as (served, controller, vmm):
        told = await controller.call("configuration")
        size = vmm.regions[7].size
        assert told["space"] == (await vmm.client.region_read(7, 0, size)).hex()
        assert bytes.fromhex(told["power_on"]) == vmm.initial_config
        by_index = {bar["index"]: bar for bar in told["bars"]}
        assert {index: bar["address"] for index, bar in by_index.items()} == {
            index: bar.address for index, bar in vmm.bars.items()
        }
        assert by_index[2] == {
            "index": 2,
            "size": 16 << 20,
            "io": False,
            "wide": True,
            "prefetchable": True,
            "address": vmm.bars[2].address,
        }
        assert (told["msi"], told["rom_size"]) == ({"vectors": 1, "enabled": False, "fired": "00"}, 0)
        assert told["msix"]["table"]["bar"] == 4
        assert not told["msix"]["enabled"]
        await vmm.enable_msix(1)
        assert (await controller.call("configuration"))["msix"]["enabled"]
        assert served.server.host.running


async def test_the_masks_say_what_a_guest_can_write(tmp_path: Path) -> None:
    """All ones change exactly the bits of `writable`, and clear those of `write_1_to_clear`."""
    async with opened(tmp_path) as (_, controller, vmm):
        told = await controller.call("configuration")
        before, writable, clear = (int(told[name], 16) for name in ("space", "writable", "write_1_to_clear"))
        size = len(told["space"]) // 2
        await vmm.client.region_write(7, 0, b"\xff" * size)
        after = int((await vmm.client.region_read(7, 0, size)).hex(), 16)
        assert after == (before | writable) & ~clear


async def test_of_the_e1000(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, lambda host: E1000(host, RecordingPort())) as served,
        open_control(served.control_path) as controller,
    ):
        told = await controller.call("configuration")
        assert [(bar["index"], bar["io"], bar["address"]) for bar in told["bars"]] == [
            (0, False, 0),
            (2, True, 0),
        ]
        assert told["intx"] == {"pin": 1, "level": False, "unanswered": False}
        assert told["space"] == told["power_on"]
        assert not served.server.host.running


@pytest.mark.parametrize("resample", [False, True])
async def test_intx_that_was_fired_is_unanswered_until_its_unmask(tmp_path: Path, resample: bool) -> None:
    """Also when the UNMASK comes to a stopped device, which does not fire again; a MASK is no answer."""
    options = VmmOptions(((0, 1 << 20),), resample=resample)
    async with opened(tmp_path, options=options) as (_, controller, vmm):

        async def lines() -> Any:
            return (await controller.call("configuration"))["intx"]

        assert await lines() == {"pin": 1, "level": False, "unanswered": False}
        await vmm.intx.mask()
        assert not (await lines())["unanswered"]
        await vmm.intx.unmask()
        await copy_without_acknowledge(vmm)
        assert await lines() == {"pin": 1, "level": True, "unanswered": True}
        await controller.call("stop")
        await vmm.intx.mask()
        assert (await lines())["unanswered"]
        await vmm.intx.acknowledge()
        for _ in range(100):
            if not (await lines())["unanswered"]:
                break
        assert await lines() == {"pin": 1, "level": True, "unanswered": False}
        count = vmm.intx.count
        await controller.call("resume")
        await vmm.intx.wait()
        assert vmm.intx.count == count + 1
        assert (await lines())["unanswered"]
        await vmm.intx.disable()
        assert not (await lines())["unanswered"]


async def copy_without_acknowledge(vmm: Any) -> None:
    await vmm.write(0, 0xFF0, 16)
    await vmm.write(0, 0xFF8, 1)
    await vmm.intx.wait()
