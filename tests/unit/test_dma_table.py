# SPDX-License-Identifier: BSD-3-Clause
"""The table of DMA regions: every refusal with its errno, no descriptor leaked, and a naive model."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.dma_region import Access
from vfio_user.server.dma_table import MAX_MAPPED, DmaTable
from vfio_user.transport.fds import OwnedFd

PAGE = 4096


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def memfd(size: int, seals: int = 0) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


def sealed(size: int) -> OwnedFd:
    return memfd(size, fcntl.F_SEAL_SHRINK)


@pytest.fixture
def table() -> Iterator[DmaTable]:
    before = open_fds()
    table = DmaTable(max_regions=4)
    yield table
    table.unmap_all()
    assert open_fds() == before, "descriptors leaked"


@pytest.fixture
def trusting() -> Iterator[DmaTable]:
    before = open_fds()
    table = DmaTable(trust_client_memory=True)
    yield table
    table.unmap_all()
    assert open_fds() == before, "descriptors leaked"


def refused(table: DmaTable, *args: int, fd: OwnedFd | None = None, **flags: bool) -> int:
    """The errno with which a map is refused; the descriptor must have been closed."""
    count = len(table)
    address, size, *offset = args
    with pytest.raises(VfioUserError) as caught:
        table.map(address, size, fd, *offset, **flags)
    assert len(table) == count
    assert fd is None or fd.closed
    return caught.value.errno


def mappings() -> str:
    return Path("/proc/self/maps").read_text()


def test_without_a_descriptor_by_message(table: DmaTable) -> None:
    region = table.map(0x10000, 2 * PAGE)
    assert region.access is Access.MESSAGE
    assert (region.address, region.size, region.end) == (0x10000, 2 * PAGE, 0x12000)


def test_without_a_descriptor_the_offset_does_not_count(table: DmaTable) -> None:
    assert table.map(0, PAGE, None, 100).access is Access.MESSAGE


def test_a_memfd_that_cannot_shrink_is_mapped(table: DmaTable) -> None:
    region = table.map(0, PAGE, sealed(2 * PAGE), PAGE)
    assert region.access is Access.MAPPED
    assert "memfd:guest" in mappings()
    table.unmap(0, PAGE)
    assert "memfd:guest" not in mappings()


def test_a_memfd_that_can_shrink_is_not_mapped(table: DmaTable) -> None:
    assert table.map(0, PAGE, memfd(PAGE)).access is Access.FILE
    assert table.map(PAGE, PAGE, memfd(PAGE, fcntl.F_SEAL_GROW)).access is Access.FILE
    assert "memfd:guest" not in mappings()


def test_a_trusted_clients_file_is_mapped(trusting: DmaTable) -> None:
    assert trusting.map(0, PAGE, memfd(PAGE)).access is Access.MAPPED


def test_an_offset_that_differs_from_the_address(table: DmaTable) -> None:
    """As QEMU maps at 0xc0000 and 0xd8000."""
    fd = sealed(64 * PAGE)
    os.pwrite(fd.fileno(), b"here", 40 * PAGE)
    region = table.map(0xC0000, 0xB000, fd, 40 * PAGE)
    assert bytes(region.load(0, 4)) == b"here"


def test_the_whole_upper_end_of_the_address_space(table: DmaTable) -> None:
    table.map(2**64 - PAGE, PAGE)
    assert table.find(2**64 - 1) is not None
    assert refused(table, 2**64 - PAGE, PAGE) == errno.EEXIST


@pytest.mark.parametrize(
    ("address", "size", "offset"),
    [
        (0, 0, 0),
        (100, PAGE, 0),
        (0, 100, 0),
        (0, PAGE, 100),
        (2**64 - PAGE, 2 * PAGE, 0),
        (PAGE, 2**64 - PAGE + PAGE, 0),
        (0, PAGE, 2**63 - PAGE),
        (0, PAGE, 2**64 - PAGE),
        (0, 2 * PAGE, PAGE),
        (0, PAGE, 2 * PAGE),
    ],
)
def test_ranges_that_cannot_be_mapped(table: DmaTable, address: int, size: int, offset: int) -> None:
    """Empty, unaligned, wrapping, or more than the descriptor of two pages holds."""
    assert refused(table, address, size, offset, fd=sealed(2 * PAGE)) == errno.EINVAL


def test_neither_readable_nor_writable(table: DmaTable) -> None:
    assert refused(table, 0, PAGE, readable=False, writable=False) == errno.EINVAL


@pytest.mark.parametrize(("address", "pages"), [(4, 4), (3, 2), (7, 2), (5, 1), (0, 20), (4, 1), (7, 1)])
def test_overlap(table: DmaTable, address: int, pages: int) -> None:
    table.map(4 * PAGE, 4 * PAGE)
    assert refused(table, address * PAGE, pages * PAGE, fd=sealed(20 * PAGE)) == errno.EEXIST


def test_too_many(table: DmaTable) -> None:
    for i in range(4):
        table.map(i * PAGE, PAGE)
    assert refused(table, 4 * PAGE, PAGE, fd=sealed(PAGE)) == errno.ENOSPC
    table.unmap(0, PAGE)
    table.map(4 * PAGE, PAGE)


def test_mapped_memory_leaves_addresses_for_ourselves(table: DmaTable) -> None:
    half = MAX_MAPPED // 2
    for i in range(2):
        table.map(i * half, half, sealed(half))
    assert refused(table, 2 * half, PAGE, fd=sealed(PAGE)) == errno.ENOMEM
    table.map(2 * half, half, memfd(half))  # by file I/O: takes no addresses
    table.unmap(0, half)
    assert refused(table, 4 * half, half + PAGE, fd=sealed(half + PAGE)) == errno.ENOMEM
    table.map(0, half, sealed(half))
    assert refused(table, 4 * half, PAGE, fd=sealed(PAGE)) == errno.ENOMEM
    table.unmap_all()
    table.map(0, MAX_MAPPED, sealed(MAX_MAPPED))


def test_descriptors_that_are_no_files(table: DmaTable, tmp_path: Path) -> None:
    pipe_read, pipe_write = os.pipe()
    for number in (
        pipe_read,
        pipe_write,
        os.eventfd(0),
        os.open("/dev/zero", os.O_RDWR),
        socket.socket().detach(),
    ):
        assert refused(table, 0, PAGE, fd=OwnedFd(number)) in (errno.EINVAL, errno.EACCES)
    directory = OwnedFd(os.open(tmp_path, os.O_RDONLY))
    assert refused(table, 0, PAGE, fd=directory, writable=False) == errno.EINVAL


def test_descriptors_that_are_no_memory_are_refused_even_if_trusted(trusting: DmaTable) -> None:
    assert refused(trusting, 0, PAGE, fd=OwnedFd(os.eventfd(0))) == errno.ENODEV


def test_access_modes(table: DmaTable, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))

    def opened(flags: int) -> OwnedFd:
        return OwnedFd(os.open(path, flags))

    assert refused(table, 0, PAGE, fd=opened(os.O_RDONLY)) == errno.EACCES
    assert refused(table, 0, PAGE, fd=opened(os.O_WRONLY)) == errno.EACCES
    assert refused(table, 0, PAGE, fd=opened(os.O_PATH)) == errno.EBADF
    region = table.map(0, PAGE, opened(os.O_RDONLY), writable=False)
    assert region.access is Access.FILE
    # pwrite with O_APPEND writes at the end, whatever the offset.
    assert table.map(PAGE, PAGE, opened(os.O_RDWR | os.O_APPEND)).access is Access.MESSAGE


def test_a_seal_against_writing(table: DmaTable) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
    assert refused(table, 0, PAGE, fd=memfd(PAGE, seals)) == errno.EPERM
    assert table.map(0, PAGE, memfd(PAGE, seals), writable=False).access is Access.MAPPED


def test_unmap_returns_what_it_removed(table: DmaTable) -> None:
    region = table.map(PAGE, PAGE, sealed(PAGE))
    assert table.unmap(PAGE, PAGE) == [region]
    assert (region.address, region.size, region.end) == (PAGE, PAGE, PAGE)
    assert table.find(PAGE) is None


def test_unmap_of_several_whole_regions(table: DmaTable) -> None:
    regions = [table.map(n * PAGE, PAGE) for n in (1, 2, 5)]
    outside = table.map(8 * PAGE, PAGE)
    assert table.unmap(0, 8 * PAGE) == regions
    assert list(table) == [outside]


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        (0, PAGE, errno.ENOENT),
        (6 * PAGE, PAGE, errno.ENOENT),
        (2 * PAGE, 0, errno.EINVAL),
        (2 * PAGE, PAGE, errno.EINVAL),
        (3 * PAGE, PAGE, errno.EINVAL),
        (3 * PAGE, 10 * PAGE, errno.EINVAL),
        (0, 3 * PAGE, errno.EINVAL),
        (2 * PAGE, 100, errno.EINVAL),
        (2**64 - PAGE, 2 * PAGE, errno.EINVAL),
    ],
)
def test_unmap_of_what_is_not_there(table: DmaTable, address: int, size: int, expected: int) -> None:
    region = table.map(2 * PAGE, 2 * PAGE)
    with pytest.raises(VfioUserError) as caught:
        table.unmap(address, size)
    assert caught.value.errno == expected
    assert list(table) == [region]
    assert region.end == 4 * PAGE


def test_unmap_succeeds_while_a_view_is_held(table: DmaTable, caplog: pytest.LogCaptureFixture) -> None:
    region = table.map(0, PAGE, sealed(PAGE))
    view = region.load(0, 4)
    table.unmap(0, PAGE)
    assert "still holds a view" in caplog.text
    assert table.find(0) is None
    assert bytes(view) == bytes(4)  # the mapping lives on for the view alone
    del view
    assert "memfd:guest" not in mappings()


def test_a_read_only_region_is_mapped_read_only(table: DmaTable) -> None:
    region = table.map(0, PAGE, sealed(PAGE), writable=False)
    assert region.write_view is None
    view = region.load(0, 4)
    assert isinstance(view, memoryview)
    assert view.readonly


def test_views_cannot_be_written_past_the_dirty_log(table: DmaTable) -> None:
    view = table.map(0, PAGE, sealed(PAGE)).load(0, 4)
    assert isinstance(view, memoryview)
    assert view.readonly


PAGES = 24
RANGES = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 8))
OPERATIONS = st.lists(st.tuples(st.sampled_from(["map", "map", "unmap", "unmap all"]), RANGES), max_size=40)


class NaiveTable:
    """One entry a page: which region it belongs to."""

    def __init__(self) -> None:
        self.regions: set[tuple[int, int]] = set()

    def map(self, page: int, count: int) -> int:
        if any(page < start + n and start < page + count for start, n in self.regions):
            return errno.EEXIST
        self.regions.add((page, count))
        return 0

    def unmap(self, page: int, count: int) -> int:
        touched = {(s, n) for s, n in self.regions if page < s + n and s < page + count}
        if not touched:
            return errno.ENOENT
        if any(s < page or s + n > page + count for s, n in touched):
            return errno.EINVAL
        self.regions -= touched
        return 0


@given(OPERATIONS)
def test_against_a_naive_table(operations: list[tuple[str, tuple[int, int]]]) -> None:
    table, naive = DmaTable(), NaiveTable()
    for operation, (page, count) in operations:
        result = 0
        try:
            if operation == "map":
                table.map(page * PAGE, count * PAGE)
            elif operation == "unmap":
                table.unmap(page * PAGE, count * PAGE)
            else:
                table.unmap_all()
                naive.regions.clear()
        except VfioUserError as error:
            result = error.errno
        if operation != "unmap all":
            assert result == getattr(naive, operation)(page, count)
        assert [(r.address // PAGE, r.size // PAGE) for r in table] == sorted(naive.regions)
    for page in range(PAGES + 8):
        owner = [start for start, count in naive.regions if start <= page < start + count]
        found = table.find(page * PAGE + PAGE - 1)
        assert ([] if found is None else [found.address // PAGE]) == owner
