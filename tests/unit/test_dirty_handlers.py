# SPDX-License-Identifier: BSD-3-Clause
"""v1's dirty pages where another page size than 4 KiB has been negotiated, and that a report is not copied;
else see tests/conformance."""

import errno
import fcntl
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vfio_user.protocol import messages as m
from vfio_user.protocol.capabilities import Migration
from vfio_user.protocol.constants import DeviceFeature, DeviceFeatureFlags, DirtyPagesFlags, DmaUnmapFlags
from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.dirty_handlers import dirty_pages, dma_unmap
from vfio_user.server.dirty_tracking import DirtyTracking
from vfio_user.server.dma_region import DmaRegion
from vfio_user.server.dma_table import DmaTable
from vfio_user.server.migration.features import device_feature
from vfio_user.transport.fds import OwnedFd

PAGE, LARGE = 4096, 65536
SIZE = 16 * LARGE


@pytest.fixture
def table() -> Iterator[DmaTable]:
    table = DmaTable()
    yield table
    table.unmap_all()


@pytest.fixture
def region(table: DmaTable) -> DmaRegion:
    fd = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), SIZE)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return table.map(0, SIZE, fd)


@pytest.fixture
def session(table: DmaTable, region: DmaRegion) -> Any:
    """What the handlers need of one: 64 KiB have been negotiated, and logging is on."""
    tracking = DirtyTracking(table)
    tracking.negotiated(Migration(pgsize=LARGE))
    session = SimpleNamespace(host=SimpleNamespace(dirty=tracking, table=table))
    dirty_pages(session, m.DirtyPagesRequest(int(DirtyPagesFlags.START)), [])  # type: ignore[arg-type]
    return session


def get_bitmap(session: Any, pgsize: int) -> bytes:
    wanted = m.BitmapRange(0, SIZE, m.Bitmap(pgsize, -(-SIZE // pgsize // 64) * 8))
    request = m.DirtyPagesRequest(int(DirtyPagesFlags.GET_BITMAP), wanted)
    reply = dirty_pages(session, request, []).body
    assert isinstance(reply, m.DirtyPagesReply)
    return bytes(reply.data)


def test_pages_are_tracked_in_the_negotiated_size(session: Any, region: DmaRegion) -> None:
    assert session.host.dirty.page_size == LARGE
    region.store(3 * LARGE - 1, b"xx")
    assert get_bitmap(session, LARGE) == b"\x0c".ljust(8, b"\0")
    region.store(9 * LARGE, b"x")
    assert get_bitmap(session, 4 * LARGE) == b"\x04".ljust(8, b"\0")


@pytest.mark.parametrize("pgsize", [PAGE, LARGE // 2])
def test_finer_pages_are_refused(session: Any, region: DmaRegion, pgsize: int) -> None:
    region.store(0, b"x")
    with pytest.raises(VfioUserError) as caught:
        get_bitmap(session, pgsize)
    assert caught.value.errno == errno.EINVAL
    bitmap = m.Bitmap(pgsize, -(-SIZE // pgsize // 64) * 8)
    request = m.DmaUnmapRequest(int(DmaUnmapFlags.GET_DIRTY_BITMAP), 0, SIZE, bitmap)
    with pytest.raises(VfioUserError) as caught:
        dma_unmap(session, request, [])
    assert caught.value.errno == errno.EINVAL
    assert get_bitmap(session, LARGE) == b"\x01".ljust(8, b"\0")


def test_a_report_of_a_whole_region_is_sent_without_a_copy(session: Any, region: DmaRegion) -> None:
    """That of 1 TiB has 32 MiB: a copy would cost more than all the rest."""
    region.store(5 * LARGE, b"x")
    assert region.dirty is not None
    log = region.dirty.bits
    flags = DeviceFeature.DMA_LOGGING_REPORT | DeviceFeatureFlags.GET
    data = (0).to_bytes(8, "little") + SIZE.to_bytes(8, "little") + LARGE.to_bytes(8, "little")
    answer = device_feature(session, m.DeviceFeatureRequest(flags, data, 1 << 20), [])
    assert isinstance(answer.body, m.DeviceFeatureReply)
    assert b"".join((answer.body.data, *answer.body.more)) == data + b"\x20".ljust(8, b"\0")
    assert answer.lasting
    assert any(isinstance(part, memoryview) and part.obj is log for part in answer.body.more)
    assert region.dirty.clean
