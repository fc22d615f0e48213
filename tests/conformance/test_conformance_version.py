# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "VFIO_USER_VERSION"."""

import errno
import json
import struct

import pytest

from conformance import wire
from conformance.engines import Served
from conformance.raw import RawClient, connect

QEMU = (
    b'{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"max_data_xfer_size":1048576,'
    b'"migration":{"max_bitmap_size":268435456,"pgsize":4096},"write_multiple":true}}\0'
)


async def propose(scratch: Served, body: bytes) -> tuple[int, int, bytes]:
    """Major, minor and version data of the reply."""
    async with connect(scratch.path, negotiated=False) as raw:
        reply = (await raw.call(wire.VERSION, body)).ok
        await raw.expect_alive()
    return (*struct.unpack_from("=HH", reply), reply[4:])


@pytest.mark.parametrize(("proposed", "agreed"), [(0, 0), (1, 1), (2, 1), (0xFFFF, 1)])
async def test_the_minor_version_is_the_smaller_of_the_two(
    scratch: Served, proposed: int, agreed: int
) -> None:
    major, minor, _ = await propose(scratch, wire.version({}, minor=proposed))
    assert (major, minor) == (0, agreed)


@pytest.mark.parametrize("major", [1, 2, 0xFFFF])
async def test_another_major_version_is_refused(scratch: Served, major: int) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        assert (await raw.call(wire.VERSION, wire.version({}, major=major))).errno == errno.EINVAL
        await raw.negotiate()


@pytest.mark.parametrize(
    "text",
    [b"", b"{}\0", b'{"capabilities":{}}\0', b'{"other": [1, 2], "capabilities":{"unknown": null}}\0', QEMU],
)
async def test_version_data_and_capabilities_are_optional(scratch: Served, text: bytes) -> None:
    _, _, data = await propose(scratch, wire.version_text(text))
    assert len(data) <= len(text), "QEMU refuses a reply that is longer than its request"
    if data:
        assert data.endswith(b"\0")
        assert isinstance(json.loads(data[:-1]), dict)


async def test_qemu_gets_our_limits(scratch: Served) -> None:
    major, minor, data = await propose(scratch, wire.version_text(QEMU, minor=0))
    assert (major, minor) == (0, 0)
    capabilities = json.loads(data.rstrip(b"\0"))["capabilities"]
    assert capabilities == {"max_msg_fds": 16, "migration": {"pgsize": 4096}}


BAD_TEXTS = {
    "no NUL": b'{"capabilities":{}}',
    "no JSON": b"capabilities\0",
    "cut": b'{"capabilities":\0',
    "empty": b"\0",
    "not UTF-8": b'{"capabilities":{"\xff":1}}\0',
    "list": b"[]\0",
    "number": b"17\0",
    "null": b"null\0",
    "capabilities no object": b'{"capabilities":[]}\0',
    "string for a number": b'{"capabilities":{"max_msg_fds":"16"}}\0',
    "fraction": b'{"capabilities":{"max_msg_fds":1.5}}\0',
    "boolean for a number": b'{"capabilities":{"max_msg_fds":true}}\0',
    "number for a boolean": b'{"capabilities":{"write_multiple":1}}\0',
    "negative": b'{"capabilities":{"max_dma_maps":-1}}\0',
    "zero": b'{"capabilities":{"max_data_xfer_size":0}}\0',
    "beyond 64 bits": b'{"capabilities":{"max_data_xfer_size":18446744073709551616}}\0',
    "very many digits": b'{"capabilities":{"max_data_xfer_size":' + b"9" * 5000 + b"}}\0",
    "no number": b'{"capabilities":{"max_dma_maps":NaN}}\0',
    "infinite": b'{"capabilities":{"max_dma_maps":1e999}}\0',
    "no common page size": b'{"capabilities":{"pgsizes":8192}}\0',
    "page size no power of two": b'{"capabilities":{"migration":{"pgsize":3}}}\0',
    "migration no object": b'{"capabilities":{"migration":4096}}\0',
    "key twice": b'{"capabilities":{},"capabilities":{}}\0',
    "very deep": b'{"capabilities":' + b"[" * 8000 + b"\0",
    "very long": b'{"capabilities":{},"x":"' + b"x" * 20000 + b'"}\0',
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
async def test_version_data_that_is_wrong_is_refused(scratch: Served, text: bytes) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        assert (await raw.call(wire.VERSION, wire.version_text(text))).errno == errno.EINVAL
        assert (await raw.call(wire.GET_INFO, wire.get_info())).errno == errno.EINVAL
        await raw.negotiate()


async def test_version_twice_is_refused_and_changes_nothing(raw: RawClient) -> None:
    body = wire.version({"max_data_xfer_size": 4})
    assert (await raw.call(wire.VERSION, body)).errno == errno.EINVAL
    await raw.command(wire.VERSION, body, flags=wire.NO_REPLY)
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4096))).ok


async def test_version_without_a_body_is_refused(scratch: Served) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        for body in (b"", b"\0", b"\0\0\0"):
            assert (await raw.call(wire.VERSION, body)).errno == errno.EINVAL
        await raw.negotiate()


async def test_version_without_reply_is_not_answered(scratch: Served) -> None:
    """What the two sides agree on is in the reply alone."""
    async with connect(scratch.path, negotiated=False) as raw:
        for body in (wire.version({}), b""):
            await raw.command(wire.VERSION, body, flags=wire.NO_REPLY)
            assert (await raw.call(wire.GET_INFO, wire.get_info())).errno == errno.EINVAL
        await raw.negotiate()


async def test_the_larger_of_two_limits_is_not_demanded(scratch: Served) -> None:
    """A client may take more than we send, and we keep to our own limits."""
    huge = {"max_msg_fds": 1 << 60, "max_data_xfer_size": (1 << 64) - 1, "max_dma_maps": (1 << 64) - 1}
    async with connect(scratch.path, negotiated=False) as raw:
        await raw.negotiate(huge)
        assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4096))).ok
