# SPDX-License-Identifier: BSD-3-Clause
"""When the rounds end: what is left fits into the downtime. And what is told meanwhile adds up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from migration.fault_scene import SMALL
from migration.moving import open_yard
from migration.test_migrate_limits import MEMORY, OPTIONS, PAGES, TARGET, copy, pair
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.memory import PAGE
from vfio_user.client.migration.migrate import Options, migrate
from vfio_user.client.migration.outgoing import ENOUGH
from vfio_user.client.migration.report import Limits, Outcome, Progress, Report, Step
from vfio_user.client.migration.sink import Sink
from vfio_user.client.migration.slow_link import SlowLink
from vfio_user.device_models.scratch import Scratch

FIRST = MEMORY[0][1]
RATE = 48 << 20
"""Bytes a second that the link carries."""
DOWNTIME = 0.01
FITS = int(RATE * DOWNTIME) // PAGE
"""Pages; on a busy machine fewer."""
LITTLE = 10
"""Pages that fit in any case."""


@dataclass
class Writer:
    """While round n goes over the link, the guest or its device writes `pages[n]` pages."""

    vmm: FakeVmm
    pages: Sequence[int]
    by_device: bool = False
    told: list[Progress] = field(default_factory=list)
    _written: int = 0

    def progress(self, now: Progress) -> None:
        self.told.append(now)

    async def write(self) -> None:
        """Once for each round: those that are sent in this one have been taken already."""
        now = self.told[-1]
        if now.step is not Step.PRECOPY or not self._written == now.round < len(self.pages):
            return
        self._written += 1
        length = self.pages[now.round] * PAGE
        if not self.by_device:
            self.vmm.ram.write(TARGET, b"\x5a" * length)
            return
        for begin in range(0, length, FIRST):  # from address 0, where so much is
            await copy(self.vmm, TARGET + begin, min(FIRST, length - begin))


class BusyLink(SlowLink):
    """A slow link, and a guest that goes on writing while something goes over it."""

    def __init__(self, sink: Sink, writer: Writer) -> None:
        super().__init__(sink, RATE)
        self._writer = writer

    async def memory(self, address: int, data: memoryview) -> None:
        await super().memory(address, data)
        await self._writer.write()


async def move(folder: Path, protocol: str, limits: Limits, pages: Sequence[int], by_device: bool) -> Report:
    async with open_yard(folder, OPTIONS) as yard:
        source, destination = await pair(yard)
        writer = Writer(source, pages, by_device)
        options = Options(protocol, protocol, link=partial(BusyLink, writer=writer))
        return await migrate(source, destination, limits=limits, options=options, progress=writer.progress)


@pytest.mark.parametrize("protocol", ["v1", "v2"])
@pytest.mark.parametrize("by_device", [False, True], ids=["guest", "device"])
async def test_the_stop_comes_when_what_is_left_fits(tmp_path: Path, protocol: str, by_device: bool) -> None:
    pages = [4 * FITS, 3 * FITS, 2 * FITS, FITS + 10, LITTLE]
    report = (await move(tmp_path, protocol, Limits(downtime=DOWNTIME), pages, by_device)).check()
    assert [one.pages for one in report.rounds] == [PAGES, *pages]
    assert [one.stopped for one in report.rounds] == [False] * len(pages) + [True]
    assert all(one.bytes <= RATE * one.ms / 1000 for one in report.rounds)


@pytest.mark.parametrize("protocol", ["v1", "v2"])
@pytest.mark.parametrize(("last", "fits"), [(LITTLE, True), (FITS + 10, False)])
async def test_after_the_last_round_it_fits_or_the_guest_is_too_busy(
    tmp_path: Path, protocol: str, last: int, fits: bool
) -> None:
    limits = Limits(downtime=DOWNTIME, rounds=3, force=False)
    report = await move(tmp_path, protocol, limits, [3 * FITS, 2 * FITS, last], False)
    assert report.outcome is (Outcome.COMPLETED if fits else Outcome.FAILED)
    if report.failure is not None:
        assert f"after 3 rounds, {last * PAGE} bytes" in report.failure.reason
        assert report.source_runs


class Sluggish(SlowLink):
    """Each message takes its time; memory comes in large ones at first."""

    async def memory(self, address: int, data: memoryview) -> None:
        await super().memory(address, data)
        if len(data) < ENOUGH:
            await trio.sleep(0.02)


@pytest.mark.parametrize("protocol", ["v1", "v2"])
async def test_a_round_of_little_says_nothing_about_the_rate(tmp_path: Path, protocol: str) -> None:
    """Each reads the state once, so several are needed; the first one shows how fast the link is."""
    for name in ("quiet", "busy", "late"):
        (tmp_path / name).mkdir()
    quiet = await pages_of_rounds(tmp_path / "quiet", protocol, lambda _: 0)
    assert quiet == [PAGES] + [0] * (len(quiet) - 1)
    assert len(quiet) > 2
    busy = await pages_of_rounds(tmp_path / "busy", protocol, lambda _: 2)
    assert busy == [PAGES] + [2] * (len(quiet) - 1)
    running = len(quiet) - 1
    late = await pages_of_rounds(tmp_path / "late", protocol, lambda number: 2 * (number == running - 1))
    assert late == [*quiet[:-1], 2]


async def pages_of_rounds(folder: Path, protocol: str, dirty: Callable[[int], int]) -> list[int]:
    """While a round goes over, the guest writes so many pages."""
    async with open_yard(folder, replace(OPTIONS, version=SMALL)) as yard:
        make = partial(Scratch, memory=16 << 10)
        source, destination = await yard.start(yard.serve(make)), await yard.incoming(yard.serve(make))
        await source.vmm.client.region_write(2, 0, b"\x5a" * 4096)
        seen: set[int] = set()

        def progress(now: Progress) -> None:
            begun = now.round or now.left  # before the first round it is told that there will be one
            if now.step is Step.PRECOPY and begun and now.round not in seen:
                seen.add(now.round)
                source.vmm.ram.write(TARGET, bytes(dirty(now.round) * PAGE))

        options = Options(protocol, protocol, link=partial(Sluggish, rate=1 << 30))
        limits = Limits(downtime=DOWNTIME, round=0)
        report = await migrate(source.vmm, destination.vmm, limits=limits, options=options, progress=progress)
        return [one.pages for one in report.check().rounds]


@pytest.mark.parametrize("protocol", ["v1", "v2"])
async def test_what_is_told_adds_up(tmp_path: Path, protocol: str) -> None:
    async with open_yard(tmp_path, OPTIONS) as yard:
        source, destination = await pair(yard)
        writer = Writer(source, [400, 300])
        options = Options(protocol, protocol, link=partial(BusyLink, writer=writer))
        limits = Limits(rounds=2, downtime=0)
        report = await migrate(source, destination, limits=limits, options=options, progress=writer.progress)
    told = writer.told
    assert list(dict.fromkeys(now.step for now in told)) == list(Step)
    for before, after in pairwise(told):
        assert before.seconds <= after.seconds
        assert before.round <= after.round
    assert told[-1].seconds <= report.ms / 1000
    assert [one.pages for one in report.check().rounds] == [PAGES, 400, 300]
    for one in report.rounds:
        of_it = [now for now in told if now.round == one.number and now.sent + now.left]
        assert {now.step for now in of_it} == {Step.MEMORY if one.stopped else Step.PRECOPY}
        assert {now.sent + now.left for now in of_it} == {one.bytes}
        assert (of_it[0].sent, of_it[-1].left) == (0, 0)
        assert all(before.sent < after.sent <= before.sent + (1 << 20) for before, after in pairwise(of_it))
        begin, end = one.at / 1000, (one.at + one.ms) / 1000
        assert all(begin <= now.seconds <= end for now in of_it)
    assert all(now.sent == now.left == 0 for now in told if now.step not in (Step.PRECOPY, Step.MEMORY))
