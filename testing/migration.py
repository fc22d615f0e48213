# SPDX-License-Identifier: BSD-3-Clause
"""Tests that move a device: what the fixture `vfio_migration` gives.

    def test_it_works_wherever_it_is(vfio_migration):
        vfio_migration.check(MyDevice, use)                  # random moves, under load

    async def test_by_hand(vfio_migration):                  # runs under trio
        async with vfio_migration.open(MyDevice) as bed:
            await bed.device.write(0, 0x08, 0x1000)
            await bed.move(source="v1", destination="v2")
            assert await bed.device.read(0, 0x08) == 0x1000

Each move goes to a new device in a new server, which has never seen the old one.
"""

import contextlib
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

import trio

from vfio_user.client.background import background
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.guest import open_guest
from vfio_user.client.memory import GuestRam
from vfio_user.client.switch import open_switch
from vfio_user.device_models.device import OptionError
from vfio_user.device_models.echo import Responder
from vfio_user.testing.bed import MigrationBed, Use, Yard, check_use
from vfio_user.testing.servers import AnyModel, Model, find_model, serving_apart, serving_here

__all__ = ["MEMORY", "MigrationBed", "MigrationTester", "Settings", "Use"]

T = TypeVar("T")

MEMORY = ((0, 0xA0000), (0x100000, 4 << 20), (1 << 32, 4 << 20))
"""The guest's, unless a test says otherwise: small, for it is compared with each move."""


class Settings(TypedDict, total=False):
    """What a test may choose. What it leaves out is as said here."""

    options: Mapping[str, str]
    """Of the model, as texts, as with `--set`; else their defaults."""
    memory: Sequence[tuple[int, int]]
    """The guest's: address and size in bytes of each range; else `MEMORY`."""
    shared: bool
    """The servers may map it (True), or all DMA goes by message (False); else they do so in turn."""
    compare: bool
    """Compare what both devices would save (`MigrationBed.move`); else True."""


class MigrationTester:
    """The fixture's value. Random choices follow from the seed alone, not from a test's name or place; each
    test draws a seed of its own, unless one is given."""

    def __init__(self, *, seed: int | None, moves: int, apart: bool) -> None:
        self.seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        """Of all random choices; a failure tells it."""
        self.moves = moves
        self._serving = serving_apart if apart else serving_here

    def check(
        self, model: AnyModel, use: Use, *, moves: int | None = None, **settings: Unpack[Settings]
    ) -> None:
        """Move the device `moves` times, at random moments and over random protocols, while the guest uses
        it: `MigrationBed.roam`, for a test that is no coroutine."""
        __tracebackhide__ = True
        check_use(use, moves)

        async def scenario(bed: MigrationBed) -> None:
            __tracebackhide__ = True
            await bed.roam(use, moves=moves)

        self.run(model, scenario, **settings)

    def run(
        self, model: AnyModel, scenario: Callable[[MigrationBed], Awaitable[T]], **settings: Unpack[Settings]
    ) -> T:
        """`open`, and run a coroutine with it, for a test that is no coroutine; gives what that returns."""
        __tracebackhide__ = True
        if _in_trio():
            raise RuntimeError(
                "this test is a coroutine: write `async with vfio_migration.open(...) as bed:`"
            )
        place = self.open(model, **settings)

        async def main() -> T:
            __tracebackhide__ = True
            async with place as bed:
                return await scenario(bed)

        return trio.run(main)

    def open(
        self, model: AnyModel, **settings: Unpack[Settings]
    ) -> contextlib.AbstractAsyncContextManager[MigrationBed]:
        """A guest with a device, at a first server. OptionError when there is no such model, when it cannot
        be moved (`state_version`), or when an option or another setting is wrong.

        `model` is a class, a name of `vfio-user list`, or module:Class. A network device is on a network
        that echoes (10.0.2.2, UDP port 7) and goes with the guest.
        """
        __tracebackhide__ = True
        return self._open(check_settings(model, settings), settings)

    @contextlib.asynccontextmanager
    async def _open(self, found: Model, settings: Settings) -> AsyncIterator[MigrationBed]:
        __tracebackhide__ = True
        if not _in_trio():
            raise RuntimeError("this runs under trio, and the test under another event loop: take `run`")
        chance = random.Random(self.seed)
        options = VmmOptions(memory=settings.get("memory", MEMORY), resample=chance.random() < 0.5)
        bed = MigrationBed(
            found,
            options,
            chance,
            self.moves,
            shared=settings.get("shared"),
            compare=settings.get("compare", True),
        )
        with self._told(bed):
            async with self._placed(bed):
                yield bed

    @contextlib.asynccontextmanager
    async def _placed(self, bed: MigrationBed) -> AsyncIterator[None]:
        # In /tmp whatever TMPDIR says: a UNIX socket's path has at most 107 bytes.
        with tempfile.TemporaryDirectory(prefix="vfio-user-", dir="/tmp") as folder:
            async with open_switch(Responder().answer) as switch, background() as nursery:
                vmm = await bed.settle(Yard(Path(folder), switch, self._serving, nursery))
                async with open_guest([vmm]) as guest:
                    bed.start(guest)
                    yield
                await bed.close()

    @contextlib.contextmanager
    def _told(self, bed: MigrationBed) -> Iterator[None]:
        """A failure says what had happened, and how to repeat it."""
        try:
            yield
        except BaseException as error:
            for move in bed.told:
                error.add_note(move)
            error.add_note(f"repeat it with --vfio-user-seed={self.seed}")
            raise


def run_test(test: Callable[..., Awaitable[None]], arguments: Mapping[str, object]) -> None:
    """A test that is a coroutine, under trio."""
    __tracebackhide__ = True
    trio.run(partial(test, **arguments))


def check_settings(model: AnyModel, settings: Settings) -> Model:
    """OptionError, which shows nothing of ours above the test that has made the mistake."""
    __tracebackhide__ = True
    wrong, found = "", None
    try:
        unknown = [name for name in settings if name not in Settings.__annotations__]
        if unknown:
            known = ", ".join(Settings.__annotations__)
            raise OptionError(f"there is no setting {unknown[0]!r}; there are {known}")
        found = find_model(model, settings.get("options", {}))
        check_memory(settings.get("memory", MEMORY))
    except OptionError as error:
        wrong = str(error)
    if wrong or found is None:
        raise OptionError(wrong)
    return found


def check_memory(memory: Sequence[tuple[int, int]]) -> None:
    """OptionError unless it can be a guest's."""
    try:
        with contextlib.closing(GuestRam()) as ram:
            ram.add_file(memory)
    except (ValueError, TypeError, OSError, OverflowError) as error:
        raise OptionError(
            f"memory={memory!r}: {error}; write memory=[(address, size in bytes), ...], of whole pages"
        ) from None


def _in_trio() -> bool:
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True
