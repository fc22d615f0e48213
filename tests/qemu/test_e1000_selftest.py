# SPDX-License-Identifier: BSD-3-Clause
"""The Linux driver tests the device: all five of its tests, on an interrupt line of the device's own.

Broadcasts come from the wire all the while, and must not disturb: also not while the register test has the
receiver on with a ring made of test patterns, nor among the frames of the loopback test.
"""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from guest_moves.nic import check_self_test
from vfio_user.client.qemu.command import Chipset, MachineOptions, VfioUserDevice
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import bring_up, ping
from vfio_user.client.server_process import ServerProcess

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(180)]


@pytest.mark.combinations
async def test_all_five_pass(
    guest_machine: GuestMachine,
    serve: Serve,
    namespace: Namespace,
    chipset: Chipset,
    mapped: bool,
    engine: str,
) -> None:
    namespace.add_tap("t0", "10.9.0.1/24")
    async with (
        serve("e1000", "--net", "tap:t0", "--engine", engine, netns=namespace.name) as server,
        broadcasts(namespace),
    ):
        devices = [VfioUserDevice(server.path)]
        async with guest_machine(MachineOptions(chipset, mapped, devices=devices)) as guest:
            await bring_up(guest, "10.9.0.2/24")
            # The driver names the kind of line only when asked for messages about the hardware.
            await guest.check("ethtool -s eth0 msglvl hw on")
            report = await check_self_test(guest)
            assert "The test result is PASS" in report
            assert "testing unshared interrupt" in await guest.kernel_log()
            # The 640 frames of the loopback test never came to the wire.
            counters = await server.ask_counters()
            assert counters["net_sent_frames"] < 100
            assert counters["net_received_frames"] > 1000
            await bring_up(guest)
            await ping(guest, "10.9.0.1", 20)


@contextlib.asynccontextmanager
async def broadcasts(namespace: Namespace) -> AsyncIterator[None]:
    """Inside the block there is one every five milliseconds, to a port on which nobody listens."""
    with namespace.open_socket(kind=socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)

        async def send() -> None:
            while True:
                sender.sendto(bytes(1000), ("10.9.0.255", 9))
                await trio.sleep(0.005)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            yield
            nursery.cancel_scope.cancel()
