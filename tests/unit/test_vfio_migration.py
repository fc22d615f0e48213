# SPDX-License-Identifier: BSD-3-Clause
"""The fixture `vfio_migration` on the models of the package, and what it notices."""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from vfio_user.client.drivers.e1000 import E1000
from vfio_user.client.drivers.e1000_traffic import Traffic
from vfio_user.client.guest import Guest, GuestDevice
from vfio_user.client.migration.report import MigrationError
from vfio_user.device_models.device import Host, OptionError
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import Apply, Fields, Reader, Section
from vfio_user.testing.compare import StateDiffers, compare_state
from vfio_user.testing.migration import MigrationBed, MigrationTester

SOURCE, TARGET = 0x100000, 1 << 32
Tester = Callable[..., MigrationTester]


@pytest.fixture
def tester() -> Tester:
    """Makes one with a seed of its own."""

    def make(seed: int = 1, *, apart: bool = False) -> MigrationTester:
        return MigrationTester(seed=seed, moves=2, apart=apart)

    return make


async def copy(device: GuestDevice, chance: random.Random) -> None:
    """Let `scratch` copy, and look at the copy."""
    data = chance.randbytes(chance.randrange(1, 200_000))
    device.ram.write(SOURCE, data)
    for offset, value, width in (
        (0xFE0, SOURCE, 8),
        (0xFE8, TARGET, 8),
        (0xFF0, len(data), 4),
        (0xFF8, 1, 4),
    ):
        await device.write(0, offset, value, width)
    while not await device.read(0, 0xFFC) & 2:
        await device.intx.wait()
        await device.intx.acknowledge()
    assert device.ram.read(TARGET, len(data)) == data
    await device.write(0, 0xFFC, 2)


def test_scratch_under_load(vfio_migration: MigrationTester) -> None:
    vfio_migration.check("scratch", copy, options={"memory": "64K"})


async def test_e1000_under_load(vfio_migration: MigrationTester) -> None:
    async with vfio_migration.open("e1000") as bed:
        nic = E1000(bed.device, ring=64)
        await bed.guest.run(nic.start)
        bed.guest.start(nic.serve_interrupts)
        traffic = Traffic(nic, seed=bed.chance.getrandbits(32))
        await bed.guest.run(traffic.resolve)

        async def send(_device: GuestDevice, _chance: random.Random) -> None:
            await traffic.bulk(40, window=32, batch=8)

        await bed.roam(send)
        await bed.guest.run(traffic.check_statistics)


@pytest.mark.parametrize(("source", "destination"), [("v1", "v2"), ("v2", "v1")])
async def test_each_side_by_hand(tester: Tester, source: str, destination: str) -> None:
    async with tester().open(Scratch, shared=False) as bed:
        await bed.device.write(0, 0x10, 0x1234)
        report = await bed.move(source=source, destination=destination, page_size=4096, irqs_first=True)
        assert await bed.device.read(0, 0x10) == 0x1234
        assert report.verified_pages == sum(part.size for part in bed.device.ram.ranges) // 4096
        assert bed.reports == [report]
        assert bed.told == [
            f"move 1: {source} to {destination}, DMA by message to DMA by message, "
            f"at most {bed_rounds(bed)} rounds, pages of 4096, interrupts before the start: "
            "migration completed"
        ]


async def test_both_ways_of_dma_in_turn(tester: Tester) -> None:
    async with tester().open(Scratch) as bed:
        ways = [bed.device.ram.shared]
        for _ in range(2):
            await bed.move()
            ways.append(bed.device.ram.shared)
    assert ways in ([True, False, True], [False, True, False])
    assert "mapped memory to DMA by message" in " ".join(bed.told)


def bed_rounds(bed: MigrationBed) -> str:
    return bed.told[0].split("at most ")[1][0]


def test_in_processes_of_their_own(tester: Tester) -> None:
    async def scenario(bed: MigrationBed) -> int:
        await bed.device.write(0, 0x10, 0x1234)
        await bed.move()
        return await bed.device.read(0, 0x10)

    assert tester(apart=True).run(Scratch, scenario) == 0x1234


# What it notices


class Forgetful(Scratch):
    """Restores what it has restored before, not what it is given."""

    def state_sections(self) -> tuple[Section, ...]:
        return (Section("memory", 1, self._save, self._load),)

    def _save(self) -> Fields:
        return {"words": [int(self.registers.read(0x10, 1)[0]), 7]}

    def _load(self, reader: Reader) -> Apply:
        reader.integers("words", 255, 2)
        return lambda: None


def test_state_that_is_not_the_same_afterwards(tester: Tester) -> None:
    async def scenario(bed: MigrationBed) -> None:
        await bed.device.write(0, 0x10, 5, 1)
        with pytest.raises(StateDiffers, match=r"section memory, field words\[0\]: 5, 0"):
            await bed.move(destination="v2")
        assert await bed.device.read(0, 0x10, 1) == 5  # the source runs on

    tester().run(Forgetful, scenario)


def test_what_the_guest_finds_is_raised_with_the_seed(tester: Tester) -> None:
    async def use(device: GuestDevice, _chance: random.Random) -> None:
        count = await device.read(0, 0x10)
        await device.write(0, 0x10, count + 1)
        assert count == seen[0], "the device has forgotten"
        seen[0] += 1

    class Loose(Forgetful):
        pass

    seen = [0]
    with pytest.raises(AssertionError, match="forgotten") as found:
        # A move between the read and the write goes unnoticed: the guest itself brings the count along.
        tester(77).check(Loose, use, compare=False, moves=40)
    assert found.value.__notes__[-1] == "repeat it with --vfio-user-seed=77"
    assert found.value.__notes__[0].startswith("move 1: v")


@pytest.mark.parametrize("shared", [True, False])
def test_a_client_that_does_not_stop_the_guest(
    tester: Tester, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """A mutation of our own client: the guest goes on while its memory and its device's state are read."""

    async def pause(_guest: Guest) -> None: ...

    async def use(device: GuestDevice, _chance: random.Random) -> None:
        seen[0] += 1
        device.ram.write(SOURCE, seen[0].to_bytes(4, "little"))
        await device.write(0, 0x10, seen[0])
        assert await device.read(0, 0x10) == seen[0], "a write is lost"
        assert device.ram.read(SOURCE, 4) == seen[0].to_bytes(4, "little"), "a write to memory is lost"

    seen = [0]
    monkeypatch.setattr(Guest, "pause", pause)
    with pytest.raises((AssertionError, MigrationError)) as found:
        tester().check(Scratch, use, moves=100, shared=shared)
    assert re.search("pages of memory differ|would be saved|is lost", str(found.value)) is not None


@pytest.mark.parametrize("moves", [0, -1])
def test_no_moves_at_all_are_an_error(tester: Tester, moves: int) -> None:
    with pytest.raises(ValueError, match=f"moves={moves}: at least 1"):
        tester().check(Scratch, copy, moves=moves)


async def test_no_moves_at_all_by_hand(tester: Tester) -> None:
    async with tester().open(Scratch) as bed:
        with pytest.raises(ValueError, match="moves=0: at least 1"):
            await bed.roam(copy, moves=0)


def choices(bed: MigrationBed) -> list[str]:
    return [line.replace(": migration completed", "") for line in bed.told]


def test_a_seed_repeats_the_choices(tester: Tester) -> None:
    async def scenario(bed: MigrationBed) -> list[str]:
        for _ in range(4):
            await bed.move()
        return choices(bed)

    first, again, other = (tester(seed).run(Scratch, scenario) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("version", [0, None, "1"])
async def test_a_model_without_state(tester: Tester, version: Any) -> None:
    class Fixed(Scratch):
        state_version = version

    with pytest.raises(OptionError, match=rf"Fixed cannot be moved: its `state_version` is {version}"):
        async with tester().open(Fixed):
            pytest.fail("it cannot be moved")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nothing", {}, "no model 'nothing'"),
        ("scratch", {"memory": "3"}, "memory"),
        ("scratch", {"colour": "red"}, "no option 'colour'"),
    ],
)
def test_wrong_models_and_options(tester: Tester, model: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tester().check(model, copy, options=options)


def test_a_class_that_no_other_process_can_import(tester: Tester) -> None:
    class Local(Scratch):
        pass

    with pytest.raises(OptionError, match="made within a function"):
        tester(apart=True).check(Local, copy)


async def test_check_in_a_coroutine_says_what_to_write(tester: Tester) -> None:
    with pytest.raises(RuntimeError, match="async with vfio_migration"):
        tester().check(Scratch, copy)


async def test_a_move_that_fails_is_an_error(tester: Tester) -> None:
    async with tester().open(Scratch) as bed:
        bed.device.vmm.client.close()
        with pytest.raises(MigrationError, match="at CHECK"):
            await bed.move()
        bed.guest.vcpus.end()


# Comparing


def scratch(word: int) -> Scratch:
    def make(host: Host) -> Scratch:
        return Scratch(host, memory=4096)

    device = make(FakeHost())
    device.regions[0].write(0, word.to_bytes(4, "little"))
    device.regions[2].write(0, bytes([word]))
    return device


def test_equal_states() -> None:
    compare_state(scratch(1), scratch(1))
    compare_state(scratch(1), None)


def test_states_that_differ() -> None:
    other = scratch(1)
    other.regions[0].write(0x10, b"\7")
    other.regions[0].write(0xFF0, b"\7")
    other.regions[2].write(5, b"\7")
    with pytest.raises(StateDiffers) as found:
        compare_state(scratch(1), other)
    background, *rest = str(found.value).splitlines()[1:]
    assert background.startswith("  section bar0, field background.bytes from character 33: '0000")
    assert background.split(", ")[2].startswith("'7000")
    assert rest == ["  section bar0, field LENGTH: 0, 7", "  memory bar2"]
