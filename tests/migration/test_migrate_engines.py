# SPDX-License-Identifier: BSD-3-Clause
"""An e1000 under load, moved between processes of each engine: both ways, by the editions that both have.

Every frame is counted and looked at, and the memories are compared page by page: see `client/tour.py`. Where
the library is at one side, the dirty log is the library's there and ours at the other.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from conformance.limits import edition_of_library, require_library
from migration.moving import SOAK
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.tour import WAYS, TourOptions, open_tour

MEMORY = ((0, 0x10000), (0x100000, 4 << 20))
MOVES = 40 if SOAK else 2

NATIVE = ("native", "native")
ENGINES = [("native", "libvfio-user"), ("libvfio-user", "native"), ("libvfio-user", "libvfio-user")]
pytestmark = pytest.mark.timeout(900 if SOAK else 180)


def tour_options(engines: tuple[str, str]) -> TourOptions:
    """The library has no resample eventfd, and one of v2 takes no SET_IRQS before the device runs."""
    ours = engines == NATIVE
    return TourOptions(
        dwell=0.1,
        ring=64,
        rate=1e9,
        vmm=VmmOptions(MEMORY, resample=ours),
        engines=engines,
        irqs_first=ours or edition_of_library() == "v1",
    )


async def there_and_back(folder: Path, engines: tuple[str, str], ways: Sequence[tuple[str, str]]) -> None:
    """Moves between two processes, each over another of the ways in turn."""
    async with open_tour(folder, tour_options(engines)) as tour:
        for number in range(MOVES):
            await tour.dwell()
            move = await tour.move(ways[number % len(ways)])
            assert move.report.verified_pages == sum(size for _, size in MEMORY) // 4096
        report = await tour.finish()
    assert report.problem() == ""
    assert [f"{move.source}{move.destination}" for move in report.moves] == ["AB", "BA"] * (MOVES // 2)


@pytest.mark.parametrize("engines", ENGINES, ids="-".join)
async def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, engines: tuple[str, str]) -> None:
    require_library()
    edition = edition_of_library()
    await there_and_back(tmp_path_factory.mktemp("t"), engines, [(edition, edition)])


@pytest.mark.parametrize("way", WAYS[:3], ids="-".join)
async def test_there_and_back_between_processes_of_our_own(
    tmp_path_factory: pytest.TempPathFactory, way: tuple[str, str]
) -> None:
    """Native to native; the way back is the other way round, so three of the four are all of them."""
    await there_and_back(tmp_path_factory.mktemp("t"), NATIVE, [way, way[::-1]])


async def test_each_end_may_speak_another_edition(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one edition has saved, at one engine, the other edition restores, at the other engine."""
    require_library()
    theirs = edition_of_library()
    ours = "v2" if theirs == "v1" else "v1"
    options = tour_options(("native", "libvfio-user"))
    async with open_tour(tmp_path_factory.mktemp("t"), options) as tour:
        for way in ((ours, theirs), (theirs, ours)):
            await tour.dwell()
            assert (await tour.move(way)).protocols == way
        assert (await tour.finish()).problem() == ""
