# SPDX-License-Identifier: BSD-3-Clause
"""The struct twins of the hot messages give the same bytes as the declared layouts, both ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.protocol import codec, layouts
from vfio_user.protocol import constants as c
from vfio_user.protocol import messages as m
from vfio_user.protocol.errors import LocalProtocolError, RemoteProtocolError

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
DATA = st.binary(max_size=64)


def _whole(message_id: int, command: int, flags: int, body: m.Message) -> bytes:
    """A message as the layouts declare it."""
    data = layouts.build(body)
    return layouts.build(m.Header(message_id, command, c.HEADER_SIZE + len(data), flags)) + data


@given(U16, U16, U32, U32, U32)
def test_header(message_id: int, command: int, size: int, flags: int, error: int) -> None:
    numbers = (message_id, command, size, flags, error)
    wire = layouts.build(m.Header(*numbers))
    assert codec.pack_header(*numbers) == wire == codec.HEADER.pack(*numbers)
    assert codec.unpack_header(b"??" + wire, 2) == numbers


@given(U16, U16, U32)
def test_error_reply(message_id: int, command: int, errno: int) -> None:
    wire = layouts.build(m.Header(message_id, command, c.HEADER_SIZE, 0x21, errno))
    assert codec.pack_error(message_id, command, errno) == wire


@given(U16, U64, U32, U32, DATA, st.booleans())
def test_region_access(i: int, offset: int, region: int, count: int, data: bytes, posted: bool) -> None:
    read, write, flags = c.Command.REGION_READ, c.Command.REGION_WRITE, 0x10 if posted else 0
    for wire, expected in (
        (
            codec.pack_region_read(i, offset, region, count),
            (i, read, 0, m.RegionReadRequest(offset, region, count)),
        ),
        (
            codec.pack_region_read_reply(i, offset, region, data),
            (i, read, 1, m.RegionReadReply(offset, region, data)),
        ),
        (
            codec.pack_region_write(i, offset, region, data, no_reply=posted),
            (i, write, flags, m.RegionWriteRequest(offset, region, data)),
        ),
        (
            codec.pack_region_write_reply(i, offset, region, count),
            (i, write, 1, m.RegionWriteReply(offset, region, count)),
        ),
    ):
        assert wire == _whole(*expected)
        header, body = layouts.parse(m.Header, wire), expected[3]
        number = len(body.data) if isinstance(body, m.RegionReadReply | m.RegionWriteRequest) else count
        fields = (header.message_id, header.command, header.size, header.flags, header.error)
        assert codec.unpack_region_access(b"?" + wire, 1) == (*fields, offset, region, number)


@given(U16, U64, U64, DATA, st.booleans())
def test_dma_access(i: int, address: int, count: int, data: bytes, posted: bool) -> None:
    read, write, flags = c.Command.DMA_READ, c.Command.DMA_WRITE, 0x10 if posted else 0
    for wire, expected in (
        (codec.pack_dma_read(i, address, count), (i, read, 0, m.DmaReadRequest(address, count))),
        (codec.pack_dma_read_reply(i, address, data), (i, read, 1, m.DmaReadReply(address, data))),
        (
            codec.pack_dma_write(i, address, data, no_reply=posted),
            (i, write, flags, m.DmaWriteRequest(address, data)),
        ),
        (codec.pack_dma_write_reply(i, address, count), (i, write, 1, m.DmaWriteReply(address, count))),
    ):
        assert wire == _whole(*expected)
        header, body = layouts.parse(m.Header, wire), expected[3]
        number = len(body.data) if isinstance(body, m.DmaReadReply | m.DmaWriteRequest) else count
        fields = (header.message_id, header.command, header.size, header.flags, header.error)
        assert codec.unpack_dma_access(b"?" + wire, 1) == (*fields, address, number)


@given(U16, st.integers(0, (1 << 32) - 25), DATA)
def test_mig_data(i: int, count: int, data: bytes) -> None:
    wire = codec.pack_mig_data_read(i, count)
    assert wire == _whole(i, c.Command.MIG_DATA_READ, 0, m.MigDataReadRequest(count))
    assert codec.MIG_DATA.unpack_from(wire) == (i, c.Command.MIG_DATA_READ, 24, 0, 0, 8 + count, count)
    reply = codec.pack_mig_data_read_reply_head(i, len(data)) + data
    assert reply == _whole(i, c.Command.MIG_DATA_READ, 1, m.MigDataReadReply(data))


def test_the_payload_starts_at_the_same_place_in_all_of_them() -> None:
    assert codec.REGION_ACCESS.size == codec.DMA_ACCESS.size == codec.ACCESS_SIZE == 32


def test_numbers_that_do_not_fit_are_a_local_error() -> None:
    with pytest.raises(LocalProtocolError):
        codec.pack_region_read(1 << 16, 0, 0, 4)
    with pytest.raises(LocalProtocolError):
        codec.pack_error(0, 999, -1)


@pytest.mark.parametrize("parse", [codec.parse, layouts.parse], ids=["struct", "construct"])
@pytest.mark.parametrize("surplus", [0, 1, 4096])
def test_bytes_after_the_data_of_a_migration_reply_mean_nothing(
    parse: Callable[[type[m.MigDataReadReply], bytes], m.MigDataReadReply], surplus: int
) -> None:
    """libvfio-user sends as many as were asked for."""
    body = layouts.build(m.MigDataReadReply(b"four"))
    assert parse(m.MigDataReadReply, body + bytes(surplus)) == m.MigDataReadReply(b"four")
    with pytest.raises(RemoteProtocolError):
        parse(m.MigDataReadReply, body[:-1])


def test_too_few_bytes_are_a_remote_error() -> None:
    for unpack in (codec.unpack_header, codec.unpack_region_access, codec.unpack_dma_access):
        with pytest.raises(RemoteProtocolError, match="15 bytes"):
            unpack(bytes(15))


def test_a_count_of_writes_that_wraps_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="wr_cnt"):
        codec.parse(m.RegionWriteMultiRequest, b"\xff" * 8 + bytes(24))
