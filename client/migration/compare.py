# SPDX-License-Identifier: BSD-3-Clause
"""Two guest memories compared page by page."""

from vfio_user.client.memory import PAGE, GuestRam, RamRange


def compare_memory(one: GuestRam, other: GuestRam, step: int = 1 << 20) -> list[int]:
    """The addresses of the pages (4 KiB) that differ; both have the same ranges."""
    different = []
    for mine, theirs in zip(one.ranges, other.ranges, strict=True):
        for begin in range(0, mine.size, step):
            end = min(begin + step, mine.size)
            if bytes(mine.view[begin:end]) != bytes(theirs.view[begin:end]):
                different += [mine.address + place for place in _different(mine, theirs, begin, end)]
    return different


def _different(mine: RamRange, theirs: RamRange, begin: int, end: int) -> list[int]:
    places = range(begin, end, PAGE)
    return [place for place in places if mine.view[place : place + PAGE] != theirs.view[place : place + PAGE]]
