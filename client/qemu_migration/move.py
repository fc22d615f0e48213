# SPDX-License-Identifier: BSD-3-Clause
"""A move under way: both QEMUs, every device with both of its servers, and what has been measured so far."""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from vfio_user.client.control import ControlClient, ControlLost, open_control
from vfio_user.client.qemu_migration.carry import Carrier
from vfio_user.client.qemu_migration.facts import Facts
from vfio_user.client.qemu_migration.places import Places
from vfio_user.client.qemu_migration.qemu_side import EVENTS, QemuSide
from vfio_user.client.qemu_migration.qmp import QmpLost, open_qmp
from vfio_user.client.qemu_migration.report import DeviceReport, MoveError, Where
from vfio_user.client.qemu_migration.request import DeviceRequest, Request
from vfio_user.client.qemu_migration.settings import Settings
from vfio_user.client.qemu_migration.together import side_by_side
from vfio_user.client.qemu_migration.trail import Trail
from vfio_user.client.qemu_migration.view import View
from vfio_user.client.qemu_migration.writes import Growth, Written
from vfio_user.protocol.json_rpc import RpcError


class MovingDevice:
    """One device; its figures are collected here."""

    def __init__(self, wanted: DeviceRequest, source: ControlClient, destination: ControlClient) -> None:
        self.id = wanted.id
        self.wanted = wanted
        self.source = source
        self.destination = destination
        self.carrier = Carrier(wanted.source, wanted.destination)
        self.model = ""
        self.write_through = False
        self.growth = Growth()
        self.stopped: Mapping[str, Any] = {}
        """What the source's server told when it had stopped it."""
        self.view: View | None = None
        """QEMU's own view of it, taken at the source."""
        self.early: View | None = None
        """What the destination's QEMU was given of it while memory was copied."""
        self.placed = False
        """The destination's QEMU has the view already."""
        self.written_before = self.written = Written()
        """By message, before memory was copied and until now."""
        self.pages_handed_over = 0
        self.intx_lowered = False
        self.ms: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes the milliseconds that a block took as `name`."""
        begin = time.perf_counter()
        yield
        self.ms[name] = (time.perf_counter() - begin) * 1000

    def report(self) -> DeviceReport:
        return DeviceReport(
            id=self.id,
            model=self.model,
            write_through=self.write_through,
            state_bytes=self.carrier.bytes,
            pages_handed_over=self.pages_handed_over,
            message_writes=self.written.writes - self.written_before.writes,
            message_bytes=self.written.bytes - self.written_before.bytes,
            intx_lowered=self.intx_lowered,
            **{f"{name}_ms": value for name, value in self.ms.items()},
        )


@dataclass(eq=False)
class Move:
    """`was_running`: the source's guest ran, and shall run at the destination. `marks`: moments of
    `time.perf_counter`, by what had been reached then."""

    request: Request
    trail: Trail
    source: QemuSide
    destination: QemuSide
    devices: tuple[MovingDevice, ...]
    _nursery: trio.Nursery
    facts: Facts | None = None
    places: Places | None = None
    """Where QEMU has everything, asked for when the CPUs stood still."""
    settings: list[Settings] = field(default_factory=list)
    was_running: bool = True
    marks: dict[str, float] = field(default_factory=dict)
    ram: list[tuple[float, Mapping[str, int]]] = field(default_factory=list)
    """QEMU's figures while it copied, by seconds since the start."""
    continued: bool = False
    """`migrate-continue` has been sent: the destination may have the guest."""
    started: bool = False
    """`cont` has been sent to the destination: the guest may run there."""

    def mark(self, name: str) -> None:
        self.marks[name] = time.perf_counter()

    def between(self, begin: str, end: str) -> float:
        """Milliseconds; 0 when one of the two was not reached."""
        if begin not in self.marks or end not in self.marks:
            return 0.0
        return (self.marks[end] - self.marks[begin]) * 1000

    async def each(self, work: Callable[[MovingDevice], Awaitable[None]]) -> None:
        """The same for all devices at once; the first failure comes out, with the device's name."""
        async with side_by_side() as nursery:
            for device in self.devices:
                nursery.start_soon(self._one, work, device)

    async def reconnect(self, side: QemuSide) -> None:
        """A new connection to a monitor that was lost. QmpLost."""
        await self._nursery.start(_keep, side, side.qmp.address)

    async def reconnect_server(self, device: MovingDevice, where: Where) -> None:
        """A new connection to a server whose control connection was lost. ControlLost."""
        path = device.wanted.source if where is Where.SOURCE else device.wanted.destination
        control = await self._nursery.start(_keep_control, path)
        if where is Where.SOURCE:
            device.source = control
        else:
            device.destination = control

    async def _one(self, work: Callable[[MovingDevice], Awaitable[None]], device: MovingDevice) -> None:
        try:
            await work(device)
        except (ControlLost, RpcError) as error:
            raise MoveError(f"{device.id}, a server of it: {error}") from error


async def open_move(request: Request, trail: Trail, nursery: trio.Nursery) -> Move:
    """Connections to everybody, which end with `nursery`. MoveError: somebody cannot be reached; nothing has
    been touched."""
    source = await _open_side(nursery, request.source_qmp, Where.SOURCE)
    destination = await _open_side(nursery, request.destination_qmp, Where.DESTINATION)
    devices = [await _open_device(nursery, device) for device in request.devices]
    return Move(request, trail, source, destination, tuple(devices), nursery)


async def _open_side(nursery: trio.Nursery, address: str, where: Where) -> QemuSide:
    side = QemuSide(where)
    try:
        await nursery.start(_keep, side, address)
    except QmpLost as error:
        raise MoveError(f"the {where.value}'s QEMU: {error}", where) from error
    return side


async def _keep(
    side: QemuSide, address: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """A connection's life, in a task of its own: a new one may be made inside any time-out."""
    async with open_qmp(address) as qmp:
        with qmp.listen(*EVENTS) as events:
            side.qmp = qmp
            task_status.started()
            await side.follow(events)


async def _open_device(nursery: trio.Nursery, wanted: DeviceRequest) -> MovingDevice:
    ends = []
    for where, path in ((Where.SOURCE, wanted.source), (Where.DESTINATION, wanted.destination)):
        try:
            ends.append(await nursery.start(_keep_control, path))
        except ControlLost as error:
            raise MoveError(f"{wanted.id}, the {where.value}'s server: {error}", where) from error
    return MovingDevice(wanted, *ends)


async def _keep_control(
    path: Path, task_status: trio.TaskStatus[ControlClient] = trio.TASK_STATUS_IGNORED
) -> None:
    async with open_control(path) as control:
        task_status.started(control)
        await trio.sleep_forever()


async def within(seconds: float, work: Awaitable[Any], complaint: str, where: Where) -> Any:
    """The result of `work`. MoveError with `complaint` when it takes too long."""
    with trio.move_on_after(seconds) as scope:
        return await work
    assert scope.cancelled_caught
    raise MoveError(complaint, where)
