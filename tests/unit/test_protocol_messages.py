# SPDX-License-Identifier: BSD-3-Clause
"""Values are checked when they are built, and shortened to the requester's argsz."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from typing import Any, cast

import pytest

from vfio_user.protocol import constants as c
from vfio_user.protocol import messages as m
from vfio_user.protocol.errors import LocalProtocolError, RemoteProtocolError

ALL = [
    value
    for name in m.__all__
    if isinstance(value := getattr(m, name), type) and issubclass(value, m.Structure)
]


@pytest.mark.parametrize("kind", [kind for kind in ALL if dataclasses.is_dataclass(kind)])
def test_values_are_frozen_slotted_and_check_every_number(kind: type[m.Structure]) -> None:
    assert "__dict__" not in dir(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    numbers = {field.name for field in dataclasses.fields(cast(Any, kind)) if field.type == "int"}
    assert numbers == set(kind.WIDTHS)


@pytest.mark.parametrize(
    "build",
    [
        lambda: m.RegionReadRequest(1 << 64, 0, 4),
        lambda: m.RegionReadRequest(0, -1, 4),
        lambda: m.RegionReadRequest(0, 0, 1 << 32),
        lambda: m.VersionRequest(1 << 16, 0),
        lambda: m.DmaReadRequest("0", 4),  # type: ignore[arg-type]
        lambda: m.RegionWrite(0, 0, b"123456789"),
        lambda: m.DmaUnmapRequest(1, 0, 4096),
        lambda: m.DmaUnmapRequest(0, 0, 4096, m.Bitmap(4096, 8)),
        lambda: m.DmaUnmapReply(1, 0, 4096, m.Bitmap(4096, 8), b"1"),
        lambda: m.DeviceSetIrqsRequest(0x22, 0, 0, 2, (True,)),
        lambda: m.DeviceSetIrqsRequest(0x21, 0, 0, 1, (True,)),
        lambda: m.DeviceSetIrqsRequest(0x27, 0, 0, 0),
        lambda: m.DeviceGetRegionIoFdsReply(0, (m.Ioeventfd(0, 0, 0),), count=2),
        lambda: m.DirtyPagesRequest(3),
        lambda: m.DirtyPagesRequest(4),
        lambda: m.DirtyPagesReply(0, data=b"1"),
        lambda: m.DmaWriteReply(1),
        lambda: m.DmaWriteReply(1, -1),
        lambda: m.OtherCapability(c.RegionInfoCap.TYPE, 1),
    ],
)
def test_a_wrong_value_is_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        build()
    assert caught.value.errno == errno.EINVAL


CAPABILITIES = (m.SparseMmapCapability((m.SparseMmapArea(0, 4096),)), m.TypeCapability(3, 1))
REGION = m.DeviceGetRegionInfoReply(c.RegionInfoFlags.READ, 0, 4096, 0, CAPABILITIES)


def test_capabilities_set_their_flag() -> None:
    assert REGION.flags == c.RegionInfoFlags.READ | c.RegionInfoFlags.CAPS
    assert REGION.argsz == 32 + 32 + 16


@pytest.mark.parametrize("argsz", [REGION.argsz, 4096])
def test_a_reply_that_fits_is_sent_whole(argsz: int) -> None:
    assert m.fit(REGION, argsz) is REGION


def test_a_region_info_that_does_not_fit_loses_its_capabilities_and_tells_the_size() -> None:
    short = m.fit(REGION, REGION.argsz - 1)
    assert (short.flags, short.capabilities, short.argsz) == (c.RegionInfoFlags.READ, (), REGION.argsz)


def test_other_replies_that_can_be_shortened() -> None:
    io_fds = m.DeviceGetRegionIoFdsReply(0, (m.Ioeventfd(0, 4, 0),))
    assert m.fit(io_fds, 16) == m.DeviceGetRegionIoFdsReply(0, (), count=1, argsz=56)
    feature = m.DeviceFeatureReply(1 << 16 | 1, b"12345678")
    assert m.fit(feature, 8) == m.DeviceFeatureReply(1 << 16 | 1, b"", argsz=16)
    dirty = m.DirtyPagesReply(4, m.BitmapRange(0, 4096, m.Bitmap(4096, 8)), bytes(8))
    assert m.fit(dirty, 47) == m.DirtyPagesReply(4, argsz=48)


@pytest.mark.parametrize(
    ("reply", "argsz"),
    [
        (m.DeviceGetInfoReply(3, 9, 5), 15),
        (m.DeviceGetIrqInfoReply(0, 0, 0), 0),
        (REGION, 31),
        (m.MigDataReadReply(b"1234"), 11),
        (m.DmaUnmapReply(1, 0, 4096, m.Bitmap(4096, 8), bytes(8)), 47),
    ],
)
def test_an_argsz_below_what_must_be_sent_is_the_peers_error(reply: m.Message, argsz: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"argsz {argsz}") as caught:
        m.fit(reply, argsz)
    assert caught.value.errno == errno.EINVAL
