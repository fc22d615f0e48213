# SPDX-License-Identifier: BSD-3-Clause
"""A network card under load that is moved between two server processes, and all that can be checked of it.

    async with open_tour(folder) as tour:
        for source, destination in WAYS:
            await tour.dwell()
            await tour.move((source, destination))
        report = await tour.finish()

Every frame that the guest sends has a number, and must come back once, in order and unchanged; the two
memories are compared page by page; and what the servers, the switch, the card and its driver have counted
must agree over all moves. So no frame is lost that the wire had accepted, and none is there twice.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vfio_user.client.attachment import Attachment, attach
from vfio_user.client.background import background
from vfio_user.client.drivers.e1000 import E1000
from vfio_user.client.drivers.e1000_traffic import BulkReport, Traffic
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.guest import Guest, open_guest
from vfio_user.client.migration.migrate import Migration, Options
from vfio_user.client.migration.report import Limits, Progress, Step
from vfio_user.client.migration.slow_link import slow_link
from vfio_user.client.server_process import ServerError, ServerProcess, serving
from vfio_user.client.switch import Port, Switch, open_switch
from vfio_user.client.tour_report import Meter, Move, TourReport
from vfio_user.device_models.echo import Responder
from vfio_user.transport.channel import PeerGone

WAYS = (("v2", "v2"), ("v1", "v1"), ("v2", "v1"), ("v1", "v2"))
"""Protocol at the source and at the destination."""
_PATIENCE = 5.0
_LOOK_AGAIN, _TICK = 0.01, 0.002
_UNDER_WAY = 1 << 13
"""Most beacons that the guest has not taken yet; what a switch remembers is twice that."""


class TourError(Exception):
    """What was counted does not agree, or something did not come in time."""


@dataclass(frozen=True, slots=True)
class TourOptions:
    """`dwell`: seconds of traffic before each move. `ring`: descriptors of each of the driver's rings.
    `beacons`: frames a second that the network sends unasked. `rate`: bytes a second from host to host.
    `engines`: of the servers A and B (`--engine`). `irqs_first`: as `Options` has it."""

    dwell: float = 0.3
    ring: int = 1024
    beacons: float = 2000.0
    rate: float = 125e6
    limits: Limits = field(default_factory=lambda: Limits(downtime=0.03, rounds=3))
    vmm: VmmOptions = field(default_factory=lambda: VmmOptions(resample=True))
    seed: int = 1
    engines: tuple[str, str] = ("native", "native")
    irqs_first: bool = True


def _silent(_progress: Progress) -> None:
    """Nobody wants to know."""


@dataclass(slots=True)
class Place:
    """Where the guest can be: a server, and the path and port of its wire."""

    name: str
    server: ServerProcess
    wire: Path
    port: Port

    @property
    def other(self) -> str:
        return "B" if self.name == "A" else "A"

    def check(self) -> None:
        """ServerError when the server has ended."""
        if self.server.popen.poll() is not None:
            raise ServerError(f"server {self.name} has ended, with status {self.server.popen.returncode}")


class Tour:
    """Make it with `open_tour`. `places` are those called "A", where the guest begins, and "B"."""

    def __init__(self, places: Mapping[str, Place], switch: Switch, options: TourOptions) -> None:
        self.places = places
        self.home = places["A"]
        """Where the guest is."""
        self.meter = Meter()
        self.moves: list[Move] = []
        self._switch = switch
        self._options = options
        self._counted: Counter[str] = Counter()
        self._switched = self._held = 0
        self._paused = 0.0
        self._leaving = False
        self._traffic: BulkReport | None = None

    async def start(self, nursery: trio.Nursery, guest: Guest, here: Attachment) -> None:
        """Bring the card up, and let frames flow."""
        self._nursery, self._guest, self._here = nursery, guest, here
        self._before: Mapping[str, int] = await self.home.server.ask_counters()
        self.nic = E1000(guest.devices[0], self._options.ring)
        await guest.run(self.nic.start)
        guest.start(self.nic.serve_interrupts)
        self.traffic = Traffic(self.nic, seed=self._options.seed, patience=_PATIENCE)
        await guest.run(self.traffic.resolve)
        guest.start(self._flow)
        nursery.start_soon(self._send_beacons)

    async def _send_beacons(self) -> None:
        """The network does not know that the guest stands still, or where it is. It waits for a guest that
        is too slow to take them: what is on its way has to be remembered."""
        begun, sent = trio.current_time(), 0
        while not self._leaving:
            await trio.sleep(_TICK)
            due = int((trio.current_time() - begun) * self._options.beacons)
            for _ in range(min(due - sent, _UNDER_WAY - self.traffic.beacons_under_way)):
                self._switch.send(self.traffic.beacon())
            sent = due

    async def _flow(self) -> None:
        flow = self.traffic.flow
        self._traffic = await flow(lambda _: not self._leaving, progress=self.meter.take)

    async def dwell(self) -> None:
        """Stay for a while. TourError when no frames come, ServerError when the server has ended."""
        before = self.meter.frames
        await trio.sleep(self._options.dwell)
        if not await _within(_PATIENCE, lambda: self.meter.frames > before):
            self.home.check()
            raise TourError(f"no frame has come for {self._options.dwell + _PATIENCE:g} s")

    # A move

    async def move(self, way: tuple[str, str], tell: Callable[[Progress], None] = _silent) -> Move:
        """To the other server, by these protocols. MigrationError, SwitchError or TourError if it fails."""
        source, destination = self.home, self.places[self.home.other]
        there = await attach(self._nursery, destination.server.path, self._options.vmm, incoming=True)
        await self._connected(destination)
        begun, frames = self.meter.now, self.meter.frames
        report = (await self._migration(there, way, tell).run()).check()
        ended = self.meter.now
        await self._here.close()
        await self._plug_anew(source)
        self._here, self.home = there, destination
        frames = self.meter.frames - frames
        names = source.name, destination.name
        self.moves.append(Move(*names, way, report, begun, self._paused, ended, frames, self._held))
        return self.moves[-1]

    async def _connected(self, place: Place) -> None:
        """A server whose wire was cut tries again once a second."""
        with trio.move_on_after(_PATIENCE) as scope:
            await place.port.wait_connected()
        if scope.cancelled_caught:
            raise TourError(f"server {place.name} does not connect to its wire")

    async def _plug_anew(self, place: Place) -> None:
        """The wire was cut, so nothing old is left on it: offer the server a new one."""
        place.wire.unlink()
        place.port = await self._switch.open_port(place.wire)

    def _migration(
        self, there: Attachment, way: tuple[str, str], tell: Callable[[Progress], None]
    ) -> Migration:
        def watch(progress: Progress) -> None:
            if progress.step is Step.PAUSE:
                self._paused = self.meter.now
            tell(progress)

        return Migration(
            self._here.vmm,
            there.vmm,
            guest=self._guest,
            limits=self._options.limits,
            options=Options(
                *way,
                link=slow_link(self._options.rate),
                switch=self._rewire,
                irqs_first=self._options.irqs_first,
            ),
            progress=watch,
        )

    async def _rewire(self) -> None:
        """Both devices stand still. What was sent must all have come; what waits goes to the other side."""
        source, destination = self.home, self.places[self.home.other]
        coming: list[Mapping[str, int]] = []

        async def look() -> None:
            coming.append(await destination.server.ask_counters())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            stay = await self._count_stay()
        sent, taken = stay["net_sent_frames"], stay["net_received_frames"]
        with trio.move_on_after(_PATIENCE) as scope:
            await self._switch.move(source.port, destination.port, sent=sent, taken=taken)
        if scope.cancelled_caught:
            raise TourError(f"of {sent} frames sent at {source.name}, {source.port.received} have come")
        self._before = coming[0]
        self._held = destination.port.sent

    async def _count_stay(self) -> Mapping[str, int]:
        """What the server has counted since the guest came to it."""
        now: Mapping[str, int] = await self.home.server.ask_counters()
        stay = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._counted.update(stay)
        self._switched += self.home.port.received
        return stay

    # The end

    async def finish(self) -> TourReport:
        """Let all frames come home, and compare everything. TourError names what differs."""
        self._leaving = True
        await _within(_PATIENCE, lambda: self._traffic is not None)
        if self._traffic is None:
            raise TourError("the last frames do not come")
        await self._guest.run(self.traffic.last_beacons)
        await self._guest.run(self.traffic.check_statistics)
        await self._guest.run(self.nic.stop)
        await self._count_stay()
        report = self._report(self._traffic, await self.home.server.ask_counters())
        if problem := report.problem():
            raise TourError(problem)
        return report

    def _report(self, traffic: BulkReport, card: Mapping[str, int]) -> TourReport:
        meter = self.meter
        return TourReport(
            moves=tuple(self.moves),
            traffic=traffic,
            beacons=self.traffic.beacons,
            driver=self.nic.counters,
            counted=self._counted,
            card=card,
            switched=self._switched,
            rates=tuple(meter.rates),
            silence=meter.silence * 1000,
        )


async def _within(seconds: float, done: Callable[[], bool]) -> bool:
    """Whether it is done in time."""
    with trio.move_on_after(seconds):
        while not done():  # noqa: ASYNC110  # guest code tells nobody
            await trio.sleep(_LOOK_AGAIN)
    return done()


@contextlib.asynccontextmanager
async def open_tour(folder: Path, options: TourOptions | None = None) -> AsyncIterator[Tour]:
    """Two servers in processes of their own, with sockets in `folder`, and a guest with traffic at the
    first; they are stopped in the end. ServerError, DriverError or TrafficError when something fails."""
    options = options or TourOptions()
    async with open_switch(Responder().answer) as switch, contextlib.AsyncExitStack() as stack:
        places = {}
        for name, engine in zip(("A", "B"), options.engines, strict=True):
            wire = folder / f"{name}.wire"
            port = await switch.open_port(wire)
            words = ["--net", f"stream:{wire}", "--engine", engine]
            server = await stack.enter_async_context(serving("e1000", folder / f"{name}.sock", words))
            places[name] = Place(name, server, wire, port)
        tour = Tour(places, switch, options)
        try:
            async with background() as nursery:
                here = await attach(nursery, tour.home.server.path, options.vmm)
                async with open_guest([here.vmm]) as guest:
                    await tour.start(nursery, guest, here)
                    yield tour
        except* PeerGone as group:
            for place in places.values():
                place.check()
            raise TourError("a server has ended the connection") from group
