# SPDX-License-Identifier: BSD-3-Clause
"""Version negotiation: what real clients send, what a bad one may send, what fits in the reply."""

from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.protocol import capabilities as caps
from vfio_user.protocol.capabilities import Capabilities, Migration, Version
from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.protocol.messages import VersionReply, VersionRequest

QEMU = VersionRequest(
    0,
    0,
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, '
    b'"max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, '
    b'"write_multiple": true}}\0',
)
SERVER = Version(
    capabilities=Capabilities(
        max_msg_fds=253,
        max_data_xfer_size=1 << 21,
        pgsizes=0xFFFFF000,
        migration=Migration(),
        write_multiple=True,
    )
)


def _text(reply: VersionReply) -> dict[str, object]:
    data = bytes(reply.data)
    assert data.endswith(b"\0")
    result = json.loads(data[:-1])["capabilities"]
    assert isinstance(result, dict)
    return result


def test_qemu_gets_the_smaller_minor_and_a_reply_that_is_short_enough() -> None:
    session, reply = caps.accept(SERVER, QEMU)
    assert (reply.major, reply.minor, session.minor) == (0, 0, 0)
    assert len(reply.data) <= 190 <= len(QEMU.data)
    assert _text(reply) == {
        "max_msg_fds": 253,
        "max_data_xfer_size": 1 << 21,
        "pgsizes": 0xFFFFF000,
        "migration": {"pgsize": 4096},
        "write_multiple": True,
    }
    assert session.max_send_fds == 16
    assert session.max_receive_fds == 253
    assert session.max_data_xfer_size == 1 << 20
    assert session.pgsizes == 4096
    assert session.migration == Migration()
    assert session.write_multiple


def test_write_multiple_is_not_advertised_unless_asked_to() -> None:
    session, reply = caps.accept(Version(), QEMU)
    assert not session.write_multiple
    assert _text(reply) == {}


def test_only_what_the_client_proposed_is_answered() -> None:
    _, reply = caps.accept(
        SERVER, VersionRequest(0, 1, b'{"capabilities":{"max_msg_fds":8}}' + b" " * 99 + b"\0")
    )
    assert set(_text(reply)) == {"max_msg_fds", "max_data_xfer_size", "pgsizes"}


def test_keys_are_left_out_in_the_stated_order_until_the_reply_fits() -> None:
    own = Version(capabilities=Capabilities(8, 4096, 10, 0x3000, Migration(8192, 99), True))
    client = b'{"capabilities":{"migration":{},"write_multiple":true}}'
    gone: list[str] = []
    before = caps.propose(own).data
    for room in range(len(before), len(client), -1):
        reply = caps.accept(own, VersionRequest(0, 1, client.ljust(room - 1) + b"\0"))[1]
        assert len(reply.data) <= room
        keys = set(_text(reply))
        gone += [key for key in caps.parse(before).__slots__ if key not in keys and key not in gone]
    assert gone == ["write_multiple", "max_dma_maps", "pgsizes", "max_msg_fds", "migration"]


@pytest.mark.parametrize(
    ("request_data", "reply_data"),
    [(b"", b""), (b"{}\0", b"{}\0"), (b'{"capabilities": {} }\0', b'{"capabilities":{}}\0')],
)
def test_the_shortest_requests_get_the_shortest_replies(request_data: bytes, reply_data: bytes) -> None:
    session, reply = caps.accept(SERVER, VersionRequest(0, 1, request_data))
    assert reply.data == reply_data
    assert session.max_send_fds == 1
    assert session.migration is None


@given(st.integers(0, 400), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_the_reply_is_never_longer_than_the_request(room: int, fds: int, maps: int) -> None:
    own = Version(capabilities=Capabilities(fds, 1 + maps // 2, 1 + maps // 3, 4096, Migration(), True))
    data = b"{}".ljust(room) + b"\0" if room > 1 else b""
    assert len(caps.accept(own, VersionRequest(0, 1, data))[1].data) <= len(data)


def test_client_and_server_agree() -> None:
    own = Version(capabilities=Capabilities(16, 65536, 100, 0x201000, Migration(65536, 4096), True))
    request = caps.propose(own)
    server, reply = caps.accept(SERVER, request)
    client = caps.confirm(own, reply)
    assert (client.max_send_fds, client.max_receive_fds) == (server.max_receive_fds, server.max_send_fds)
    for name in ("minor", "max_data_xfer_size", "max_dma_maps", "pgsizes", "migration", "write_multiple"):
        assert getattr(client, name) == getattr(server, name), name
    assert client.migration == Migration(4096, 4096)
    assert client.max_message_size > client.max_data_xfer_size


@given(
    st.builds(
        Capabilities,
        st.integers(0, 999),
        st.integers(1, 1 << 40),
        st.integers(1, 1 << 40),
        st.integers(1, 1 << 40),
        st.one_of(
            st.none(), st.builds(Migration, st.integers(0, 63).map(lambda n: 1 << n), st.integers(1, 1 << 40))
        ),
        st.booleans(),
    )
)
def test_a_proposal_parses_to_the_same(own: Capabilities) -> None:
    assert caps.parse(caps.propose(Version(capabilities=own)).data) == own


def test_unknown_keys_and_bytes_after_the_nul_are_ignored() -> None:
    text = (
        b'{"x":[1.5,null],"capabilities":{"y":{},"twin_socket":{"supported":true},"max_msg_fds":3}}\0junk\0'
    )
    assert caps.parse(text) == Capabilities(max_msg_fds=3)


def _capability(text: str) -> bytes:
    return b'{"capabilities":{%s}}\0' % text.encode()


BAD = [
    (b"{", "NUL"),
    (b'{"capabilities":{}}', "NUL"),
    (b"\0", "not JSON"),
    (b"{\0", "not JSON"),
    (b"\xff\xfe\0", "not JSON"),
    (b"NaN\0", "not JSON"),
    (b"[]\0", "not an object"),
    (b"null\0", "not an object"),
    (b'"text"\0', "not an object"),
    (b"[" * 8000 + b"\0", "nested|JSON"),
    (b'{"a":' * 2500 + b"1" + b"}" * 2500 + b"\0", "nested"),
    (b'{"a":' + b"9" * 5000 + b"}\0", "not JSON"),
    (b" " * caps.MAX_TEXT + b"{}\0", "more than"),
    (b'{"capabilities":null}\0', "capabilities is not an object"),
    (b'{"capabilities":{},"capabilities":{}}\0', "twice"),
    (_capability('"max_msg_fds":1,"max_msg_fds":2'), "twice"),
    (_capability('"max_msg_fds":true'), "max_msg_fds is not a whole number"),
    (_capability('"max_msg_fds":"1"'), "max_msg_fds is not a whole number"),
    (_capability('"max_msg_fds":1.0'), "max_msg_fds is not a whole number"),
    (_capability('"max_msg_fds":null'), "max_msg_fds is not a whole number"),
    (_capability('"max_msg_fds":-1'), "max_msg_fds is out of range"),
    (_capability('"max_data_xfer_size":0'), "max_data_xfer_size is out of range"),
    (_capability('"max_data_xfer_size":18446744073709551616'), "max_data_xfer_size is out of range"),
    (_capability('"max_dma_maps":1e3'), "max_dma_maps is not a whole number"),
    (_capability('"pgsizes":[]'), "pgsizes is not a whole number"),
    (_capability('"pgsizes":8192'), "no page size"),
    (_capability('"write_multiple":1'), "write_multiple is not true or false"),
    (_capability('"migration":4096'), "migration is not an object"),
    (_capability('"migration":{"pgsize":4097}'), "migration.pgsize is not a power of two"),
    (_capability('"migration":{"pgsize":0}'), "migration.pgsize is out of range"),
    (_capability('"migration":{"max_bitmap_size":false}'), "migration.max_bitmap_size is not a whole number"),
]


@pytest.mark.parametrize(("data", "reason"), BAD, ids=[data[:40].decode("latin-1") for data, _ in BAD])
def test_bad_version_data_is_answered_einval(data: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"VERSION: .*({reason})") as caught:
        caps.accept(Version(), VersionRequest(0, 1, data))
    assert caught.value.errno == errno.EINVAL


def test_another_major_version_is_refused_by_both_sides() -> None:
    with pytest.raises(RemoteProtocolError, match="major version 1"):
        caps.accept(Version(), VersionRequest(1, 0))
    with pytest.raises(RemoteProtocolError, match="major version 2"):
        caps.confirm(Version(), VersionReply(2, 0))


def test_a_client_refuses_a_minor_version_above_its_own() -> None:
    with pytest.raises(RemoteProtocolError, match="minor version 2"):
        caps.confirm(Version(minor=1), VersionReply(0, 2))


@given(st.binary(max_size=200))
def test_random_data_never_raises_anything_else(data: bytes) -> None:
    try:
        caps.parse(data)
    except RemoteProtocolError as error:
        assert "VERSION" in error.reason  # noqa: PT017 - most random data is wrong, and some is not
