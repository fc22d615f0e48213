# SPDX-License-Identifier: BSD-3-Clause
"""The guest's own e1000 driver on our device and a TAP, in all combinations of chipset and memory: traffic,
and all five of the driver's tests, on an interrupt line that the device has to itself.
"""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from guest_moves.nic import check_self_test
from guest_net.accounts import Accounts, check_way, tap_statistics
from guest_net.far_end import far_end
from guest_net.filters import Filters
from vfio_user.client.control import open_control
from vfio_user.client.qemu.command import Chipset, MachineOptions, VfioUserDevice
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import GUEST_FILES, Wire, bring_up, counts, ping, wait_carrier
from vfio_user.client.server_process import ServerProcess

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]

HOST, GUEST = "10.9.0.1", "10.9.0.2/24"
HOST6, GUEST6 = "fd00:9::1", "fd00:9::2/64"
COUNTS = counts()

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(COUNTS.seconds)]


@pytest.mark.combinations
async def test_traffic_and_the_drivers_own_tests(
    guest_machine: GuestMachine,
    serve: Serve,
    namespace: Namespace,
    socket_folder: Path,
    chipset: Chipset,
    mapped: bool,
    engine: str,
) -> None:
    namespace.add_tap("t0", f"{HOST}/24")
    control = socket_folder / "control"
    words = ("e1000", "--net", "tap:t0", "--engine", engine, "--control", str(control))
    async with serve(*words, netns=namespace.name) as server, far_end(namespace) as far:
        devices = [VfioUserDevice(server.path)]
        options = MachineOptions(chipset, mapped, devices=devices, files=GUEST_FILES)
        async with guest_machine(options) as guest:
            accounts = Accounts(guest, server, namespace, far)
            await bring_up(guest, GUEST)
            await ping(guest, HOST, COUNTS.pings)
            await Wire(guest, namespace, HOST).both(COUNTS.rounds)
            counted = await accounts.check()
            assert counted["net_sent_frames"] > COUNTS.pings < counted["net_received_frames"]
            check_way(counted, mapped, COUNTS.rounds)
            if chipset == "q35":  # where the card is plugged in changes nothing of it
                await Filters(guest, server, namespace).check()
            await check_ipv6_and_sizes(guest, namespace, accounts)
            check_kernel_log(await guest.kernel_log())
            if chipset == "q35":
                await check_cable(guest, control)
            await check_up_and_down(guest)
            check_kernel_log(await guest.kernel_log())
            await check_reboot_and_self_test(guest, namespace, server)
    assert (await server.counters("the end"))["clients_served"] == 1


async def check_ipv6_and_sizes(guest: Machine, namespace: Namespace, accounts: Accounts) -> None:
    """IPv6, an odd segment size, jumbo frames; and the statistics, which a change of the MTU begins anew."""
    # All that is on the wire is the guest's: the neighbours' multicasts are counted by its driver too.
    await guest.check("ip link set eth0 promisc on")
    await accounts.begin()
    await check_ipv6(guest, namespace)
    for address in (HOST, HOST6):
        wire = Wire(guest, namespace, address, options="mss=1111")
        for mean in await mean_sizes(wire, accounts.server):
            assert 1000 < mean < 1111 + 74
    await accounts.check()
    namespace.ip("link set t0 mtu 9000")
    await guest.check("ip link set eth0 mtu 9000")
    await wait_carrier(guest)
    await accounts.begin()
    await ping(guest, HOST, COUNTS.pings, size=8972)
    for address in (HOST, HOST6):
        assert min(await mean_sizes(Wire(guest, namespace, address), accounts.server)) > 2000
    await accounts.check()
    namespace.ip("link set t0 mtu 1500")
    await guest.check("ip link set eth0 promisc off")


async def check_ipv6(guest: Machine, namespace: Namespace) -> None:
    namespace.add_ipv6("t0", f"{HOST6}/64")
    # No wait for duplicate addresses (busybox's ip knows no `nodad`).
    await guest.check("echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad")
    await guest.check(f"ip -6 address add {GUEST6} dev eth0")
    await ping(guest, HOST6, COUNTS.pings)
    await Wire(guest, namespace, HOST6).both(COUNTS.short_rounds)


async def mean_sizes(wire: Wire, server: ServerProcess) -> list[float]:
    """Bytes a frame on the wire that carries data, sent and received. One way after the other: of the other
    way's acknowledgements there are the more, the busier the machine is."""
    means = []
    for name, transfer in (("sent", wire.receive), ("received", wire.send)):
        before, start = await server.ask_counters(), tap_statistics(wire.namespace)
        await transfer(COUNTS.short_rounds)
        after, end = await server.ask_counters(), tap_statistics(wire.namespace)
        size, frames = (
            after[f"net_{name}_{what}"] - before[f"net_{name}_{what}"] for what in ("bytes", "frames")
        )
        means.append(size / frames)
        if name == "sent":
            check_bursts(wire, frames, end["rx_packets"] - start["rx_packets"])
    return means


def check_bursts(wire: Wire, frames: int, writes: int) -> None:
    """A burst of frames goes to the kernel in one piece; of jumbo frames it has some seven. For IPv6 the
    driver asks this card for none."""
    if ":" in wire.address:
        assert writes == frames
    else:
        assert writes * (5 if wire.options else 2) < frames


async def check_cable(guest: Machine, path: Path) -> None:
    """It is pulled and plugged in at run time: the driver sees it."""
    async with open_control(path) as control:
        assert await control.call("link", up=False) == {"link": False}
        await wait_carrier(guest, up=False)
        assert await control.call("link", up=True) == {"link": True}
    await wait_carrier(guest)
    await ping(guest, HOST, COUNTS.pings)
    # If a frame was in the ring when the cable was pulled, the driver resets the card to get rid of it.
    check_kernel_log((await guest.check("dmesg -c")).replace("Reset adapter", "", 1))


def check_kernel_log(log: str) -> None:
    """The driver had nothing to complain of. A frame that took more than a second ("Tx Unit Hang") is no
    complaint on a busy machine; a card that hangs is reset after five."""
    complaints = (
        *("timed out", "timeout", "Reset adapter", "WARNING"),
        *("Call Trace", "BUG", "failed", "bad checksum"),
    )
    lines = [line for line in log.splitlines() if "e1000" in line or "eth0" in line or "Call Trace" in line]
    assert [line for line in lines if any(word in line for word in complaints)] == []


async def check_up_and_down(guest: Machine) -> None:
    """The link goes and comes back, and so does the driver."""
    for _ in range(COUNTS.link_cycles):
        await guest.check("ip link set eth0 down")
        await guest.check("ip link set eth0 up")
        await wait_carrier(guest)
        await ping(guest, HOST, 5)
    for _ in range(COUNTS.module_cycles):
        await guest.check("rmmod e1000")
        await guest.check("insmod $(modinfo -n e1000)")
        await bring_up(guest, GUEST)
        await ping(guest, HOST, 5)


async def check_reboot_and_self_test(guest: Machine, namespace: Namespace, server: ServerProcess) -> None:
    """Broadcasts come from the wire all the while, and must not disturb: also not while the register test has
    the receiver on with a ring made of test patterns, nor among the frames of the loopback test."""
    before = await server.ask_counters()
    async with broadcasts(namespace):
        await guest.reboot()
        await bring_up(guest, GUEST)
        await ping(guest, HOST, COUNTS.pings)
        check_kernel_log(await guest.kernel_log())
        sent = (await server.ask_counters())["net_sent_frames"]
        # The driver names the kind of line only when asked for messages about the hardware.
        await guest.check("ethtool -s eth0 msglvl hw on")
        assert "The test result is PASS" in await check_self_test(guest)
        assert "testing unshared interrupt" in await guest.kernel_log()
        after = await server.ask_counters()
        # The 640 frames of the loopback test never came to the wire.
        assert after["net_sent_frames"] - sent < 100
        assert after["net_received_frames"] - before["net_received_frames"] > 1000
        await bring_up(guest)
        await ping(guest, HOST, 20)


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
