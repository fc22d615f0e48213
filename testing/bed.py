# SPDX-License-Identifier: BSD-3-Clause
"""A guest with one device, and servers to which it is moved, one after the other."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from vfio_user.client.attachment import Attachment, attach
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions
from vfio_user.client.guest import Guest, GuestDevice
from vfio_user.client.migration.migrate import Options, migrate
from vfio_user.client.migration.report import Limits, Report
from vfio_user.client.switch import Port, Switch
from vfio_user.testing.compare import compare_state
from vfio_user.testing.holder import Held, hold
from vfio_user.testing.servers import Model, Served, Serving

PROTOCOLS = ("v1", "v2")
PAGE_SIZES = (4096, 8192, 65536)
PATIENCE = 20.0
_LOOK_AGAIN = 0.0005

Use = Callable[[GuestDevice, random.Random], Awaitable[None]]
"""A piece of what a guest does with the device, with a look at what has come of it; it takes its random
choices from the generator that it is given. It is called again and again, and does not notice the moves."""


class UseError(Exception):
    """The guest gets nowhere with the device."""


def check_use(use: Use, moves: int | None) -> None:
    """TypeError, ValueError: a test that asks for this would fail in the dark, or pass without a look."""
    __tracebackhide__ = True
    if not callable(use):
        raise TypeError(f"{use!r} is no use of a device: write `async def use(device, chance)`")
    if moves is not None and moves < 1:
        raise ValueError(f"moves={moves}: at least 1, or the device is never moved; None is the default")


@dataclass(frozen=True, slots=True)
class Yard:
    """Where servers are: a folder, the network, how they are made, and a nursery for them."""

    folder: Path
    switch: Switch
    serving: Serving
    nursery: trio.Nursery


@dataclass(frozen=True, slots=True)
class Stay:
    """A server with the guest's VMM on it; `port` is that of a network device."""

    server: Held[Served]
    attachment: Attachment
    port: Port | None

    @property
    def vmm(self) -> FakeVmm:
        return self.attachment.vmm

    async def close(self) -> None:
        await self.attachment.close()
        await self.server.leave()


class MigrationBed:
    """What `MigrationTester.open` gives. `chance` is the generator of all random choices of the test."""

    guest: Guest
    device: GuestDevice
    """As the guest knows it, wherever it is: `read` and `write` BARs, `config`, `ram`, `intx`, `msi`."""

    def __init__(
        self,
        model: Model,
        options: VmmOptions,
        chance: random.Random,
        moves: int,
        *,
        shared: bool | None,
        compare: bool,
    ) -> None:
        self.chance = chance
        self.reports: list[Report] = []
        """Of every move."""
        self.told: list[str] = []
        """The same in words, with one that is under way."""
        self._model = model
        self._options = options
        self._shared = shared
        self._mapped = chance.random() < 0.5
        self._compare = compare
        self._loaded = False
        self._moves = moves
        self._opened = 0
        self._uses = 0
        self._failure: Exception | None = None

    # For `MigrationTester`

    async def settle(self, yard: Yard) -> FakeVmm:
        """Begin at a first server."""
        self._yard = yard
        self._here = await self._open(incoming=False)
        return self._here.vmm

    def start(self, guest: Guest) -> None:
        """The guest that is on what `settle` gave."""
        self.guest, self.device = guest, guest.devices[0]

    async def close(self) -> None:
        """Leave the last server; what goes wrong there is raised."""
        await self._here.close()

    async def _open(self, *, incoming: bool) -> Stay:
        yard, number = self._yard, self._opened
        self._opened += 1
        wire, port = None, None
        if self._model.has_port:
            wire = yard.folder / f"wire{number}"
            port = await yard.switch.open_port(wire)
        context = yard.serving(self._model, yard.folder / f"server{number}", wire)
        server = await hold(yard.nursery, context)
        options = replace(self._options, shared=self._next_is_mapped())
        attachment = await attach(yard.nursery, server.value.target, options, incoming=incoming)
        if port is not None:
            await port.wait_connected()
        return Stay(server, attachment, port)

    def _next_is_mapped(self) -> bool:
        """Both ways of DMA in turn, unless a test wants one of them."""
        self._mapped = not self._mapped
        return self._mapped if self._shared is None else self._shared

    # For tests

    async def move(
        self,
        *,
        source: str | None = None,
        destination: str | None = None,
        limits: Limits | None = None,
        page_size: int | None = None,
        irqs_first: bool | None = None,
    ) -> Report:
        """Move the guest to a new device. `source` and `destination` are "v1" or "v2", the protocol of each
        side; `page_size` and `irqs_first` are those of `migrate.Options`. What is not given is a random
        choice.

        MigrationError with the reason when it fails, or when the two memories differ afterwards. StateDiffers
        when the new device, before it runs, would save something else than the old one did (looked at where
        both are in this process, and the destination speaks v2).
        """
        __tracebackhide__ = True
        chance = self.chance
        options = Options(
            source=source or chance.choice(PROTOCOLS),
            destination=destination or chance.choice(PROTOCOLS),
            page_size=page_size or chance.choice(PAGE_SIZES),
            irqs_first=chance.random() < 0.5 if irqs_first is None else irqs_first,
            switch=self._rewire,
        )
        limits = limits or Limits(rounds=chance.randrange(4), timeout=PATIENCE)
        self._loaded = options.destination == "v2"  # with v1, loading and starting are one step
        self._there = await self._open(incoming=True)
        self._tell(options, limits)
        report = await migrate(
            self._here.vmm, self._there.vmm, guest=self.guest, limits=limits, options=options
        )
        self.told[-1] += f": {report}"
        self.reports.append(report.check())
        await self._here.close()
        self._here = self._there
        return report

    def _tell(self, options: Options, limits: Limits) -> None:
        dma = " to ".join(
            "mapped memory" if stay.vmm.ram.shared else "DMA by message" for stay in (self._here, self._there)
        )
        self.told.append(
            f"move {len(self.told) + 1}: {options.source} to {options.destination}, {dma}, "
            f"at most {limits.rounds} rounds, pages of {options.page_size}, "
            f"interrupts {'before' if options.irqs_first else 'after'} the start"
        )

    async def _rewire(self) -> None:
        """Both devices stand still: frames that are on their way to the old one go to the new one."""
        __tracebackhide__ = True
        here, there = self._here, self._there
        if self._compare and self._loaded:
            compare_state(here.server.value.device, there.server.value.device)
        if here.port is None or there.port is None:
            return
        counted = await here.server.value.counters()
        sent, taken = counted["net_sent_frames"], counted["net_received_frames"]
        await self._yard.switch.move(here.port, there.port, sent=sent, taken=taken)

    async def roam(self, use: Use, *, moves: int | None = None, within: float = 0.02) -> None:
        """Let the guest use the device all the time, and move it at random moments, each at most `within`
        seconds after it was used at its new place for the first time. What `use` raises is raised here;
        ValueError when there is nothing to do, for that would show nothing."""
        __tracebackhide__ = True
        check_use(use, moves)
        ending, ended = trio.Event(), trio.Event()
        chance = random.Random(self.chance.random())
        with trio.CancelScope() as scope:
            self.guest.start(self._use, use, chance, ending, ended, scope)
            await self._used_again()  # a move before the first use would show nothing
            for _ in range(self._moves if moves is None else moves):
                await trio.sleep(self.chance.random() * within)
                await self.move()
                await self._used_again()
            ending.set()
            await self._until(ended.is_set)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    async def _use(
        self, use: Use, chance: random.Random, ending: trio.Event, ended: trio.Event, scope: trio.CancelScope
    ) -> None:
        """Guest code."""
        __tracebackhide__ = True
        try:
            while not ending.is_set():
                await use(self.device, chance)
                self._uses += 1
                await trio.lowlevel.checkpoint()
        except Exception as error:
            self._failure = error
            scope.cancel()
        ended.set()

    async def _used_again(self) -> None:
        __tracebackhide__ = True
        before = self._uses
        await self._until(lambda: self._uses > before)

    async def _until(self, done: Callable[[], bool]) -> None:
        __tracebackhide__ = True
        with trio.move_on_after(PATIENCE):
            while not done():  # noqa: ASYNC110  # guest code tells nobody
                await trio.sleep(_LOOK_AGAIN)
        if not done():
            raise UseError(f"the guest waits {PATIENCE:g} s for the device, after {self._uses} uses")
