# SPDX-License-Identifier: BSD-3-Clause
"""The 82540EM driver on our model over the native server, in one process: traffic, and what it notices."""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from vfio_user.client.background import background
from vfio_user.client.drivers.e1000 import E1000, DriverError, open_e1000
from vfio_user.client.drivers.e1000_hardware import Cause, Reg
from vfio_user.client.drivers.e1000_traffic import Traffic, TrafficError
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions, open_vmm
from vfio_user.device_models.catalog import load_model, make_device, parse_options
from vfio_user.device_models.device import Device
from vfio_user.device_models.echo import EchoBackend
from vfio_user.device_models.net import NetBackend
from vfio_user.device_models.scratch import Scratch
from vfio_user.server.engines.native import NativeServer, Settings
from vfio_user.server.host import ServerHost
from vfio_user.server.net.factory import open_backend

RAM = ((0, 0x10000), (0x100000, 4 << 20))


def e1000(backend: NetBackend) -> Callable[[ServerHost], Device]:
    model = load_model("e1000")
    return lambda host: make_device(model, host, backend, parse_options(model, ()))


@contextlib.asynccontextmanager
async def vmm_on(server: NativeServer, shared: bool = True) -> AsyncIterator[FakeVmm]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    server.adopt(theirs)
    async with background() as nursery:
        nursery.start_soon(server.run)
        async with open_vmm(ours, VmmOptions(RAM, shared=shared, resample=True)) as vmm:
            yield vmm


@contextlib.asynccontextmanager
async def nic_on(net: str, *, shared: bool = True, ring: int = 256) -> AsyncIterator[E1000]:
    with NativeServer(Settings(spin_us=0)) as server:
        backend = open_backend(net, server.poller, server.call_later)
        try:
            server.install(e1000(backend))
            async with vmm_on(server, shared) as vmm, open_e1000(vmm, ring=ring) as nic:
                yield nic
        finally:
            backend.close()


async def test_an_interrupt_that_waits_from_before_disturbs_no_start() -> None:
    with NativeServer(Settings(spin_us=0)) as server:
        backend = open_backend("echo", server.poller, server.call_later)
        server.install(e1000(backend))
        async with vmm_on(server) as vmm:
            for register in (Reg.IMS, Reg.ICS):
                await vmm.write(0, register, Cause.LSC)
            async with open_e1000(vmm) as nic:
                assert (await Traffic(nic).resolve()).ip
        backend.close()


@pytest.mark.parametrize("shared", [True, False])
async def test_traffic(shared: bool) -> None:
    async with nic_on("echo", shared=shared) as nic:
        traffic = Traffic(nic)
        assert (await traffic.resolve()).mac == bytes.fromhex("026563686f00")
        assert (await traffic.ping(3)).count == 3
        assert (await traffic.bulk(70)).frames == 70
        assert (await traffic.segments(10_000, 1000)).frames == 10
        await traffic.check_statistics()
        assert nic.mac == bytes.fromhex("525400123456")
        assert nic.causes["RXT0"] > 0


async def test_a_ring_smaller_than_the_burst() -> None:
    async with nic_on("echo", ring=8) as nic:
        traffic = Traffic(nic)
        await traffic.resolve()
        report = await traffic.bulk(40, window=6, batch=3)
        assert report.frames == 40
        await nic.drain()
        assert nic.tx_room == 7


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("received.corrupt=1", "bad frame|not the answer|due|not what was sent|no arp"),
        ("received.duplicate=1", "due|not the answer"),
        ("drop=1", "no arp frame"),
    ],
)
async def test_a_bad_wire_is_noticed(fault: str, message: str) -> None:
    async with nic_on(f"echo,{fault},seed=3") as nic:
        traffic = Traffic(nic, patience=0.02)

        async def resolve_and_ping() -> None:
            await traffic.resolve()
            await traffic.ping(5)

        with pytest.raises(TrafficError, match=message):
            await resolve_and_ping()


async def test_statistics_that_differ_are_noticed() -> None:
    async with nic_on("echo") as nic:
        traffic = Traffic(nic)
        await traffic.resolve()
        nic.counters.frames_sent += 1
        with pytest.raises(TrafficError, match="gptc 1, not 2"):
            await traffic.check_statistics()


async def test_another_device_is_refused() -> None:
    with NativeServer(Settings(spin_us=0)) as server:
        server.install(Scratch)
        async with vmm_on(server) as vmm:
            with pytest.raises(DriverError, match="no 82540EM"):
                async with open_e1000(vmm):
                    pytest.fail("this is no NIC")


async def test_no_cable() -> None:
    backend = EchoBackend()
    backend.link_up = False
    with NativeServer(Settings(spin_us=0)) as server:
        server.install(e1000(backend))
        async with vmm_on(server) as vmm:
            with pytest.raises(DriverError, match="no link"):
                async with open_e1000(vmm, link_patience=0.01):
                    pytest.fail("there is no link")
