# SPDX-License-Identifier: BSD-3-Clause
"""The guest's e1000 driver over `--net stream:` and passt, in all combinations of chipset and memory."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from guest_net.accounts import check_way
from vfio_user.client.qemu.command import Chipset, MachineOptions, VfioUserDevice
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import GUEST_FILES, Wire, bring_up, counts, ping
from vfio_user.client.server_process import ServerProcess

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]

# The guest has the host's own address; TCP to the gateway's goes to the host's loopback, as passt has it.
ADDRESS, GATEWAY = "192.0.2.15/24", "192.0.2.1"
ELSEWHERE = "198.51.100.1"
# passt of 2023 goes by a window that the guest has taken back since, takes the answers for losses and sends
# all of it again, for ever. A window that never changes spares us that.
SOCKET_OPTIONS = "rcvbuf=1000000,window-clamp=32768"
COUNTS = counts()

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(COUNTS.seconds)]


@pytest.mark.usefixtures("passt_program")
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "message"])
@pytest.mark.parametrize("chipset", ["q35", "i440fx"])
async def test_traffic_through_passt(
    guest_machine: GuestMachine,
    serve: Serve,
    namespace: Namespace,
    socket_folder: Path,
    chipset: Chipset,
    mapped: bool,
) -> None:
    namespace.add_uplink(ADDRESS, GATEWAY)
    namespace.ip(f"address add {ELSEWHERE}/32 dev lo")
    namespace.sysctl("net.ipv4.ping_group_range", "0 2147483647")
    async with (
        namespace.passt(socket_folder) as passt,
        serve("e1000", "--net", f"stream:{passt}", netns=namespace.name) as server,
    ):
        devices = [VfioUserDevice(server.path)]
        options = MachineOptions(chipset, mapped, devices=devices, files=GUEST_FILES)
        async with guest_machine(options) as guest:
            await bring_up(guest, ADDRESS)
            await guest.check(f"ip route add default via {GATEWAY}")
            await ping(guest, ELSEWHERE, COUNTS.pings)
            await Wire(guest, namespace, GATEWAY, "127.0.0.1", SOCKET_OPTIONS).both(COUNTS.rounds)
            check_way(await server.ask_counters(), mapped, COUNTS.rounds)
