# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "VFIO_USER_DMA_MAP", "VFIO_USER_DMA_UNMAP"; what a client may get wrong there."""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conformance import wire
from conformance.engines import Serve, Served
from conformance.raw import Answer, RawClient, connect
from vfio_user.device_models.scratch import Scratch

PAGE = 4096
TOP = (1 << 64) - PAGE


@contextmanager
def memfd(size: int, *, sealed: bool = True) -> Iterator[int]:
    fd = os.memfd_create("conformance", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        yield fd
    finally:
        os.close(fd)


async def dma_map(
    raw: RawClient, address: int, size: int, offset: int = 0, flags: int = 3, fd: int | None = None
) -> Answer:
    body = wire.dma_map(address, size, offset, flags)
    return await raw.call(wire.DMA_MAP, body, fds=() if fd is None else (fd,))


async def unmap(raw: RawClient, address: int, size: int, flags: int = 0) -> Answer:
    return await raw.call(wire.DMA_UNMAP, wire.dma_unmap(address, size, flags))


BAD_RANGES = {
    "empty": (0x1000, 0),
    "address not aligned": (0x1001, 0x1000),
    "size not aligned": (0x1000, 0x1001),
    "half a page": (0x1000, 0x800),
    "wraps around": (TOP, 2 * PAGE),
    "wraps to its start": (PAGE, TOP + 4095),
    "everything": (0, (1 << 64) - 1),
}


@pytest.mark.parametrize(("address", "size"), BAD_RANGES.values(), ids=BAD_RANGES.keys())
@pytest.mark.parametrize("shared", [False, True], ids=["message", "fd"])
async def test_a_range_that_cannot_be_is_refused(
    raw: RawClient, address: int, size: int, shared: bool
) -> None:
    with memfd(4 * PAGE) as fd:
        answer = await dma_map(raw, address, size, fd=fd if shared else None)
        assert answer.errno == errno.EINVAL
    await raw.expect_alive()


async def test_the_last_page_of_the_address_space_can_be_mapped(raw: RawClient) -> None:
    assert (await dma_map(raw, TOP, PAGE)).ok == b""
    assert (await unmap(raw, TOP, PAGE)).ok == wire.dma_unmap(TOP, PAGE)


@pytest.mark.parametrize("first", [0x3000, 0x4000, 0x5000, 0x2000])
@pytest.mark.parametrize("pages", [3, 2, 5])
async def test_a_map_over_an_existing_region_fails_with_eexist(
    raw: RawClient, first: int, pages: int
) -> None:
    assert (await dma_map(raw, 0x4000, 2 * PAGE)).ok == b""
    overlaps = first < 0x6000 and first + pages * PAGE > 0x4000
    with memfd(5 * PAGE) as fd:
        answer = await dma_map(raw, first, pages * PAGE, fd=fd)
    assert not overlaps or answer.errno == errno.EEXIST
    assert overlaps or answer.ok == b""


async def test_a_region_that_is_mapped_again_as_it_is_leaves_nothing(raw: RawClient) -> None:
    """Whatever is answered to the second one: its descriptor is not kept beyond the client's end."""
    with memfd(2 * PAGE) as fd:
        for _ in range(3):
            await dma_map(raw, 0x4000, 2 * PAGE, fd=fd)
    await raw.expect_alive()


async def test_neighbours_do_not_overlap(raw: RawClient) -> None:
    for address in (0x4000, 0x6000, 0x5000, 0x3000):
        assert (await dma_map(raw, address, PAGE)).ok == b""


async def test_more_regions_than_max_dma_maps_are_refused(serve: Serve) -> None:
    async with connect(serve(Scratch, max_dma_maps=3).path) as raw:
        with memfd(PAGE) as fd:
            for i in range(3):
                assert (await dma_map(raw, i * PAGE, PAGE, fd=fd)).ok == b""
            assert (await dma_map(raw, 4 * PAGE, PAGE, fd=fd)).errno == errno.ENOSPC
        assert (await unmap(raw, 0, PAGE)).ok
        assert (await dma_map(raw, 4 * PAGE, PAGE)).ok == b""


async def test_the_clients_own_max_dma_maps_counts_too(scratch: Served) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        await raw.negotiate({"max_dma_maps": 1})
        assert (await dma_map(raw, 0, PAGE)).ok == b""
        assert (await dma_map(raw, PAGE, PAGE)).errno == errno.ENOSPC


async def test_ten_thousand_regions_can_be_mapped(raw: RawClient) -> None:
    count = 10_000
    for start in range(0, count, 500):
        places = range(start, start + 500)
        await raw.send(b"".join(wire.message(wire.DMA_MAP, wire.dma_map(i * 2 * PAGE, PAGE)) for i in places))
        for _ in places:
            assert (await raw.receive()).ok == b""
    assert (await dma_map(raw, 9_000 * 2 * PAGE, PAGE)).errno == errno.EEXIST
    reply = (await unmap(raw, 0, 0, wire.UNMAP_ALL)).ok
    assert struct.unpack("=IIQQ", reply) == (24, wire.UNMAP_ALL, 0, count * PAGE)


@pytest.mark.parametrize("flags", [0, 4, 8])
async def test_a_region_for_no_access_is_refused(raw: RawClient, flags: int) -> None:
    assert (await dma_map(raw, 0, PAGE, flags=flags)).errno == errno.EINVAL


# The descriptor


@pytest.mark.parametrize(
    ("size", "offset"), [(3, 0), (1, 2), (2, 1), (1, 1 << 40), (1, (1 << 51) - 1), (1, (1 << 52) - 1)]
)
@pytest.mark.parametrize("sealed", [True, False])
async def test_a_file_that_does_not_hold_the_region_is_refused(
    raw: RawClient, size: int, offset: int, sealed: bool
) -> None:
    with memfd(2 * PAGE, sealed=sealed) as fd:
        answer = await dma_map(raw, 0, size * PAGE, offset * PAGE, fd=fd)
        assert answer.errno == errno.EINVAL
    await raw.expect_alive()


async def test_an_offset_that_is_not_aligned_is_refused(raw: RawClient) -> None:
    with memfd(2 * PAGE) as fd:
        assert (await dma_map(raw, 0, PAGE, 100, fd=fd)).errno == errno.EINVAL


def not_memory(kind: str, tmp_path: Path) -> int:
    """A descriptor that is no file of memory."""
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
        return writing
    if kind == "socket":
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    openers = {
        "eventfd": lambda: os.eventfd(0),
        "directory": lambda: os.open(tmp_path, os.O_RDONLY),
        "O_PATH": lambda: os.open(tmp_path, os.O_PATH),
        "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
        "/proc": lambda: os.open("/proc/self/mem", os.O_RDWR),
    }
    return openers[kind]()


@pytest.mark.parametrize("kind", ["pipe", "socket", "eventfd", "directory", "O_PATH", "/dev/zero", "/proc"])
async def test_a_descriptor_that_is_no_memory_is_refused(raw: RawClient, kind: str, tmp_path: Path) -> None:
    fd = not_memory(kind, tmp_path)
    try:
        assert (await dma_map(raw, 0, PAGE, fd=fd)).errno in (errno.EINVAL, errno.EACCES, errno.EBADF)
    finally:
        os.close(fd)
    await raw.expect_alive()


@pytest.mark.parametrize(("mode", "flags", "error"), [("rb", 3, errno.EACCES), ("ab", 1, errno.EACCES)])
async def test_a_descriptor_of_the_wrong_mode_is_refused(
    raw: RawClient, mode: str, flags: int, error: int, tmp_path: Path
) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    with path.open(mode) as file:
        assert (await dma_map(raw, 0, PAGE, flags=flags, fd=file.fileno())).errno == error


async def test_a_read_only_descriptor_serves_a_read_only_region(raw: RawClient, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    with path.open("rb") as file:
        assert (await dma_map(raw, 0, PAGE, flags=wire.READABLE, fd=file.fileno())).ok == b""


async def test_two_descriptors_are_refused(raw: RawClient) -> None:
    with memfd(PAGE) as fd:
        answer = await raw.call(wire.DMA_MAP, wire.dma_map(0, PAGE), fds=[fd, fd])
        assert answer.errno == errno.EINVAL
    assert (await dma_map(raw, 0, PAGE)).ok == b""


# DMA_UNMAP


async def test_unmap_answers_with_the_entry_of_the_request(raw: RawClient) -> None:
    with memfd(PAGE) as fd:
        assert (await dma_map(raw, 0x4000, PAGE, fd=fd)).ok == b""
    assert (await unmap(raw, 0x4000, PAGE)).ok == wire.dma_unmap(0x4000, PAGE)
    assert (await unmap(raw, 0x4000, PAGE)).errno == errno.ENOENT


BAD_UNMAPS = {
    "unknown": (0x10000, PAGE, errno.ENOENT),
    "empty": (0x4000, 0, errno.EINVAL),
    "first half": (0x4000, PAGE, errno.EINVAL),
    "second half": (0x5000, PAGE, errno.EINVAL),
    "beyond its end": (0x5000, 4 * PAGE, errno.EINVAL),
    "wraps around": (TOP, 2 * PAGE, errno.EINVAL),
    "size of all bits": (0, (1 << 64) - 1, None),
}


@pytest.mark.parametrize(("address", "size", "error"), BAD_UNMAPS.values(), ids=BAD_UNMAPS.keys())
async def test_an_unmap_that_fits_no_region(
    raw: RawClient, address: int, size: int, error: int | None
) -> None:
    assert (await dma_map(raw, 0x4000, 2 * PAGE)).ok == b""
    answer = await unmap(raw, address, size)
    if error is None:  # as with the kernel's VFIO, a range may hold several whole regions
        assert answer.ok
        return
    assert answer.errno == error
    assert (await unmap(raw, 0x4000, 2 * PAGE)).ok, "nothing had been unmapped"


async def test_unmap_of_several_regions_at_once(raw: RawClient) -> None:
    for address in (0x1000, 0x3000, 0x8000):
        assert (await dma_map(raw, address, PAGE)).ok == b""
    assert (await unmap(raw, 0x1000, 4 * PAGE)).ok
    assert (await unmap(raw, 0x3000, PAGE)).errno == errno.ENOENT
    assert (await unmap(raw, 0x8000, PAGE)).ok


async def test_unmap_all_without_any_region(raw: RawClient) -> None:
    assert (await unmap(raw, 0, 0, wire.UNMAP_ALL)).ok


async def test_a_dirty_bitmap_without_logging_is_refused(raw: RawClient) -> None:
    assert (await dma_map(raw, 0x4000, PAGE)).ok == b""
    body = wire.dma_unmap(0x4000, PAGE, wire.UNMAP_BITMAP, 48) + struct.pack("=QQ", PAGE, 8)
    assert (await raw.call(wire.DMA_UNMAP, body)).errno == errno.EINVAL
    assert (await unmap(raw, 0x4000, PAGE)).ok


async def test_memory_is_let_go_of_before_the_reply(raw: RawClient, scratch: Served) -> None:
    def mapped() -> bool:
        return "memfd:conformance" in Path(f"/proc/{scratch.pid}/maps").read_text()

    with memfd(PAGE) as fd:
        assert (await dma_map(raw, 0x4000, PAGE, fd=fd)).ok == b""
    assert mapped()
    assert (await unmap(raw, 0x4000, PAGE)).ok
    assert not mapped()
