# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of migration stand on: servers in this process, VMMs on them, seeds that can be repeated."""

import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from vfio_user.client.attachment import Attachment, attach
from vfio_user.client.background import background
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.memory import GuestRam
from vfio_user.client.migration.v2 import V2Driver
from vfio_user.device_models.device import Device
from vfio_user.device_models.regions import Buffer
from vfio_user.protocol.constants import MigrationState
from vfio_user.server.engines.native import NativeServer, Settings
from vfio_user.server.host import ServerHost
from vfio_user.transport.listener import Listener

SOAK = bool(os.environ.get("VFIO_USER_SOAK"))
MOVES = 200 if SOAK else 10
"""Migrations in a row."""

PATIENCE = 10.0
WAYS = [("v1", "v1"), ("v2", "v2"), ("v1", "v2"), ("v2", "v1")]
MEMORY = ((0, 0xA0000), (0x100000, 1 << 20), (1 << 32, 1 << 20))


@contextlib.contextmanager
def seeded(name: str) -> Iterator[random.Random]:
    """Random numbers of `VFIO_USER_SEED`, or of a new seed; a failure says which seed repeats it."""
    seed = int(os.environ.get("VFIO_USER_SEED") or random.SystemRandom().getrandbits(32))
    try:
        yield random.Random(f"{name} {seed}")
    except BaseException as error:
        error.add_note(f"again with VFIO_USER_SEED={seed}")
        print(f"VFIO_USER_SEED={seed} repeats this")
        raise


Make = Callable[[ServerHost], Device]
Prepare = Callable[[NativeServer, contextlib.ExitStack], Make]
"""What is put on the stack goes with the server."""


STANDING = (MigrationState.STOP, MigrationState.STOP_COPY, MigrationState.RESUMING)


def watched(make: Make, late: list[MigrationState]) -> Make:
    """Makes the device; a write to its first BAR while it stands still goes into `late`. Nobody may do that
    then: it may come after the state was read (linux/vfio.h, "or risk corruption")."""

    def make_watched(host: ServerHost) -> Device:
        device = make(host)
        write = device.regions[0].write

        def note(offset: int, data: Buffer) -> None:
            if host.migration.state in STANDING:
                late.append(host.migration.state)
            write(offset, data)

        device.regions[0].write = note  # type: ignore[method-assign]
        return device

    return make_watched


def leave_out_p2p(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make of our client one that does not enter the P2P states."""
    enter = V2Driver.enter

    async def enter_others(driver: V2Driver, state: MigrationState) -> None:
        if state not in (MigrationState.RUNNING_P2P, MigrationState.PRE_COPY_P2P):
            await enter(driver, state)

    monkeypatch.setattr(V2Driver, "enter", enter_others)


class Server:
    """A device served in this process, until it is closed or its yard is."""

    def __init__(self, path: Path, native: NativeServer, stack: contextlib.ExitStack) -> None:
        self.path = path
        self.native = native
        self._stack = stack
        self._scope = trio.CancelScope()
        self._leave = trio.Event()
        self._gone = trio.Event()

    @property
    def device(self) -> Device:
        assert self.native.device is not None
        return self.native.device

    def counted(self, name: str) -> int:
        return self.native.counters()[name]

    def kill(self) -> None:
        """End it, as soon as it is its turn."""
        self._leave.set()

    def hang(self) -> None:
        """From now on it does nothing, and stays."""
        self._scope.cancel()

    async def close(self) -> None:
        """End it, and wait until everything is released."""
        self.kill()
        await self._gone.wait()

    async def hold(self, listener: Listener) -> None:
        try:
            self.native.listen(listener)
            async with background() as nursery:
                nursery.start_soon(self._run)
                await self._leave.wait()
        finally:
            self._stack.close()
            listener.close()
            self._gone.set()

    async def _run(self) -> None:
        with self._scope:
            await self.native.run()


class Yard:
    """Servers and VMMs that come and go; `options` are for all VMMs."""

    def __init__(self, folder: Path, options: VmmOptions, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.options = options
        self._nursery = nursery
        self._served = 0

    def serve(self, make: Make) -> Server:
        """Serve what `make` makes, with nothing behind it."""
        return self.serve_on(lambda _native, _stack: make)

    def serve_on(self, prepare: Prepare) -> Server:
        """The same; `prepare` is given the server first, to open what its device needs."""
        path = self.folder / f"server{self._served}"
        self._served += 1
        with contextlib.ExitStack() as stack:
            native = stack.enter_context(NativeServer(Settings(spin_us=0)))
            native.install(prepare(native, stack))
            server = Server(path, native, stack.pop_all())
            self._nursery.start_soon(server.hold, Listener.bind(path))
        return server

    async def start(
        self, server: Server, ram: GuestRam | None = None, options: VmmOptions | None = None
    ) -> Attachment:
        return await self._attach(server, ram, options, incoming=False)

    async def incoming(
        self, server: Server, ram: GuestRam | None = None, options: VmmOptions | None = None
    ) -> Attachment:
        return await self._attach(server, ram, options, incoming=True)

    async def _attach(
        self, server: Server, ram: GuestRam | None, options: VmmOptions | None, *, incoming: bool
    ) -> Attachment:
        """Nothing fails here on purpose: a busy machine gets more time than what is tested."""
        wanted = options or self.options
        patient = replace(wanted, timeout=max(wanted.timeout, PATIENCE))
        attachment = await attach(self._nursery, server.path, patient, ram=ram, incoming=incoming)
        attachment.vmm.client.link.timeout = wanted.timeout
        return attachment


@contextlib.asynccontextmanager
async def open_yard(folder: Path, options: VmmOptions | None = None) -> AsyncIterator[Yard]:
    async with background() as nursery:
        yield Yard(folder, options or VmmOptions(memory=MEMORY), nursery)


async def wait_until(done: Callable[[], bool]) -> None:
    """Look again and again; fails after PATIENCE."""
    with trio.fail_after(PATIENCE):
        while not done():  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.0005)
