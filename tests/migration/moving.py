# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of migration stand on: servers in this process, VMMs on them, seeds that can be repeated."""

import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from vfio_user.client.attachment import Attachment, attach
from vfio_user.client.background import background
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.memory import GuestRam
from vfio_user.device_models.device import Device
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


@dataclass(frozen=True, slots=True)
class Server:
    """A device served in this process."""

    path: Path
    native: NativeServer

    @property
    def device(self) -> Device:
        assert self.native.device is not None
        return self.native.device


@contextlib.asynccontextmanager
async def serving(make: Callable[[ServerHost], Device], path: Path) -> AsyncIterator[Server]:
    """A server of what `make` makes."""
    with NativeServer(Settings(spin_us=0)) as native:
        native.install(make)
        listener = Listener.bind(path)
        try:
            native.listen(listener)
            async with background() as nursery:
                nursery.start_soon(native.run)
                yield Server(path, native)
        finally:
            listener.close()


@contextlib.asynccontextmanager
async def all_serving(
    makers: Sequence[Callable[[ServerHost], Device]], folder: Path
) -> AsyncIterator[list[Server]]:
    """A server of each."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(serving(make, folder / f"server{number}"))
            for number, make in enumerate(makers)
        ]


class Yard:
    """Attaches VMMs; `options` are for all of them."""

    def __init__(self, nursery: trio.Nursery, options: VmmOptions) -> None:
        self._nursery = nursery
        self.options = options

    async def start(self, server: Server, ram: GuestRam | None = None) -> Attachment:
        return await attach(self._nursery, server.path, self.options, ram=ram)

    async def incoming(self, server: Server, ram: GuestRam | None = None) -> Attachment:
        return await attach(self._nursery, server.path, self.options, ram=ram, incoming=True)


@contextlib.asynccontextmanager
async def open_yard(options: VmmOptions | None = None) -> AsyncIterator[Yard]:
    async with background() as nursery:
        yield Yard(nursery, options or VmmOptions(memory=MEMORY))
