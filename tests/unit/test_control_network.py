# SPDX-License-Identifier: BSD-3-Clause
"""A network card in a controller's hands: its cable, and announcements."""

from pathlib import Path

import trio

from migration.control_bed import opened, refused, until
from vfio_user.client.control import ControlClient
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.device_models.backends import Wrapper
from vfio_user.device_models.e1000.bench import RecordingPort
from vfio_user.device_models.e1000.bits import Cause, Status
from vfio_user.device_models.e1000.device import E1000
from vfio_user.server.control_network import ANNOUNCEMENTS

STATUS, ICR, IMS = 0x08, 0xC0, 0xD0


async def driver_sees(vmm: FakeVmm, up: bool) -> None:
    """Waits until an interrupt has said that the link has changed, and it is `up`."""
    with trio.fail_after(5):
        while True:
            await vmm.intx.wait()
            assert await vmm.read(0, ICR) & Cause.LSC
            await vmm.intx.acknowledge()
            if bool(await vmm.read(0, STATUS) & Status.LU) == up:
                return


async def call_link(controller: ControlClient, up: bool) -> bool:
    """Asks for the cable; what is said of the link, in the answer and afterwards."""
    told = await controller.call("link", up=up)
    assert told == {"link": (await controller.call("state"))["link"]}
    return bool(told["link"])


async def test_the_cable_is_pulled_and_plugged_in(tmp_path: Path) -> None:
    port = RecordingPort()
    async with opened(tmp_path, lambda host: E1000(host, port)) as (_, controller, vmm):
        assert (await controller.call("state"))["link"]
        await vmm.write(0, IMS, Cause.LSC)
        await driver_sees(vmm, True)  # the first negotiation is over
        assert not await call_link(controller, False)
        await driver_sees(vmm, False)
        assert not await call_link(controller, False)
        assert await call_link(controller, True)
        await driver_sees(vmm, True)


async def test_a_cable_without_a_far_end_is_no_link(tmp_path: Path) -> None:
    """Through a wrapper, as with `pcap=`."""
    port = RecordingPort()
    async with opened(tmp_path, lambda host: E1000(host, Wrapper(port))) as (_, controller, _):
        assert not await call_link(controller, False)
        port._set_carrier(False)
        assert not await call_link(controller, True)
        port._set_carrier(True)
        assert (await controller.call("state"))["link"]


async def test_the_cable_of_a_stopped_card(tmp_path: Path) -> None:
    port = RecordingPort()
    async with opened(tmp_path, lambda host: E1000(host, port)) as (_, controller, vmm):
        await controller.call("stop")
        assert not await call_link(controller, False)
        await controller.call("resume")
        await vmm.write(0, IMS, Cause.LSC)
        assert not await vmm.read(0, STATUS) & Status.LU
        assert await call_link(controller, True)
        await driver_sees(vmm, True)


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


async def test_only_a_card_has_a_cable_and_announces(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, _):
        assert (await controller.call("state"))["link"] is None
        with refused("no network card"):
            await controller.call("link", up=True)
        with refused("no network card"):
            await controller.call("announce")
