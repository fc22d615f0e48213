# SPDX-License-Identifier: BSD-3-Clause
"""Guest memory as the VMM has it: ranges, files, accesses, and the count of what the server asks for."""

import errno
import fcntl
import os
import struct

import pytest

from vfio_user.client.memory import GuestRam, RamError

PAGE = 4096
LAYOUT = struct.Struct("<IQ")


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_range_is_a_file_that_cannot_change_its_size() -> None:
    with GuestRam() as ram:
        fd = ram.add(0x10000, 2 * PAGE).fd
        assert fd is not None
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        with pytest.raises(PermissionError):
            os.ftruncate(fd, PAGE)
        ram.write(0x10000 + PAGE, b"hello")
        assert os.pread(fd, 5, PAGE) == b"hello"


def test_without_seals_the_file_can_shrink() -> None:
    with GuestRam(seals=0) as ram:
        fd = ram.add(0, PAGE).fd
        assert fd is not None
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0


def test_private_memory_has_no_descriptor() -> None:
    with GuestRam(shared=False) as ram:
        memory = ram.add(0x1000, PAGE)
        assert (memory.fd, memory.offset) == (None, 0)
        ram.write(0x1000, b"x")
        assert ram.dma_read(0x1000, 1) == b"x"


def test_ranges_of_one_file_follow_each_other_in_it() -> None:
    with GuestRam() as ram:
        low, high = ram.add_file([(0, PAGE), (1 << 32, 2 * PAGE)])
        assert low.fd == high.fd
        assert (low.offset, high.offset) == (0, PAGE)
        ram.write((1 << 32) + 7, b"above")
        assert high.fd is not None
        assert os.pread(high.fd, 5, PAGE + 7) == b"above"


@pytest.mark.parametrize("place", [(0x800, PAGE), (0, 0), (0, 100), (0x2000, PAGE), (0, 0x10000)])
def test_bad_places_are_refused(place: tuple[int, int]) -> None:
    with GuestRam() as ram:
        ram.add(0x2000, PAGE)
        with pytest.raises(ValueError, match=r"multiples|overlap"):
            ram.add(*place)


def test_an_access_may_cross_adjoining_ranges_and_no_hole() -> None:
    with GuestRam() as ram:
        ram.add(PAGE, PAGE)
        ram.add(0, PAGE)
        ram.write(PAGE - 2, b"abcd")
        assert ram.read(PAGE - 2, 4) == b"abcd"
        ram.dma_write(PAGE - 1, b"XY")
        assert ram.dma_read(PAGE - 2, 4) == b"aXYd"
        with pytest.raises(RamError):
            ram.write(2 * PAGE - 2, b"over")
        assert ram.read(2 * PAGE - 2, 2) == bytes(2)


def test_structures() -> None:
    with GuestRam() as ram:
        ram.add(0x1000, PAGE)
        ram.pack(LAYOUT, 0x1008, 7, 1 << 40)
        assert ram.unpack(LAYOUT, 0x1008) == (7, 1 << 40)
        with pytest.raises(RamError):
            ram.unpack(LAYOUT, 0x2000 - 4)


def test_the_allocator_gives_nothing_twice() -> None:
    with GuestRam() as ram:
        ram.add(0x1000, 2 * PAGE)
        ram.add(0x8000, PAGE)
        places = [ram.allocate(100, 16), ram.allocate(100, 16), ram.allocate(PAGE), ram.allocate(PAGE)]
        assert places == [0x1000, 0x1070, 0x2000, 0x8000]
        with pytest.raises(RamError):
            ram.allocate(PAGE)
        ram.write(0x1000, b"x")
        ram.release_all()
        assert ram.allocate(1) == 0x1000
        assert ram.read(0x1000, 1) == b"\0"


def test_what_the_server_asks_for_is_counted_and_reported() -> None:
    written: list[tuple[int, int]] = []
    with GuestRam(shared=False) as ram:
        ram.add(0, PAGE)
        ram.add(PAGE, PAGE, writable=False)
        ram.on_dma_write = lambda address, length: written.append((address, length))
        ram.dma_write(0x10, b"abc")
        ram.dma_read(0x10, 2)
        for refused in (lambda: ram.dma_write(PAGE, b"a"), lambda: ram.dma_read(2 * PAGE, 1)):
            with pytest.raises(RamError) as caught:
                refused()
            assert caught.value.errno == errno.EFAULT
        counters = ram.counters
        assert (counters.reads, counters.bytes_read) == (1, 2)
        assert (counters.writes, counters.bytes_written) == (1, 3)
        assert counters.refused == 2
        assert written == [(0x10, 3)]


def test_closing_leaves_nothing_open() -> None:
    before = open_fds()
    ram = GuestRam()
    ram.add_file([(0, PAGE), (PAGE, PAGE)])
    ram.add(0x10000, PAGE)
    ram.close()
    ram.close()
    assert open_fds() == before


def test_a_view_that_is_held_is_an_error_at_the_end() -> None:
    ram = GuestRam()
    part = ram.add(0, PAGE).view[:4]
    with pytest.raises(BufferError):
        ram.close()
    part.release()
    ram.close()
