# SPDX-License-Identifier: BSD-3-Clause
"""The guest ends in the middle of traffic: the server lets go of it, keeps the device, serves the next."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from vfio_user.client.qemu.command import Chipset, MachineOptions, VfioUserDevice
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.server_process import ServerProcess
from vfio_user.client.qemu.traffic import GUEST_FILES, Wire, bring_up, counts, flood, ping

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]

HOST, GUEST = "10.9.0.1", "10.9.0.2/24"
EEPROM_MAGIC = 0x100E8086  # device and vendor, as ethtool -E wants to hear

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("chipset", "mapped"), [("q35", True), ("i440fx", False)], ids=["q35-mapped", "i440fx-message"]
)
async def test_killed_powered_off_and_booted_again(
    guest_machine: GuestMachine, serve: Serve, namespace: Namespace, chipset: Chipset, mapped: bool
) -> None:
    namespace.add_tap("t0", f"{HOST}/24")
    async with serve("e1000", "--net", "tap:t0", netns=namespace.name) as server:
        devices = [VfioUserDevice(server.path)]
        options = MachineOptions(chipset, mapped, devices=devices, files=GUEST_FILES)
        alone = server.holdings()
        assert not any("memfd" in name for name in alone.mappings)

        async with guest_machine(options) as guest:
            await bring_up(guest, GUEST)
            await write_eeprom(guest, 0x5A)
            async with in_full_flood(guest, namespace, server):
                assert_attached(server, mapped)
                await guest.kill()
            await server.wait_clients_left(1)
        assert server.holdings() == alone

        async with guest_machine(options) as guest:
            assert await read_eeprom(guest) == 0x5A
            await bring_up(guest, GUEST)
            async with in_full_flood(guest, namespace, server):
                assert_attached(server, mapped)
                assert await guest.power_off() == 0
            await server.wait_clients_left(2)
        assert server.holdings() == alone

        async with guest_machine(options) as guest:
            assert await read_eeprom(guest) == 0x5A
            await bring_up(guest, GUEST)
            await ping(guest, HOST, counts().pings)
    assert server.reports()[-1]["clients_served"] == 3


@contextlib.asynccontextmanager
async def in_full_flood(guest: Machine, namespace: Namespace, server: ServerProcess) -> AsyncIterator[None]:
    """Inside the block frames are passing both ways, until the guest ends."""
    before = await server.counters()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, Wire(guest, namespace, HOST))
        with trio.fail_after(20):
            while not grown_by(before, await server.counters(), 2_000_000):  # noqa: ASYNC110
                await trio.sleep(0.01)
        yield


def grown_by(before: Mapping[str, int], after: Mapping[str, int], size: int) -> bool:
    return all(after[name] - before[name] > size for name in ("net_sent_bytes", "net_received_bytes"))


def assert_attached(server: ServerProcess, mapped: bool) -> None:
    """The guest's memory is mapped if it can be; there are eventfds of interrupts and a connection."""
    holdings = server.holdings()
    assert any("memfd" in name for name in holdings.mappings) == mapped
    assert any("eventfd" in name for name in holdings.fds)


async def write_eeprom(guest: Machine, value: int) -> None:
    """Of the spare bytes at the end of the EEPROM's first half; they survive a reset of the device."""
    await guest.check(f"ethtool -E eth0 magic {EEPROM_MAGIC:#x} offset 0x10 value {value:#x}")


async def read_eeprom(guest: Machine) -> int:
    dump = await guest.check("ethtool -e eth0 offset 0x10 length 1")
    return int(dump.split()[-1], 16)
