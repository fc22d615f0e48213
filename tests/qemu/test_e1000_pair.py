# SPDX-License-Identifier: BSD-3-Clause
"""Two devices in one guest, each with its own server and wire; and a VLAN from one to the other."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from guest_net.accounts import check_way
from guest_net.vlan import check_vlan
from vfio_user.client.qemu.command import Chipset, MachineOptions, VfioUserDevice
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import GUEST_FILES, Wire, bring_up, counts, ping
from vfio_user.client.server_process import ServerProcess

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]

MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
COUNTS = counts()

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(COUNTS.seconds)]


def serve_words(number: int) -> tuple[str, ...]:
    return ("e1000", "--net", f"tap:t{number}", "--set", f"mac={MACS[number]}")


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "message"])
@pytest.mark.parametrize("chipset", ["q35", "i440fx"])
async def test_both_work_at_once(
    guest_machine: GuestMachine, serve: Serve, namespace: Namespace, chipset: Chipset, mapped: bool
) -> None:
    for number in (0, 1):
        namespace.add_tap(f"t{number}", f"10.9.{number}.1/24")
    async with (
        serve(*serve_words(0), netns=namespace.name, name="first") as first,
        serve(*serve_words(1), netns=namespace.name, name="second") as second,
    ):
        devices = [VfioUserDevice(server.path) for server in (first, second)]
        options = MachineOptions(chipset, mapped, devices=devices, files=GUEST_FILES)
        async with guest_machine(options) as guest:
            names = [await interface_of(guest, mac) for mac in MACS]
            for number, name in enumerate(names):
                await bring_up(guest, f"10.9.{number}.2/24", interface=name)
                await ping(guest, f"10.9.{number}.1", COUNTS.pings)
            async with trio.open_nursery() as nursery:
                for number in (0, 1):
                    wire = Wire(guest, namespace, f"10.9.{number}.1")
                    nursery.start_soon(wire.both, COUNTS.pair_rounds)
            for server in (first, second):
                counters = await server.ask_counters()
                payload = COUNTS.pair_rounds * 1_000_000
                assert min(counters["net_sent_bytes"], counters["net_received_bytes"]) > payload
                check_way(counters, mapped, COUNTS.pair_rounds)
            await check_vlan(guest, namespace, names, COUNTS)


async def interface_of(guest: Machine, mac: str) -> str:
    """The name of the guest's interface with that address."""
    return (await guest.check(f"grep -l {mac} /sys/class/net/*/address")).split("/")[4]
