# SPDX-License-Identifier: BSD-3-Clause
"""The tour of a card under load: it comes to its end in every way of DMA, and lost frames are noticed."""

import contextlib
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from vfio_user.client.background import background
from vfio_user.client.drivers.e1000 import open_e1000
from vfio_user.client.drivers.e1000_traffic import Traffic, TrafficError
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.client.migration.slow_link import slow_link
from vfio_user.client.server_process import ServerError
from vfio_user.client.switch import Port, Switch, SwitchError, open_switch
from vfio_user.client.tour import TourError, TourOptions, open_tour
from vfio_user.client.vmm_state import VmmState
from vfio_user.device_models.catalog import load_model, make_device
from vfio_user.device_models.echo import Responder
from vfio_user.protocol.values import Payload
from vfio_user.server.engines.native import NativeServer, Settings
from vfio_user.server.net.factory import open_backend
from vfio_user.transport.listener import Listener

MEMORY = ((0, 0x10000), (0x100000, 4 << 20))


@pytest.mark.parametrize("shared", [True, False], ids=["mapped", "by message"])
async def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, shared: bool) -> None:
    vmm = VmmOptions(MEMORY, shared=shared, resample=not shared)
    options = TourOptions(dwell=0.1, ring=64, rate=1e9, vmm=vmm)
    async with open_tour(tmp_path_factory.mktemp("t"), options) as tour:
        for way in (("v2", "v1"), ("v1", "v2")):
            await tour.dwell()
            move = await tour.move(way)
            assert move.protocols == way
            assert move.report.verified_pages == sum(size for _, size in MEMORY) // 4096
        assert tour.home.name == "A"
        report = await tour.finish()
    assert report.problem() == ""
    assert report.traffic.frames == sum(report.rates) > 0
    assert report.beacons > 0
    assert report.driver.frames_received == report.traffic.frames + report.beacons + 1  # ARP
    assert [f"{move.source}{move.destination}" for move in report.moves] == ["AB", "BA"]


async def test_a_network_that_is_faster_than_the_guest_waits_for_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """More than a switch remembers would be on its way, as on a machine that is very busy."""
    options = TourOptions(dwell=0.2, ring=64, rate=1e9, beacons=1e6, vmm=VmmOptions(MEMORY))
    async with open_tour(tmp_path_factory.mktemp("t"), options) as tour:
        for way in (("v2", "v2"), ("v1", "v1")):
            await tour.dwell()
            await tour.move(way)
        report = await tour.finish()
    assert report.problem() == ""


async def test_a_server_that_has_ended_is_named(tmp_path: Path) -> None:
    said = ""
    try:
        async with open_tour(tmp_path, TourOptions(dwell=0.05, ring=64)) as tour:
            tour.home.server.popen.kill()
            tour.home.server.popen.wait()
            await tour.dwell()
    except* ServerError as group:  # alone, or among what the guest's tasks have raised
        said = "".join(traceback.format_exception(group))
    assert "ServerError: server A has ended, with status -9" in said


# What the guest notices


@contextlib.asynccontextmanager
async def traffic_on(folder: Path) -> AsyncIterator[tuple[Traffic, Switch, Port]]:
    """Traffic of a card in this process, its network, and its end of that."""
    async with open_switch(Responder().answer) as switch:
        port = await switch.open_port(folder / "wire")
        with NativeServer(Settings(spin_us=0)) as server:
            backend = open_backend(f"stream:{folder / 'wire'}", server.poller, server.call_later)
            listener = Listener.bind(folder / "server")
            with contextlib.closing(backend), contextlib.closing(listener):
                server.install(lambda host: make_device(load_model("e1000"), host, backend, {}))
                server.listen(listener)
                async with background() as nursery:
                    nursery.start_soon(server.run)
                    async with open_vmm(folder / "server", VmmOptions(MEMORY)) as vmm, open_e1000(vmm) as nic:
                        traffic = Traffic(nic, patience=0.5)
                        await traffic.resolve()
                        yield traffic, switch, port


async def test_frames_that_come_unasked(tmp_path: Path) -> None:
    async with traffic_on(tmp_path) as (traffic, switch, _):
        for _ in range(5):
            switch.send(traffic.beacon())
        assert (await traffic.bulk(10)).frames == 10
        await traffic.last_beacons()
        assert traffic.beacons == 5


def lose(frames: list[bytes]) -> list[bytes]:
    return frames[1:]


def repeat(frames: list[bytes]) -> list[bytes]:
    return frames[:1] + frames


def swap(frames: list[bytes]) -> list[bytes]:
    return frames[::-1]


def cut_off_the_last(frames: list[bytes]) -> list[bytes]:
    return frames[:-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose, "beacon 1 comes where 0 was due"),
        (repeat, "beacon 0 comes where 1 was due"),
        (swap, "beacon 2 comes where 0 was due"),
        (cut_off_the_last, "no beacon frame"),
    ],
)
async def test_frames_that_are_lost_or_twice(
    tmp_path: Path, spoil: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    async with traffic_on(tmp_path) as (traffic, switch, _):
        for frame in spoil([traffic.beacon() for _ in range(3)]):
            switch.send(frame)
        with pytest.raises(TrafficError, match=message):
            await traffic.last_beacons()


async def test_a_switch_that_is_told_wrong_numbers(tmp_path: Path) -> None:
    async with traffic_on(tmp_path) as (traffic, switch, port):
        await traffic.bulk(3)
        other = await switch.open_port(tmp_path / "other")
        with pytest.raises(SwitchError, match="has taken 99 frames, 4 were sent"):
            await switch.move(port, other, sent=4, taken=99)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
            await switch.move(port, other, sent=5, taken=4)


async def test_a_wire_that_nobody_connects_to(tmp_path: Path) -> None:
    async with open_switch(Responder().answer) as switch:
        port = await switch.open_port(tmp_path / "wire")
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.02):
            await port.wait_connected()
        async with await trio.open_unix_socket(tmp_path / "wire"):
            with trio.fail_after(20):
                await port.wait_connected()


# The link


class Sink:
    """Notes what comes, and when."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def note(self, name: str) -> None:
        self.calls.append((name, trio.current_time()))

    async def open(self, ranges: Sequence[tuple[int, int]], devices: int) -> None:
        self.note("open")

    async def memory(self, address: int, data: memoryview) -> None:
        self.note("memory")

    async def state(self, device: int, data: Payload) -> None:
        self.note("state")

    async def setup(self, states: Sequence[VmmState]) -> None:
        self.note("setup")

    async def complete(self) -> None:
        self.note("complete")

    async def abandon(self) -> None:
        self.note("abandon")


async def test_a_slow_link_takes_its_time(autojump_clock: MockClock) -> None:
    sink = Sink()
    link, begun = slow_link(1000)(sink), trio.current_time()
    await link.open([], 1)
    await link.memory(0, memoryview(bytes(500)))
    await link.state(0, bytes(2000))
    await link.setup([])
    await trio.sleep(10)  # what is not used is not saved up
    await link.memory(0, memoryview(bytes(1000)))
    await link.complete()
    await link.abandon()
    assert [(name, round(at - begun, 6)) for name, at in sink.calls] == [
        ("open", 0),
        ("memory", 0),
        ("state", 0.5),
        ("setup", 2.5),
        ("memory", 12.5),
        ("complete", 13.5),
        ("abandon", 13.5),
    ]


def test_the_error_is_one_that_the_demo_knows() -> None:
    from vfio_user.cli.demo import KNOWN

    assert {TourError, SwitchError, TrafficError, ServerError} <= set(KNOWN)
