# SPDX-License-Identifier: BSD-3-Clause
"""An e1000 under load, moved between a server of each engine: both ways, by the edition that the library has.

Every frame is counted and looked at, and the memories are compared page by page: see `client/tour.py`. The
dirty log is the library's at one side and ours at the other.
"""

import os

import pytest

from conformance.limits import edition_of_library, require_library
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.tour import TourOptions, open_tour

MEMORY = ((0, 0x10000), (0x100000, 4 << 20))
MOVES = 40 if os.environ.get("VFIO_USER_SOAK") else 2

ENGINES = [("native", "libvfio-user"), ("libvfio-user", "native"), ("libvfio-user", "libvfio-user")]


@pytest.fixture(autouse=True)
def _library() -> None:
    require_library()


def tour_options(engines: tuple[str, str]) -> TourOptions:
    """The library has no resample eventfd, and one of v2 takes no SET_IRQS before the device runs."""
    return TourOptions(
        dwell=0.1,
        ring=64,
        rate=1e9,
        vmm=VmmOptions(MEMORY, resample=False),
        engines=engines,
        irqs_first=edition_of_library() == "v1",
    )


@pytest.mark.parametrize("engines", ENGINES, ids="-".join)
async def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, engines: tuple[str, str]) -> None:
    edition = edition_of_library()
    options = tour_options(engines)
    async with open_tour(tmp_path_factory.mktemp("t"), options) as tour:
        for _ in range(MOVES):
            await tour.dwell()
            move = await tour.move((edition, edition))
            assert move.report.verified_pages == sum(size for _, size in MEMORY) // 4096
        report = await tour.finish()
    assert report.problem() == ""
    assert [f"{move.source}{move.destination}" for move in report.moves] == ["AB", "BA"] * (MOVES // 2)


async def test_each_end_may_speak_another_edition(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one edition has saved, at one engine, the other edition restores, at the other engine."""
    theirs = edition_of_library()
    ours = "v2" if theirs == "v1" else "v1"
    options = tour_options(("native", "libvfio-user"))
    async with open_tour(tmp_path_factory.mktemp("t"), options) as tour:
        for way in ((ours, theirs), (theirs, ours)):
            await tour.dwell()
            assert (await tour.move(way)).protocols == way
        assert (await tour.finish()).problem() == ""
