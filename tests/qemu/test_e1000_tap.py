# SPDX-License-Identifier: BSD-3-Clause
"""The guest's own e1000 driver on our device and a TAP, in all combinations of chipset and memory: traffic,
and all five of the driver's tests, on an interrupt line that the device has to itself.
"""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from guest_moves.nic import check_self_test
from guest_net.accounts import check_way
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
FCS = 4

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(COUNTS.seconds)]


@pytest.mark.combinations
async def test_traffic_and_the_drivers_own_tests(
    guest_machine: GuestMachine,
    serve: Serve,
    namespace: Namespace,
    chipset: Chipset,
    mapped: bool,
    engine: str,
) -> None:
    namespace.add_tap("t0", f"{HOST}/24")
    async with serve("e1000", "--net", "tap:t0", "--engine", engine, netns=namespace.name) as server:
        devices = [VfioUserDevice(server.path)]
        options = MachineOptions(chipset, mapped, devices=devices, files=GUEST_FILES)
        async with guest_machine(options) as guest:
            await bring_up(guest, GUEST)
            wire = Wire(guest, namespace, HOST)
            await ping(guest, HOST, COUNTS.pings)
            await wire.both(COUNTS.rounds)
            await check_statistics(guest, server)
            check_way(await server.ask_counters(), mapped, COUNTS.rounds)
            await check_ipv6(guest, namespace)
            await check_sizes(guest, namespace, server)
            await check_up_and_down(guest)
            check_kernel_log(await guest.kernel_log())
            await check_reboot_and_self_test(guest, namespace, server)
    assert (await server.counters("the end"))["clients_served"] == 1


async def check_statistics(guest: Machine, server: ServerProcess) -> None:
    """gptc, gotc, gprc and gorc since the start are what the wire counted; nothing was thrown away."""
    wire, driver = await counters_at_rest(guest, server)
    assert driver["tx_packets"] == wire["net_sent_frames"]
    assert driver["tx_bytes"] == wire["net_sent_bytes"] + FCS * wire["net_sent_frames"]
    assert driver["rx_packets"] == wire["net_received_frames"]
    assert driver["rx_bytes"] == wire["net_received_bytes"] + FCS * wire["net_received_frames"]
    lost = ("received_filtered", "received_dropped", "received_missed", "net_sent_dropped", "dma_errors")
    assert {name: wire[name] for name in lost} == dict.fromkeys(lost, 0)
    assert wire["net_sent_frames"] > COUNTS.pings < wire["net_received_frames"]


async def counters_at_rest(
    guest: Machine, server: ServerProcess
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """The server's counters and the driver's, read while no frame passed."""
    for _ in range(20):
        before = await server.ask_counters()
        driver = await driver_statistics(guest)
        after = await server.ask_counters()
        if all(before[name] == after[name] for name in ("net_sent_frames", "net_received_frames")):
            return after, driver
    pytest.fail("the wire is never at rest")


async def driver_statistics(guest: Machine) -> Mapping[str, int]:
    lines = (await guest.check("ethtool -S eth0")).splitlines()[1:]
    return {name.strip(): int(value) for name, value in (line.rsplit(":", 1) for line in lines)}


async def check_ipv6(guest: Machine, namespace: Namespace) -> None:
    namespace.add_ipv6("t0", f"{HOST6}/64")
    # No wait for duplicate addresses (busybox's ip knows no `nodad`).
    await guest.check("echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad")
    await guest.check(f"ip -6 address add {GUEST6} dev eth0")
    await ping(guest, HOST6, COUNTS.pings)
    await Wire(guest, namespace, HOST6).both(COUNTS.short_rounds)


async def check_sizes(guest: Machine, namespace: Namespace, server: ServerProcess) -> None:
    """An odd segment size over IPv4 and IPv6, then jumbo frames."""
    for address in (HOST, HOST6):
        wire = Wire(guest, namespace, address, options="mss=1111")
        for mean in await mean_sizes(wire, server):
            assert 1000 < mean < 1111 + 74
    namespace.ip("link set t0 mtu 9000")
    await guest.check("ip link set eth0 mtu 9000")
    await wait_carrier(guest)
    await ping(guest, HOST, COUNTS.pings, size=8972)
    for address in (HOST, HOST6):
        assert min(await mean_sizes(Wire(guest, namespace, address), server)) > 2000
    namespace.ip("link set t0 mtu 1500")


async def mean_sizes(wire: Wire, server: ServerProcess) -> list[float]:
    """Bytes a frame on the wire that carries data, sent and received. One way after the other: of the other
    way's acknowledgements there are the more, the busier the machine is."""
    means = []
    for name, transfer in (("sent", wire.receive), ("received", wire.send)):
        before = await server.ask_counters()
        await transfer(COUNTS.short_rounds)
        after = await server.ask_counters()
        size, frames = (
            after[f"net_{name}_{what}"] - before[f"net_{name}_{what}"] for what in ("bytes", "frames")
        )
        means.append(size / frames)
    return means


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
