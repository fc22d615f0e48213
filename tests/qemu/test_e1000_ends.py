# SPDX-License-Identifier: BSD-3-Clause
"""The guest ends in the middle of traffic: the server lets go of it, keeps the device, serves the next."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from guest_moves.counts import SOAK
from vfio_user.client.drivers.e1000 import open_e1000
from vfio_user.client.fake_vmm import open_vmm
from vfio_user.client.qemu.command import Chipset, MachineOptions, VfioUserDevice
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import GUEST_FILES, Wire, bring_up, counts, flood
from vfio_user.client.server_process import ServerProcess

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]

HOST, GUEST = "10.9.0.1", "10.9.0.2/24"
EEPROM_MAGIC = 0x100E8086  # device and vendor, as ethtool -E wants to hear
EEPROM_OFFSET, EEPROM_VALUE = 0x10, 0x5A
COUNTS = counts()
# The first two have each way to end and each kind of memory together, and both chipsets.
SHAPES: tuple[tuple[Chipset, bool], ...] = (
    ("q35", True),
    ("i440fx", False),
    ("q35", False),
    ("i440fx", True),
)
"""Chipset, whether guest memory is mapped."""

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("chipset", "mapped"), SHAPES if SOAK else SHAPES[:2])
async def test_killed_powered_off_and_booted_again(
    guest_machine: GuestMachine, serve: Serve, namespace: Namespace, chipset: Chipset, mapped: bool
) -> None:
    namespace.add_tap("t0", f"{HOST}/24")
    async with serve("e1000", "--net", "tap:t0", netns=namespace.name) as server:
        devices = [VfioUserDevice(server.path)]
        options = MachineOptions(chipset, mapped, devices=devices, files=GUEST_FILES)
        alone = server.holdings()
        assert not any("memfd" in name for name in alone.mappings)
        for number in range(COUNTS.guests):
            async with guest_machine(options) as guest:
                await check_eeprom(guest, first=not number)
                await bring_up(guest, GUEST)
                async with in_full_flood(guest, namespace, server):
                    assert_attached(server, mapped)
                    await end(guest, killed=(number % 2 == 0) == mapped)
                await server.counters(f"client {number + 1} has left", 60)
            assert server.holdings() == alone
        await check_ours(server)
    assert (await server.counters("the end"))["clients_served"] == COUNTS.guests + 1


async def end(guest: Machine, *, killed: bool) -> None:
    """QEMU dies, or the guest switches its machine off."""
    if killed:
        await guest.kill()
    else:
        assert await guest.power_off() == 0


@contextlib.asynccontextmanager
async def in_full_flood(guest: Machine, namespace: Namespace, server: ServerProcess) -> AsyncIterator[None]:
    """Inside the block frames are passing both ways, until the guest ends."""
    before = await server.ask_counters()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, Wire(guest, namespace, HOST))
        with trio.fail_after(200):
            while not grown_by(before, await server.ask_counters(), 2_000_000):  # noqa: ASYNC110
                await trio.sleep(0.01)
        yield


def grown_by(before: Mapping[str, int], after: Mapping[str, int], size: int) -> bool:
    return all(after[name] - before[name] > size for name in ("net_sent_bytes", "net_received_bytes"))


def assert_attached(server: ServerProcess, mapped: bool) -> None:
    """The guest's memory is mapped if it can be; there are eventfds of interrupts and a connection."""
    holdings = server.holdings()
    assert any("memfd" in name for name in holdings.mappings) == mapped
    assert any("eventfd" in name for name in holdings.fds)


async def check_eeprom(guest: Machine, *, first: bool) -> None:
    """The first guest writes a spare byte of the EEPROM, which survives a reset; the others find it."""
    if first:
        await guest.check(
            f"ethtool -E eth0 magic {EEPROM_MAGIC:#x} offset {EEPROM_OFFSET:#x} value {EEPROM_VALUE:#x}"
        )
    dump = await guest.check(f"ethtool -e eth0 offset {EEPROM_OFFSET:#x} length 1")
    assert int(dump.split()[-1], 16) == EEPROM_VALUE


async def check_ours(server: ServerProcess) -> None:
    """Our own driver starts on what the last guest has left, and finds the byte too."""
    async with open_vmm(server.path) as vmm, open_e1000(vmm) as nic:
        assert nic.board.eeprom[EEPROM_OFFSET // 2] & 0xFF == EEPROM_VALUE
