# SPDX-License-Identifier: BSD-3-Clause
"""A session without a socket: what it sends and when, and what it leaves for later."""

import errno
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol import capabilities, codec
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import HEADER_SIZE, Command, Role
from vfio_user.protocol.errors import StreamLost
from vfio_user.protocol.events import ErrorReply, Reply, Request
from vfio_user.server.host import ServerHost
from vfio_user.server.session import Session
from vfio_user.transport.channel import JOIN_LIMIT
from vfio_user.transport.poller import Poller

READ = codec.pack_region_read(1, 0, 0, 4)
BIG_READ = codec.pack_region_read(1, 0, 0, 4096)


class Wire:
    """Takes what a session sends. `room`: how many bytes, until it is congested."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.room = 1 << 30

    @property
    def congested(self) -> bool:
        return sum(map(len, self.sent)) > self.room

    def send(self, buffers: Sequence[Buffer], fds: Sequence[int] = (), *, lasting: bool = False) -> None:
        self.sent.append(b"".join(buffers))


class Bench:
    """A scratch device, a session, and a client's connection that understands what is sent."""

    def __init__(self, poller: Poller) -> None:
        self.host = ServerHost(poller)
        self.device = Scratch(self.host)
        self.host.install(self.device)
        self.device.reset()
        self.wire = Wire()
        self.session = Session(self.device, self.host, self.wire, capabilities.Version())
        self.client = Connection(Role.CLIENT)

    def receive(self, data: bytes) -> None:
        connection = self.session.connection
        connection.get_buffer(len(data))[: len(data)] = data
        self.session.receive(len(data), ())

    def ask(self, body: m.Message) -> int:
        message_id, outgoing = self.client.request(body)
        self.receive(b"".join(outgoing.buffers))
        return message_id

    def answers(self) -> list[Request | Reply | ErrorReply]:
        """What the client has got since the last call."""
        events = self.client.feed(b"".join(self.wire.sent))
        self.wire.sent.clear()
        assert all(isinstance(event, Request | Reply | ErrorReply) for event in events)
        return events  # type: ignore[return-value]  # just checked

    def close(self) -> None:
        self.session.close()
        self.client.close()
        self.host.detach()
        self.host.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with closing(Poller()) as poller, closing(Bench(poller)) as bench:
        bench.ask(capabilities.propose(capabilities.Version()))
        (reply,) = bench.answers()
        assert isinstance(reply, Reply)
        yield bench


def count_replies(bench: Bench) -> int:
    """How many messages have been sent."""
    data, count = b"".join(bench.wire.sent), 0
    while data:
        (size,) = struct.unpack_from("=I", data, 4)
        data, count = data[size:], count + 1
    return count


def test_the_replies_to_what_came_at_once_go_at_once(bench: Bench) -> None:
    bench.receive(READ * 100)
    assert len(bench.wire.sent) == 1
    assert count_replies(bench) == 100


def test_no_send_joins_more_than_the_kernel_keeps_whole(bench: Bench) -> None:
    bench.receive(BIG_READ * 50)
    assert count_replies(bench) == 50
    assert max(map(len, bench.wire.sent)) <= JOIN_LIMIT
    for part in bench.wire.sent:
        assert len(part) % (HEADER_SIZE + 16 + 4096) == 0


def test_what_a_client_does_not_read_is_not_worked_out(bench: Bench) -> None:
    bench.receive(READ)
    bench.wire.sent.clear()
    bench.wire.room = 100_000
    bench.receive(BIG_READ * 2000)
    first = count_replies(bench)
    assert 20 < first < 700, "of 2000: a look at the backlog every 16 KiB of requests"
    total = 0
    while sent := count_replies(bench):
        total += sent
        bench.wire.sent.clear()
        bench.session.serve()
    assert total == 2000


def test_large_replies_are_not_worked_out_either(bench: Bench) -> None:
    """GET_REGION_INFO goes the long way, one message at a time."""
    bench.wire.room = 1000
    request = b"".join(bench.client.request(m.DeviceGetRegionInfoRequest(0))[1].buffers)
    bench.receive(request * 2000)
    assert count_replies(bench) <= 2 * 256
    bench.wire.room = 1 << 30
    bench.session.serve()
    assert count_replies(bench) == 2000


def test_serving_again_with_nothing_there_does_nothing(bench: Bench) -> None:
    for _ in range(3):
        bench.session.serve()
    assert bench.wire.sent == []


def test_replies_to_what_came_before_a_broken_header_are_sent(bench: Bench) -> None:
    with pytest.raises(StreamLost):
        bench.receive(READ + READ + bytes(16))
    assert count_replies(bench) == 2


def test_the_device_runs_from_the_first_access_on(bench: Bench) -> None:
    bench.ask(m.DeviceGetInfoRequest())
    bench.ask(m.DmaMapRequest(3, 0, 0, 4096))
    assert not bench.host.running
    bench.ask(m.RegionReadRequest(0, 0, 4))
    assert bench.host.running


def test_a_refused_command_does_not_make_the_device_run(bench: Bench) -> None:
    bench.receive(codec.pack_header(9, 99, 16))
    bench.receive(codec.pack_header(9, Command.DEVICE_RESET, 16, 0x3))
    assert not bench.host.running


@pytest.mark.parametrize("data", [None, "text", b"", b"12345", 4])
def test_a_region_that_breaks_its_contract_is_an_io_error(bench: Bench, data: object) -> None:
    words: Any = bench.device.registers.background
    words.read = lambda offset, count: data
    for _ in range(2):  # by the long way, then by the short one
        bench.ask(m.RegionReadRequest(0, 0, 4))
        (answer,) = bench.answers()
        assert isinstance(answer, ErrorReply)
        assert answer.error == errno.EIO
