# SPDX-License-Identifier: BSD-3-Clause
"""A guest that can be moved between two places: at each a QEMU, a server for each device, its TAPs.

    places = one_host(namespace, "10.9.0.1/24")
    async with open_moving(lab, options, [Model("e1000", "nic")], places) as moving:
        destination = await moving.prepare()
        ... move it from moving.here to destination ...
        await moving.moved(destination)

A guest goes to and fro: each destination is a fresh QEMU with fresh servers, and takes the TAPs that its
place's last ones have left. Commands that were asked for before a move are answered after it.
"""

import contextlib
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from vfio_user.client.background import background
from vfio_user.client.qemu.command import MachineOptions, VfioUserDevice
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import Machine, MachineError, open_machine, run_folder
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.server_process import ServerProcess, serving

BRIDGE = "br0"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a QEMU and its servers run, a TAP for each device that wants one, and more words for QEMU."""

    namespace: Namespace
    taps: Sequence[str] = ()
    extra: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A device of the guest: model, QEMU's `id` for it, more words for `serve`. `tap`: it is a NIC."""

    name: str
    id: str
    words: Sequence[str] = ()
    tap: bool = False
    root_port: bool = False
    addr: str = ""
    environment: Mapping[str, str] | None = None


@dataclass(slots=True, eq=False)
class Side:
    """A QEMU with its servers. `controls` has the path of each device's control socket, by its `id`."""

    machine: Machine
    place: Place
    folder: Path
    servers: Mapping[str, ServerProcess]
    killed: set[str] = field(default_factory=set)
    _leave: trio.Event = field(default_factory=trio.Event)
    _left: trio.Event = field(default_factory=trio.Event)
    _failure: Exception | None = None

    @property
    def qmp(self) -> Path:
        return self.machine.qmp_path

    @property
    def controls(self) -> Mapping[str, Path]:
        return {id: self.folder / f"{id}.control" for id in self.servers}

    def kill_server(self, id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal that ends it; it is not expected to end well any more."""
        self.killed.add(id)
        self.servers[id].popen.send_signal(number)

    async def close(self) -> None:
        """Ends QEMU, then the servers, which must end well. Raises what went wrong with them."""
        self._leave.set()
        await self._left.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


@dataclass(slots=True, eq=False)
class Moving:
    """The guest, where it is now, and how it gets the next place."""

    lab: Lab
    options: MachineOptions
    models: Sequence[Model]
    places: Sequence[Place]
    nursery: trio.Nursery
    sides: list[Side] = field(default_factory=list)
    here: Side = field(init=False)

    @property
    def guest(self) -> Machine:
        """The machine in which the guest runs."""
        return self.here.machine

    async def start(self) -> None:
        """Boots the guest at the first place."""
        self.here = await self._open(self.places[0], self.options)
        await self.guest.wait_boot()

    async def prepare(self, incoming: str = "defer", *, keep_stopped: bool = True) -> Side:
        """A destination at the other place: its QEMU waits for the guest."""
        other = next(place for place in self.places if place is not self.here.place)
        side = await self._open(other, replace(self.options, incoming=incoming, keep_stopped=keep_stopped))
        with trio.fail_after(120):
            while not side.place.namespace.listens(side.qmp):
                if side.machine.child.popen.poll() is not None:
                    raise MachineError(f"QEMU has ended: {side.machine.qemu_log()}")
                await trio.sleep(0.02)
        return side

    async def moved(self, destination: Side) -> None:
        """The guest runs at `destination`; the source is closed."""
        await destination.machine.take_over(self.guest)
        source, self.here = self.here, destination
        await source.close()

    async def _open(self, place: Place, options: MachineOptions) -> Side:
        side: Side = await self.nursery.start(self._run, place, options)
        self.sides.append(side)
        return side

    async def _run(
        self,
        place: Place,
        options: MachineOptions,
        task_status: trio.TaskStatus[Side] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """A side's life, in a task of its own: sides end in any order."""
        side = None
        try:
            async with self._opened(place, options) as side:
                task_status.started(side)
                await side._leave.wait()
        except Exception as error:
            if side is None:
                raise
            side._failure = error
        finally:
            if side is not None:
                side._left.set()

    @contextlib.asynccontextmanager
    async def _opened(self, place: Place, options: MachineOptions) -> AsyncIterator[Side]:
        async with contextlib.AsyncExitStack() as stack:
            folder = stack.enter_context(run_folder())
            taps = iter(place.taps)
            servers: dict[str, ServerProcess] = {}
            for model in self.models:
                tap = next(taps) if model.tap else ""
                servers[model.id] = await stack.enter_async_context(_server(model, place, folder, tap))
            devices = [_device(model, servers[model.id].path) for model in self.models]
            extra = [*options.extra, *place.extra]
            options = replace(options, devices=devices, netns=place.namespace.name, extra=extra)
            async with open_machine(self.lab, options) as machine:
                side = Side(machine, place, folder, servers)
                yield side
            for id, server in servers.items():
                if id not in side.killed:
                    await server.stop()


def _device(model: Model, path: Path) -> VfioUserDevice:
    return VfioUserDevice(path, id=model.id, addr=model.addr, root_port=model.root_port)


@contextlib.asynccontextmanager
async def _server(model: Model, place: Place, folder: Path, tap: str) -> AsyncIterator[ServerProcess]:
    words = [*model.words, *(["--net", f"tap:{tap}"] if tap else []), "--verbose"]
    words += ["--control", str(folder / f"{model.id}.control")]
    netns, environment = place.namespace.name, model.environment
    async with serving(
        model.name, folder / f"{model.id}.socket", words, netns=netns, environment=environment
    ) as server:
        yield server


@contextlib.asynccontextmanager
async def open_moving(
    lab: Lab, options: MachineOptions, models: Sequence[Model], places: Sequence[Place]
) -> AsyncIterator[Moving]:
    """The booted guest at the first place. At the end all sides are closed; raises what went wrong there.

    `options.devices` is of no account: the devices are `models`.
    """
    async with background() as nursery:
        moving = Moving(lab, options, models, places, nursery)
        await moving.start()
        yield moving
        for side in moving.sides:
            await side.close()


def one_host(namespace: Namespace, *addresses: str, nics: int = 1) -> tuple[Place, Place]:
    """Two places in one namespace: all their TAPs are on a bridge, which has the addresses."""
    add_bridge(namespace, *addresses)
    return _place(namespace, "a", nics), _place(namespace, "b", nics)


def two_hosts(first: Namespace, second: Namespace, *addresses: str, nics: int = 1) -> tuple[Place, Place]:
    """Two places in two namespaces: bridges with a cable (veth) between; the first one has the addresses."""
    for namespace, own in ((first, addresses), (second, ())):
        add_bridge(namespace, *own)
    first.ip(f"link add cable type veth peer name cable netns {second.name}")
    for namespace in (first, second):
        _plug(namespace, "cable")
    return _place(first, "a", nics), _place(second, "b", nics)


def _place(namespace: Namespace, prefix: str, nics: int) -> Place:
    taps = [f"{prefix}{number}" for number in range(nics)]
    for tap in taps:
        namespace.add_tap(tap)
        _plug(namespace, tap)
    return Place(namespace, taps)


def add_bridge(namespace: Namespace, *addresses: str) -> None:
    """A bridge that forwards at once and says nothing by itself."""
    namespace.ip(f"link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
    namespace.sysctl(f"net.ipv6.conf.{BRIDGE}.disable_ipv6", 1)
    namespace.ip(f"link set {BRIDGE} up")
    for address in addresses:
        namespace.ip(f"address add {address} dev {BRIDGE}")


def _plug(namespace: Namespace, interface: str) -> None:
    namespace.sysctl(f"net.ipv6.conf.{interface}.disable_ipv6", 1)
    namespace.ip(f"link set {interface} master {BRIDGE} up")
