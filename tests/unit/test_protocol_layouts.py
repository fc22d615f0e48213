# SPDX-License-Identifier: BSD-3-Clause
"""Every structure of layouts.py: round trips, known bytes, and bad bytes with a reason that names them."""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.protocol import codec, layouts
from vfio_user.protocol import constants as c
from vfio_user.protocol import messages as m
from vfio_user.protocol.errors import LocalProtocolError, RemoteProtocolError

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
DATA = st.binary(max_size=64)
BITMAP = st.builds(m.Bitmap, U64, U64)
ARGSZ = st.integers(1, 0xFFFFFFFF)
CAPABILITY = st.one_of(
    st.builds(m.SparseMmapCapability, st.lists(st.builds(m.SparseMmapArea, U64, U64), max_size=4).map(tuple)),
    st.builds(m.TypeCapability, U32, U32),
    st.builds(m.OtherCapability, st.integers(3, 0xFFFF), U16, DATA),
)
SUB_REGION = st.one_of(
    st.builds(m.Ioeventfd, U64, U64, U32, U32, U64),
    st.builds(m.Ioregionfd, U64, U64, U32, U32, U64),
    st.builds(m.IoeventfdShadow, U64, U64, U32, U32, U32, U64, U64),
)
SMALL_WRITE = st.builds(m.RegionWrite, U64, U32, st.binary(max_size=8))
UNMAP_FLAGS = U32.map(lambda flags: flags & ~int(c.DmaUnmapFlags.GET_DIRTY_BITMAP))
SET_FLAGS = st.sampled_from([c.IrqSetFlags.DATA_NONE, c.IrqSetFlags.DATA_EVENTFD])
ACTIONS = st.sampled_from(list(c.IRQ_SET_ACTION_TYPE_MASK))


def _dirty_range(data: bytes) -> m.BitmapRange:
    return m.BitmapRange(0x1000, 0x2000, m.Bitmap(4096, len(data)))


VALUES: dict[type[m.Structure], st.SearchStrategy[Any]] = {
    m.Header: st.builds(m.Header, U16, U16, U32, U32, U32),
    m.VersionRequest: st.builds(m.VersionRequest, U16, U16, DATA),
    m.VersionReply: st.builds(m.VersionReply, U16, U16, DATA),
    m.DmaMapRequest: st.builds(m.DmaMapRequest, U32, U64, U64, U64, U32),
    m.DmaMapReply: st.builds(m.DmaMapReply),
    m.DmaUnmapRequest: st.one_of(
        st.builds(m.DmaUnmapRequest, UNMAP_FLAGS, U64, U64, st.none(), ARGSZ),
        st.builds(m.DmaUnmapRequest, st.just(1), U64, U64, BITMAP, ARGSZ),
    ),
    m.DmaUnmapReply: st.one_of(
        st.builds(m.DmaUnmapReply, UNMAP_FLAGS, U64, U64),
        DATA.map(lambda data: m.DmaUnmapReply(1, 2, 3, m.Bitmap(4096, len(data)), data)),
    ),
    m.DeviceGetInfoRequest: st.builds(m.DeviceGetInfoRequest, U32, U32, U32, U32),
    m.DeviceGetInfoReply: st.builds(m.DeviceGetInfoReply, U32, U32, U32, U32),
    m.DeviceGetRegionInfoRequest: st.builds(m.DeviceGetRegionInfoRequest, U32, U32, U32, U32, U64, U64),
    m.DeviceGetRegionInfoReply: st.builds(
        m.DeviceGetRegionInfoReply, U32, U32, U64, U64, st.lists(CAPABILITY, max_size=4).map(tuple)
    ),
    m.DeviceGetRegionIoFdsRequest: st.builds(m.DeviceGetRegionIoFdsRequest, U32, U32, U32, U32),
    m.DeviceGetRegionIoFdsReply: st.builds(
        m.DeviceGetRegionIoFdsReply, U32, st.lists(SUB_REGION, max_size=4).map(tuple)
    ),
    m.DeviceGetIrqInfoRequest: st.builds(m.DeviceGetIrqInfoRequest, U32, U32, U32, U32),
    m.DeviceGetIrqInfoReply: st.builds(m.DeviceGetIrqInfoReply, U32, U32, U32, U32),
    m.DeviceSetIrqsRequest: st.one_of(
        st.builds(
            lambda kind, action, *rest: m.DeviceSetIrqsRequest(kind | action, *rest),
            SET_FLAGS,
            ACTIONS,
            U32,
            U32,
            U32,
        ),
        st.lists(st.booleans(), max_size=9).map(
            lambda bools: m.DeviceSetIrqsRequest(0x22, 2, 3, len(bools), tuple(bools))
        ),
    ),
    m.DeviceSetIrqsReply: st.builds(m.DeviceSetIrqsReply),
    m.RegionReadRequest: st.builds(m.RegionReadRequest, U64, U32, U32),
    m.RegionReadReply: st.builds(m.RegionReadReply, U64, U32, DATA),
    m.RegionWriteRequest: st.builds(m.RegionWriteRequest, U64, U32, DATA),
    m.RegionWriteReply: st.builds(m.RegionWriteReply, U64, U32, U32),
    m.DmaReadRequest: st.builds(m.DmaReadRequest, U64, U64),
    m.DmaReadReply: st.builds(m.DmaReadReply, U64, DATA),
    m.DmaWriteRequest: st.builds(m.DmaWriteRequest, U64, DATA),
    m.DmaWriteReply: st.one_of(st.builds(m.DmaWriteReply), st.builds(m.DmaWriteReply, U64, U64)),
    m.DeviceResetRequest: st.builds(m.DeviceResetRequest),
    m.DeviceResetReply: st.builds(m.DeviceResetReply),
    m.DirtyPagesRequest: st.one_of(
        st.sampled_from([1, 2]).map(m.DirtyPagesRequest),
        st.builds(m.DirtyPagesRequest, st.just(4), st.builds(m.BitmapRange, U64, U64, BITMAP), ARGSZ),
    ),
    m.DirtyPagesReply: st.one_of(
        st.builds(m.DirtyPagesReply),
        DATA.map(lambda data: m.DirtyPagesReply(4, _dirty_range(data), data)),
        ARGSZ.map(lambda argsz: m.DirtyPagesReply(4, argsz=argsz)),
    ),
    m.RegionWriteMultiRequest: st.lists(SMALL_WRITE, max_size=5).map(tuple).map(m.RegionWriteMultiRequest),
    m.RegionWriteMultiReply: st.builds(m.RegionWriteMultiReply, U64),
    m.DeviceFeatureRequest: st.builds(m.DeviceFeatureRequest, U32, DATA, ARGSZ),
    m.DeviceFeatureReply: st.builds(m.DeviceFeatureReply, U32, DATA, ARGSZ),
    m.FeatureMigration: st.builds(m.FeatureMigration, U64),
    m.FeatureMigState: st.builds(m.FeatureMigState, U32, U32),
    m.DmaLoggingControl: st.builds(
        m.DmaLoggingControl, U64, st.lists(st.builds(m.DmaLoggingRange, U64, U64), max_size=4).map(tuple)
    ),
    m.DmaLoggingReport: st.builds(m.DmaLoggingReport, U64, U64, U64, DATA),
    m.MigDataReadRequest: st.builds(m.MigDataReadRequest, U32, ARGSZ),
    m.MigDataReadReply: st.builds(m.MigDataReadReply, DATA, ARGSZ),
    m.MigDataWriteRequest: st.builds(m.MigDataWriteRequest, DATA, ARGSZ),
    m.MigDataWriteReply: st.builds(m.MigDataWriteReply),
}
ANY_VALUE = st.one_of(*VALUES.values())


def test_every_layout_has_a_strategy_here() -> None:
    assert set(VALUES) == set(layouts.LAYOUTS)


@given(ANY_VALUE)
def test_what_is_built_parses_to_the_same(value: m.Structure) -> None:
    wire = layouts.build(value)
    parsed = layouts.parse(type(value), wire)
    assert parsed == value
    assert layouts.build(parsed) == wire


@given(ANY_VALUE, DATA)
def test_codec_and_layouts_agree_on_bodies(value: m.Structure, noise: bytes) -> None:
    wire = layouts.build(value)
    if isinstance(value, m.Message):
        assert b"".join(codec.build_parts(value)) == wire
        for body in (wire, wire + noise, wire[: len(noise)], noise):
            assert _outcome(codec.parse, type(value), body) == _outcome(layouts.parse, type(value), body)


def _outcome(parse: Callable[[Any, bytes], object], kind: type[m.Structure], body: bytes) -> object:
    try:
        return parse(kind, body)
    except RemoteProtocolError as error:
        return error.errno


@given(st.sampled_from(sorted(VALUES, key=lambda kind: kind.__name__)), st.binary(max_size=200))
def test_random_bytes_parse_or_raise_a_remote_error(kind: type[m.Structure], body: bytes) -> None:
    outcome = _outcome(layouts.parse, kind, body)
    assert outcome == errno.EINVAL or isinstance(outcome, kind)


@given(ANY_VALUE, st.data())
def test_mutated_bytes_parse_or_raise_a_remote_error_and_codec_agrees(
    value: m.Structure, data: st.DataObject
) -> None:
    wire = bytearray(layouts.build(value))
    for _ in range(data.draw(st.integers(1, 3))):
        if wire:
            wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    outcome = _outcome(layouts.parse, type(value), bytes(wire))
    assert outcome == errno.EINVAL or isinstance(outcome, type(value))
    if isinstance(value, m.Message):
        assert _outcome(codec.parse, type(value), bytes(wire)) == outcome


@pytest.mark.parametrize(
    "reply",
    [
        m.DmaUnmapReply(1, 0, 4096, m.Bitmap(4096, 8), bytes(8)),
        m.DeviceGetInfoReply(3, 9, 5),
        m.DeviceGetRegionInfoReply(
            7, 0, 4096, 0, (m.TypeCapability(3, 1), m.SparseMmapCapability((m.SparseMmapArea(0, 9),)))
        ),
        m.DeviceGetRegionIoFdsReply(0, (m.Ioeventfd(0, 4, 0), m.IoeventfdShadow(0, 4, 0))),
        m.DeviceGetIrqInfoReply(1, 0, 1),
        m.DirtyPagesReply(4, _dirty_range(b"12345678"), b"12345678"),
        m.DeviceFeatureReply(1, b"12345678"),
        m.DeviceFeatureReply(1, b"1", more=(b"234", b"", b"5678")),
        m.MigDataReadReply(b"123"),
        m.MigDataReadReply(b"1", more=(b"2", b"", b"3")),
    ],
    ids=lambda reply: type(reply).__name__,
)
def test_argsz_left_out_is_the_size_of_the_reply(reply: Any) -> None:
    assert reply.argsz == len(layouts.build(reply))
    assert b"".join(codec.build_parts(reply)) == layouts.build(reply)


# Bytes written down from the specification's tables; the byte order is the host's, here little-endian.
KNOWN = [
    (m.Header(1, 9, 32, 0x10, 0), "0100 0900 20000000 10000000 00000000"),
    (
        m.DmaMapRequest(3, 0x1000, 0xC0000, 0x2000),
        "20000000 03000000 0010000000000000 00000c0000000000 0020000000000000",
    ),
    (
        m.DirtyPagesRequest(4, m.BitmapRange(0, 0x8000, m.Bitmap(0x1000, 8))),
        "30000000 04000000 0000000000000000 0080000000000000 0010000000000000 0800000000000000",
    ),
    (
        m.DeviceGetRegionInfoReply(5, 9, 0x3000, 0, (m.TypeCapability(3, 1),)),
        "30000000 0d000000 09000000 20000000 0030000000000000 0000000000000000"
        "0200 0100 00000000 03000000 01000000",
    ),
    (
        m.DeviceGetRegionIoFdsReply(0, (m.Ioeventfd(0x10, 4, 0, 1, 0xAB),)),
        "38000000 00000000 00000000 01000000 1000000000000000 0400000000000000"
        "00000000 00000000 01000000 00000000 ab00000000000000",
    ),
    (m.DeviceSetIrqsRequest(0x24, 2, 1, 3), "14000000 24000000 02000000 01000000 03000000"),
    (m.RegionWriteRequest(8, 2, b"\x11\x22"), "0800000000000000 02000000 02000000 1122"),
    (m.DmaWriteRequest(8, b"\x11\x22"), "0800000000000000 0200000000000000 1122"),
    (
        m.RegionWriteMultiRequest((m.RegionWrite(4, 1, b"\xff"),)),
        "0100000000000000 0400000000000000 01000000 01000000 ff00000000000000",
    ),
    (m.DeviceFeatureRequest(0x20002, b"\x01" + bytes(7)), "10000000 02000200 0100000000000000"),
    (m.MigDataWriteRequest(b"\xaa"), "09000000 01000000 aa"),
]


@pytest.mark.skipif(sys.byteorder == "big", reason="the expected bytes are little-endian")
@pytest.mark.parametrize(("value", "wire"), KNOWN)
def test_known_bytes(value: m.Structure, wire: str) -> None:
    assert layouts.build(value) == bytes.fromhex(wire)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (m.Header(0, 0, 0), c.HEADER_SIZE),
        (m.DmaMapRequest(0, 0, 0, 0), c.DMA_MAP_SIZE),
        (m.DmaUnmapRequest(0, 0, 0), c.DMA_UNMAP_SIZE),
        (m.DeviceGetInfoRequest(), c.DEVICE_INFO_SIZE),
        (m.DeviceGetRegionInfoRequest(0), c.REGION_INFO_SIZE),
        (m.DeviceGetRegionIoFdsRequest(0), c.REGION_IO_FDS_SIZE),
        (m.DeviceGetIrqInfoRequest(0), c.IRQ_INFO_SIZE),
        (m.DeviceSetIrqsRequest(0x21, 0, 0, 0), c.IRQ_SET_SIZE),
        (m.DirtyPagesRequest(1), c.DIRTY_PAGES_SIZE),
        (m.DeviceFeatureRequest(0), c.DEVICE_FEATURE_SIZE),
        (m.MigDataReadRequest(0), c.MIG_DATA_SIZE),
    ],
)
def test_sizes_in_constants_are_those_of_the_layouts(value: m.Structure, size: int) -> None:
    assert len(layouts.build(value)) == size


def test_a_payload_is_neither_copied_when_parsed_nor_when_built() -> None:
    body = bytearray(layouts.build(m.MigDataWriteRequest(b"abc")))
    view = layouts.parse(m.MigDataWriteRequest, body).data
    body[8:9] = b"X"
    assert view == b"Xbc"
    assert layouts.build_parts(m.MigDataWriteRequest(view))[1] is view


def test_a_body_may_be_longer_than_its_structure() -> None:
    longer = layouts.build(m.DeviceGetRegionInfoRequest(3)) + bytes(16)
    assert layouts.parse(m.DeviceGetRegionInfoRequest, longer).index == 3


@pytest.mark.parametrize("count", [8, 4])
def test_the_dma_write_reply_of_every_known_peer(count: int) -> None:
    wire = (5).to_bytes(8, sys.byteorder) + (7).to_bytes(count, sys.byteorder)
    assert layouts.parse(m.DmaWriteReply, wire) == m.DmaWriteReply(5, 7)
    assert layouts.parse(m.DmaWriteReply, b"") == m.DmaWriteReply()


def test_plain_ioeventfds_in_long_entries_have_datamatch_at_the_end() -> None:
    shadow = m.IoeventfdShadow(0, 4, 1, 0, 2, 8, 99)
    reply = m.DeviceGetRegionIoFdsReply(0, (m.Ioeventfd(0, 4, 0, 1, 0xAB), shadow))
    wire = layouts.build(reply)
    assert len(wire) == 16 + 2 * 48
    assert wire[16 + 40 : 16 + 48] == (0xAB).to_bytes(8, sys.byteorder)


def _region_info(cap_offset: int, tail: bytes) -> bytes:
    wire = bytearray(layouts.build(m.DeviceGetRegionInfoReply(8, 0, 0)) + tail)
    wire[12:16] = cap_offset.to_bytes(4, sys.byteorder)
    return bytes(wire)


def _capability(number: int, following: int, data: bytes = b"") -> bytes:
    return struct.pack("=HHI", number, 1, following) + data


@pytest.mark.parametrize(
    ("cap_offset", "tail"),
    [
        (8, b""),
        (32, b""),
        (0xFFFFFFFF, b""),
        (32, _capability(9, 32)),
        (32, _capability(9, 36)),
        (32, _capability(9, 0xFFFFFFF8)),
        (40, _capability(9, 0) + _capability(9, 32)),
        (32, _capability(c.RegionInfoCap.SPARSE_MMAP, 0, b"\xff" * 8)),
        (32, _capability(c.RegionInfoCap.SPARSE_MMAP, 0, b"\2\0\0\0" + bytes(20))),
        (32, _capability(c.RegionInfoCap.TYPE, 0, b"\1\0\0\0")),
    ],
)
def test_a_bad_capability_chain_is_refused(cap_offset: int, tail: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="DeviceGetRegionInfoReply"):
        layouts.parse(m.DeviceGetRegionInfoReply, _region_info(cap_offset, tail))


BAD = [
    (m.DmaMapRequest, bytes(31), "size"),
    (m.DmaUnmapRequest, b"\0\0\0\0\1\0\0\0" + bytes(16), "bitmap"),
    (m.DeviceSetIrqsRequest, bytes(20), "exactly one DATA"),
    (m.DeviceSetIrqsRequest, bytes(4) + b"\x03" + bytes(15), "exactly one DATA"),
    (m.DeviceSetIrqsRequest, bytes(4) + b"\x01" + bytes(15), "exactly one ACTION"),
    (m.DeviceSetIrqsRequest, bytes(4) + b"\x22" + bytes(11) + b"\xff" * 4, "data"),
    (m.RegionWriteRequest, bytes(12) + b"\2\0\0\0" + b"x", "count"),
    (m.RegionWriteRequest, bytes(12) + b"\2\0\0\0" + b"xyz", "count"),
    (m.DmaWriteRequest, bytes(8) + b"\xff" * 8, "count"),
    (m.RegionWriteMultiRequest, b"\xff" * 8 + bytes(24), "writes"),
    (m.RegionWriteMultiRequest, b"\1" + bytes(7) + bytes(12) + b"\t\0\0\0" + bytes(8), "count"),
    (m.DirtyPagesRequest, bytes(8), "flags"),
    (m.DirtyPagesRequest, bytes(4) + b"\5\0\0\0" + bytes(32), "flags"),
    (m.DirtyPagesRequest, bytes(4) + b"\4\0\0\0" + bytes(31), "range"),
    (m.DmaLoggingControl, bytes(8) + b"\xff\xff\xff\xff" + bytes(4), "num_ranges"),
    (m.MigDataWriteRequest, bytes(4) + b"\1\0\0\0", "size"),
    (m.DeviceGetRegionIoFdsReply, b"\x38" + bytes(11) + b"\2\0\0\0" + bytes(80), "argsz"),
    (m.DeviceGetRegionIoFdsReply, b"\x38" + bytes(11) + b"\1\0\0\0" + bytes(20) + b"\7" + bytes(19), "type"),
]


@pytest.mark.skipif(sys.byteorder == "big", reason="the bytes are little-endian")
@pytest.mark.parametrize(("kind", "body", "field"), BAD)
def test_bad_bytes_give_a_reason_that_names_structure_and_field(
    kind: type[m.Structure], body: bytes, field: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=rf"{kind.__name__}.*{field}") as caught:
        layouts.parse(kind, body)
    assert caught.value.errno == errno.EINVAL


def test_what_cannot_be_built_is_a_local_error() -> None:
    ranges = tuple(m.DmaLoggingRange(0, 1) for _ in range(5000))
    with pytest.raises(LocalProtocolError, match=r"DmaLoggingControl\.num_ranges"):
        layouts.build(m.DmaLoggingControl(4096, ranges))
