# SPDX-License-Identifier: BSD-3-Clause
"""`scratch` moved back and forth under load, over every pair of protocols."""

import random
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import trio
import xxhash

from migration.memory_guest import Scribbler
from migration.moving import MEMORY, MOVES, PATIENCE, SOAK, WAYS, Server, open_yard, seeded, wait_until
from migration.scratch_guest import Copier
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions
from vfio_user.client.guest import open_guest
from vfio_user.client.migration.migrate import Options, migrate
from vfio_user.client.migration.report import Limits
from vfio_user.device_models.scratch import Scratch

SMALL = ((0, 0xA0000),)
LARGE, FILLED = (256 << 20, 64 << 20) if SOAK else (16 << 20, 2 << 20)
"""The memory of `scratch`, and how much of it is not zero at first."""


@pytest.mark.timeout(0)
@pytest.mark.parametrize("shared", [True, False], ids=["mapped", "by message"])
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_it_is_moved_under_load(tmp_path: Path, source: str, destination: str, shared: bool) -> None:
    with seeded(f"scratch {source} {destination} {shared}") as chance:
        vmm_options = VmmOptions(memory=MEMORY, shared=shared, resample=chance.random() < 0.5)
        async with open_yard(tmp_path, vmm_options) as yard:
            servers = [yard.serve(Scratch) for _ in range(2)]
            here = await yard.start(servers[0])
            async with open_guest([here.vmm]) as guest:
                copier = Copier(guest.devices[0], chance)
                guest.start(copier.run)
                for number in range(MOVES):
                    there = await yard.incoming(servers[(number + 1) % 2])
                    await trio.sleep(chance.random() * 0.02)
                    options = Options(source, destination, irqs_first=chance.random() < 0.5)
                    limits = Limits(rounds=chance.randrange(4))
                    report = await migrate(here.vmm, there.vmm, guest=guest, limits=limits, options=options)
                    assert report.check().notes == ()
                    assert report.verified_pages == sum(size for _, size in MEMORY) // 4096
                    await here.close()
                    here, before = there, copier.copies
                    await wait_until(lambda before=before: copier.copies > before)  # type: ignore[misc]
            await here.close()


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_a_large_memory_is_moved_while_it_is_written(
    tmp_path: Path, source: str, destination: str
) -> None:
    """It is streamed while the guest writes to it, and what has changed since comes at the end."""
    with seeded(f"large memory {source} {destination}") as chance:
        async with open_yard(tmp_path, VmmOptions(memory=SMALL)) as yard:
            servers = [yard.serve(partial(Scratch, memory=LARGE)) for _ in range(2)]
            here = await yard.start(servers[0])
            await fill(here.vmm, chance)
            async with open_guest([here.vmm]) as guest:
                scribbler = Scribbler(guest.devices[0], LARGE, chance)
                guest.start(scribbler.run)
                for number in range(MOVES):
                    there = await yard.incoming(servers[(number + 1) % 2])
                    await trio.sleep(chance.random() * 0.02)
                    before = scribbler.written
                    # On a busy machine the first round takes more than the usual second.
                    limits = Limits(rounds=1 + chance.randrange(3), round=60)
                    options = Options(
                        source,
                        destination,
                        mapped=chance.random() < 0.5,
                        switch=partial(compare, servers) if destination == "v2" else nothing,
                    )
                    report = await migrate(here.vmm, there.vmm, guest=guest, limits=limits, options=options)
                    assert report.check().notes == ()
                    # All of it before the stop; then at most a page for each word written meanwhile.
                    assert report.state[0] > FILLED
                    assert report.rounds[0].state > FILLED
                    assert report.rounds[-1].state < 65536 + (scribbler.written - before) * 4200
                    await here.close()
                    here, before = there, scribbler.written
                    await wait_until(lambda before=before: scribbler.written > before)  # type: ignore[misc]
                scribbler.going = False
                await wait_until(lambda: scribbler.ended)
            await here.close()


LARGEST = 1 << 30 if SOAK else 64 << 20
HELD = 16 << 20
"""Bytes that servers and client together may hold besides the memories themselves (which are mapped)."""
_ROUNDS = 2 if SOAK else 1


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_the_largest_memory_is_moved_a_piece_at_a_time(
    tmp_path: Path, source: str, destination: str
) -> None:
    """There and back, a part of it random, another written with zeros. On its way, little of it is anywhere
    but in the two memories."""
    with seeded(f"largest memory {source} {destination}") as chance:
        async with open_yard(tmp_path, VmmOptions(memory=SMALL)) as yard:
            servers = [yard.serve(partial(Scratch, memory=LARGEST)) for _ in range(2)]
            here = await yard.start(servers[0])
            filled = await fill(here.vmm, chance, LARGEST, LARGEST // 4)
            await write_all(here.vmm, filled, LARGEST // 16, bytes)
            expected = hash_of(servers[0])
            for number in range(2 * _ROUNDS):
                there = await yard.incoming(servers[(number + 1) % 2])
                options = Options(source, destination, mapped=chance.random() < 0.5)
                tracemalloc.start()
                try:
                    report = await migrate(here.vmm, there.vmm, options=options, limits=Limits(rounds=2))
                    held = tracemalloc.get_traced_memory()[1]
                finally:
                    tracemalloc.stop()
                assert report.check().notes == ()
                assert report.state[0] > LARGEST // 4
                assert report.state[0] < LARGEST // 4 + LARGEST // 16 + 65536
                assert held < HELD
                await here.close()
                here = there
                assert hash_of(servers[(number + 1) % 2]) == expected
            await here.close()


def hash_of(server: Server) -> bytes:
    return xxhash.xxh3_128(server.device.memories()["bar2"].view).digest()


async def fill(vmm: FakeVmm, chance: random.Random, size: int = LARGE, filled: int = FILLED) -> int:
    """Parts of it, so that zeros and others are neighbours. Where the last part ends."""
    for part in range(0, size, size // 8):
        await write_all(vmm, part, filled // 8, chance.randbytes)
    return part + filled // 8


async def write_all(vmm: FakeVmm, begin: int, length: int, make: Callable[[int], bytes]) -> None:
    """`length` bytes, in messages of at most 1 MiB."""
    for place in range(begin, begin + length, 1 << 20):
        await vmm.client.region_write(2, place, make(min(1 << 20, begin + length - place)))


async def compare(servers: Sequence[Server]) -> None:
    """Both stand still, and the destination has loaded: with v1 it does so when it starts."""
    here, there = (server.device.memories()["bar2"].view for server in servers)
    assert here == there


async def nothing() -> None: ...


@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_a_copy_that_is_cut_goes_on_there(tmp_path: Path, source: str, destination: str) -> None:
    size, target = 16 << 20, 16 << 20
    options = VmmOptions(memory=((0, 32 << 20),), shared=False)  # by message it takes its time
    async with open_yard(tmp_path, options) as yard:
        servers = [yard.serve(Scratch) for _ in range(2)]
        here, there = await yard.start(servers[0]), await yard.incoming(servers[1])
        vmm, device = here.vmm, servers[0].device
        assert isinstance(device, Scratch)
        vmm.ram.write(0, b"\x5a" * size)
        for offset, value, width in ((0xFE8, target, 8), (0xFF0, size, 4), (0xFF8, 1, 4)):
            await vmm.write(0, offset, value, width)
        while not device.copied.value:
            await trio.lowlevel.checkpoint()
        ways = Options(source, destination)
        (await migrate(here.vmm, there.vmm, options=ways, limits=Limits(rounds=0))).check()
        copied = device.copied.value
        assert 0 < copied < size
        # One piece more may have been written than the device has been told of.
        assert vmm.ram.read(target, copied) == b"\x5a" * copied
        assert vmm.ram.read(target + copied + 65536, 4096) == bytes(4096)
        with trio.fail_after(PATIENCE):
            await there.vmm.intx.wait()
        assert there.vmm.ram.read(target, size) == b"\x5a" * size
        assert device.copied.value == copied
