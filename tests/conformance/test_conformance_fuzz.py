# SPDX-License-Identifier: BSD-3-Clause
"""Whatever a client sends, whole or in pieces, with whatever descriptors: the server lives, every command
that wants a reply gets exactly one, in order, and nothing is left behind.

The server is turned by hand on a socket pair, without an event loop, so that an example can be repeated.
"""

import array
import fcntl
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance import dirtying, moving, wire
from conformance.holdings import holdings
from conformance.models import Bells, Mappable, Nonsense, OneWay, Vectors
from vfio_user.device_models.backends import NoneBackend
from vfio_user.device_models.catalog import make_device, parse_options
from vfio_user.device_models.device import Device
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.server.engines.native import NativeServer, Settings

EXAMPLES = 20_000 if os.environ.get("VFIO_USER_SOAK") else 250
MODELS: tuple[type[Device], ...] = (Scratch, Faulty, E1000, Mappable, Bells, Vectors, OneWay, Nonsense)
SIZE_LIMIT = (1 << 20) + 4096
PAGE = 4096
TURNS = 40
"""After which the server must have answered, whatever its device is doing."""

# What is sent

U32 = st.one_of(st.integers(0, 40), st.sampled_from([4095, 4096, 1 << 20, 1 << 31, 0xFFFFFFFF]))
U64 = st.one_of(
    st.integers(0, 16).map(lambda page: page * PAGE),
    st.integers(0, 0x2000),
    st.sampled_from([1 << 32, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1]),
)
BYTES = st.binary(max_size=80)


def packed(layout: str, *fields: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.tuples(*fields).map(lambda values: struct.pack(layout, *values))


def access(region: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return packed("=QII", U64, region, U32)


def irq_flags() -> st.SearchStrategy[int]:
    kind = st.sampled_from([1, 2, 4])
    action = st.sampled_from([8, 16, 32])
    return st.one_of(st.builds(lambda k, a: k | a, kind, action), U32)


REGION = st.one_of(st.sampled_from([0, 1, 2, 7, moving.REGION]), U32)
WRITE = st.builds(wire.region_write, REGION, U64, BYTES)
BODIES: dict[int, st.SearchStrategy[bytes]] = {
    wire.VERSION: st.just(wire.version({})),
    wire.DMA_MAP: packed("=IIQQQ", st.just(32), st.sampled_from([3, 3, 1, 2, 0]), U64, U64, U64),
    wire.DMA_UNMAP: st.builds(
        lambda head, bitmap: head + bitmap,
        packed("=IIQQ", U32, st.sampled_from([0, 0, 1, 2]), U64, U64),
        packed("=QQ", U64, U64),
    ),
    wire.GET_INFO: packed("=IIII", U32, U32, U32, U32),
    wire.GET_REGION_INFO: packed("=IIIIQQ", U32, U32, REGION, U32, U64, U64),
    wire.GET_REGION_IO_FDS: packed("=IIII", U32, st.just(0), REGION, st.just(0)),
    wire.GET_IRQ_INFO: packed("=IIII", U32, U32, U32, U32),
    wire.SET_IRQS: st.builds(
        lambda head, data: head + data, packed("=IIIII", U32, irq_flags(), U32, U32, U32), BYTES
    ),
    wire.REGION_READ: access(REGION),
    wire.REGION_WRITE: WRITE,
    wire.DMA_READ: packed("=QQ", U64, U64),
    wire.DMA_WRITE: packed("=QQ", U64, U64),
    wire.RESET: st.just(b""),
    wire.DIRTY_PAGES: packed("=IIQQQQ", U32, st.one_of(st.integers(0, 5), U32), U64, U64, U64, U64),
    wire.WRITE_MULTI: st.lists(
        st.tuples(st.sampled_from([0, 1, 7]), st.integers(0, 4096), st.binary(max_size=8)), max_size=4
    ).map(wire.write_multi),
    wire.DEVICE_FEATURE: packed("=II", U32, U32),
    wire.MIG_DATA_READ: packed("=II", U32, U32),
    wire.MIG_DATA_WRITE: packed("=II", U32, U32),
}
PREFIX = struct.pack("<8sHHHB", b"vfiouser", 1, 0, 1, 7) + b"scratch"
FLAG_SETS = [moving.GET, moving.SET, moving.PROBE, moving.PROBE | moving.GET, moving.GET | moving.SET]
LOGGING_START = struct.pack("=II", 24, moving.SET | moving.LOGGING_START)
LOGGING_REPORT = struct.pack("=II", 1 << 20, moving.GET | moving.LOGGING_REPORT)
PLACES = st.integers(0, 16).map(lambda page: page * PAGE)
SIZES = st.sampled_from([PAGE, 4 * PAGE, 16 * PAGE, 1 << 40])
PAGE_SIZES = st.integers(11, 32).map(lambda shift: 1 << shift)
USEFUL = {
    # bus master on; the scratch device's doorbell; the faulty device's tasks
    wire.REGION_WRITE: st.one_of(
        st.just(wire.region_write(wire.CONFIG, wire.COMMAND_REGISTER, wire.BUS_MASTER)),
        st.just(wire.region_write(0, 0xFE0, struct.pack("<QQI", 0, PAGE, 100))),
        st.just(wire.region_write(0, 0xFF8, bytes(4))),
        st.integers(0, 8).map(lambda task: wire.region_write(0, 0x0C, struct.pack("<I", task))),
        st.integers(0, 4).map(lambda task: wire.region_write(1, 0, struct.pack("<I", task))),
        # v1: a state; a piece of a stream, and its size
        st.integers(0, 7).map(lambda state: wire.region_write(moving.REGION, 0, struct.pack("<I", state))),
        st.sampled_from([PREFIX, b"nonsense"]).map(lambda d: wire.region_write(moving.REGION, PAGE, d)),
        st.integers(0, 40).map(lambda size: wire.region_write(moving.REGION, 24, struct.pack("<Q", size))),
    ),
    wire.REGION_READ: st.sampled_from([*moving.FIELDS, (PAGE, 16)]).map(
        lambda field: wire.region_read(moving.REGION, *field)
    ),
    wire.DEVICE_FEATURE: st.one_of(
        packed("=IIII", st.just(16), st.just(moving.SET | moving.MIG_STATE), st.integers(0, 7), U32),
        packed(
            "=IIII", U32, st.sampled_from([flags | n for flags in FLAG_SETS for n in range(10)]), U32, U32
        ),
        PAGE_SIZES.map(lambda size: LOGGING_START + struct.pack("=QII", size, 0, 0)),
        st.just(struct.pack("=II", 8, moving.SET | moving.LOGGING_STOP)),
        st.builds(lambda *asked: LOGGING_REPORT + struct.pack("=QQQ", *asked), PLACES, SIZES, PAGE_SIZES),
    ),
    wire.MIG_DATA_READ: st.sampled_from([0, 1, 100, 4096, 1 << 20]).map(
        lambda size: struct.pack("=II", size + 8, size)
    ),
    wire.MIG_DATA_WRITE: st.sampled_from([b"", PREFIX, PREFIX[:10], PREFIX[10:], b"nonsense"]).map(
        lambda data: struct.pack("=II", 8, len(data)) + data
    ),
    wire.DIRTY_PAGES: st.one_of(
        st.sampled_from([dirtying.START, dirtying.START, dirtying.STOP]).map(
            lambda flag: struct.pack("=II", 8, flag)
        ),
        st.builds(dirtying.get_bitmap_body, PLACES, SIZES, PAGE_SIZES),
    ),
    wire.DMA_UNMAP: st.builds(
        lambda place, size, page_size: (
            wire.dma_unmap(place, size, wire.UNMAP_BITMAP, 4096)
            + struct.pack("=QQ", page_size, dirtying.rounded(size, page_size))
        ),
        PLACES,
        SIZES,
        PAGE_SIZES,
    ),
    wire.DMA_MAP: st.integers(0, 3).map(lambda i: wire.dma_map(4 * i * PAGE, 4 * PAGE)),
}


@dataclass(frozen=True)
class Sent:
    """A message with descriptors; `cuts` are where it is divided into several sends."""

    command: int
    body: bytes
    flags: int
    fds: tuple[str, ...]
    cuts: tuple[int, ...]
    size: int | None = None
    """In place of the true one."""

    def encode(self, message_id: int) -> bytes:
        data = wire.message(self.command, self.body, flags=self.flags, message_id=message_id)
        if self.size is None:
            return data
        return data[:4] + struct.pack("=I", self.size) + data[8:]

    @property
    def loses_the_stream(self) -> bool:
        return self.size is not None

    @property
    def is_answered(self) -> bool:
        return not self.flags & wire.NO_REPLY and self.flags & 0xF != wire.REPLY


@st.composite
def mutated(draw: st.DrawFn, body: bytes) -> bytes:
    """Mostly as it is; else cut, lengthened, or with another byte in it."""
    change = draw(st.sampled_from(["", "", "", "", "cut", "longer", "byte"]))
    place = draw(st.integers(0, max(0, len(body) - 1)))
    if change == "cut":
        return body[:place]
    if change == "longer":
        return body + draw(BYTES)
    if change == "byte" and body:
        return body[:place] + bytes([draw(st.integers(0, 255))]) + body[place + 1 :]
    return body


FDS = st.lists(st.sampled_from(["eventfd", "sealed", "unsealed", "short", "pipe"]), max_size=3)
FLAGS = st.one_of(st.sampled_from([0, 0, 0, 0, wire.NO_REPLY, wire.REPLY, wire.ERROR]), st.integers(0, 0x3F))


@st.composite
def messages(draw: st.DrawFn) -> Sent:
    command = draw(st.one_of(st.sampled_from(sorted(BODIES)), st.sampled_from([0, 19, 0xFFFF])))
    strategy = BODIES.get(command, BYTES)
    if command in USEFUL and draw(st.booleans()):
        strategy = USEFUL[command]
    body = draw(strategy.flatmap(mutated))
    fds = tuple(draw(FDS)) if draw(st.integers(0, 3)) == 0 else natural_fds(draw, command)
    cuts = tuple(sorted(draw(st.sets(st.integers(1, 15 + len(body)), max_size=3))))
    size = draw(st.sampled_from([0, 15, SIZE_LIMIT + 1])) if draw(st.integers(0, 150)) == 99 else None
    return Sent(command, body, draw(FLAGS), fds, cuts, size)


def natural_fds(draw: st.DrawFn, command: int) -> tuple[str, ...]:
    """What a client would send with the command."""
    if command == wire.DMA_MAP:
        return draw(st.sampled_from([("sealed",), ("sealed",), ("unsealed",), ()]))
    if command == wire.SET_IRQS:
        return ("eventfd",) * draw(st.integers(0, 2))
    return ()


ANSWERS = st.lists(st.sampled_from(["right", "right", "error", "short", "long", "none", "twice"]), max_size=8)

# The other end


def _memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


MAKERS: dict[str, Callable[[], int]] = {
    "eventfd": lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
    "sealed": lambda: _memfd(16 * PAGE, fcntl.F_SEAL_SHRINK),
    "unsealed": lambda: _memfd(16 * PAGE, 0),
    "short": lambda: _memfd(PAGE, fcntl.F_SEAL_SHRINK),
    "pipe": _pipe,
}


@dataclass
class Peer:
    """The client's socket, and what has come out of it."""

    sock: socket.socket
    server: NativeServer
    answers: Iterator[str]
    replies: list[tuple[int, int]] = field(default_factory=list)
    """Message id and command of each reply, in order."""
    received: bytearray = field(default_factory=bytearray)
    ended: bool = False

    def send(self, data: bytes, kinds: tuple[str, ...] = ()) -> None:
        fds = [MAKERS[kind]() for kind in kinds]
        try:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            while data and not self.ended:
                try:
                    data = data[self.sock.sendmsg([data], control) :]
                    control = []
                except BlockingIOError:
                    self.turn()
                except (BrokenPipeError, ConnectionResetError):
                    self.ended = True
        finally:
            for fd in fds:
                os.close(fd)

    def turn(self) -> None:
        """Let the server work until it rests, or as long as it may, and take what it says."""
        for _ in range(TURNS):
            busy = self.server.turn()
            if not self._receive() and not busy:
                return

    def _receive(self) -> bool:
        before = len(self.received)
        with suppress(BlockingIOError, ConnectionResetError):
            while part := self._read():
                self.received += part
            self.ended = True
        came = len(self.received) != before
        self._parse()
        return came

    def _read(self) -> bytes:
        part, control, _, _ = self.sock.recvmsg(1 << 20, socket.CMSG_SPACE(253 * 4))
        for _, _, raw in control:
            for fd in array.array("i", raw):
                os.close(fd)
        return part

    def _parse(self) -> None:
        while len(self.received) >= wire.HEADER.size:
            message_id, command, size, flags, _ = wire.HEADER.unpack_from(self.received)
            if len(self.received) < size:
                return
            body = bytes(self.received[wire.HEADER.size : size])
            del self.received[:size]
            if flags & 0xF == wire.REPLY:
                self.replies.append((message_id, command))
            else:
                self._answer(message_id, command, body)

    def _answer(self, message_id: int, command: int, body: bytes) -> None:
        assert command in (wire.DMA_READ, wire.DMA_WRITE)
        how = next(self.answers, "none")
        if how == "none":
            return
        address, count = struct.unpack_from("=QQ", body)
        size = {"short": count // 2, "long": count + 8}.get(how, min(count, 1 << 20))
        reply = wire.dma_read_reply(address, bytes(min(size, 1 << 20)))
        if command == wire.DMA_WRITE:
            reply = wire.dma_write_reply(address, size)
        error = how == "error"
        flags = wire.REPLY | (wire.ERROR if error else 0)
        data = wire.message(command, b"" if error else reply, flags=flags, message_id=message_id)
        self.send(data * (2 if how == "twice" else 1))


def make_server(model: type[Device], stack: ExitStack) -> NativeServer:
    server = stack.enter_context(NativeServer(Settings(spin_us=0)))
    server.install(lambda host: make_device(model, host, NoneBackend(), parse_options(model, ())))
    return server


def attach(server: NativeServer, answers: Iterator[str], stack: ExitStack) -> Peer:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    server.adopt(theirs)
    return Peer(stack.enter_context(ours), server, answers)


def drive(peer: Peer, session: list[Sent]) -> list[tuple[int, int]]:
    """Send a session as it says; the replies that have to come."""
    expected: list[tuple[int, int]] = []
    for message_id, sent in enumerate(session, 1):
        data = sent.encode(message_id)
        borders = [0, *sent.cuts, len(data)]
        for number, (start, stop) in enumerate(pairwise(borders)):
            peer.send(data[start:stop], sent.fds if number == 0 else ())
            if sent.cuts:
                peer.turn()
        if sent.loses_the_stream:
            return expected
        if sent.is_answered:
            expected.append((message_id, sent.command))
    return expected


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A failing device writes a traceback each time."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not os.environ.get("VFIO_USER_SOAK"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    model=st.sampled_from(MODELS),
    first=st.sampled_from([True] * 9 + [False]),
    session=st.lists(messages(), min_size=1, max_size=25),
    answers=ANSWERS,
    leaves=st.booleans(),
)
@pytest.mark.timeout(0 if os.environ.get("VFIO_USER_SOAK") else 60)
def test_anything_may_come(
    model: type[Device], first: bool, session: list[Sent], answers: list[str], leaves: bool
) -> None:
    """`first`: VERSION is sent as it should be. `leaves`: without reading the last replies."""
    if first:
        session = [Sent(wire.VERSION, wire.version({}), 0, (), ()), *session]
    before_all = holdings(os.getpid())
    with ExitStack() as stack:
        server = make_server(model, stack)
        before = holdings(os.getpid())
        with ExitStack() as client:
            peer = attach(server, iter(answers), client)
            expected = drive(peer, session)
            if not leaves:
                peer.turn()
                assert peer.replies == expected
                assert peer.ended == any(sent.loses_the_stream for sent in session)
        for _ in range(3):
            server.turn()
        assert holdings(os.getpid()) == before
        check_alive(server)
    assert holdings(os.getpid()) == before_all


def check_alive(server: NativeServer) -> None:
    with ExitStack() as stack:
        peer = attach(server, iter(()), stack)
        peer.send(wire.message(wire.VERSION, wire.version({}), message_id=1))
        peer.send(wire.message(wire.GET_INFO, wire.get_info(), message_id=2))
        peer.turn()
        assert peer.replies == [(1, wire.VERSION), (2, wire.GET_INFO)]
    server.turn()


def test_the_fuzzer_reaches_the_device() -> None:
    """A session as the strategies make them does DMA by message and by mapping, and gets interrupts."""
    counted: Counter[str] = Counter()
    for fds in (("sealed",), ("unsealed",), ()):
        with ExitStack() as stack:
            server = make_server(Scratch, stack)
            peer = attach(server, iter(["right"] * 4), stack)
            session = [
                Sent(wire.VERSION, wire.version({}), 0, (), (5, 20)),
                Sent(wire.DMA_MAP, wire.dma_map(0, 4 * PAGE), 0, fds, (1, 17)),
                Sent(wire.SET_IRQS, wire.set_irqs(0, 0x24, 0, 1), 0, ("eventfd",), ()),
                Sent(wire.REGION_WRITE, wire.region_write(7, 4, wire.BUS_MASTER), 0, (), ()),
                Sent(
                    wire.REGION_WRITE, wire.region_write(0, 0xFE0, struct.pack("<QQI", 0, PAGE, 9)), 0, (), ()
                ),
                Sent(wire.REGION_WRITE, wire.region_write(0, 0xFF8, bytes(4)), wire.NO_REPLY, (), ()),
            ]
            expected = drive(peer, session)
            peer.turn()
            assert peer.replies == expected
            counted.update(server.counters())
    assert [counted[f"dma_{way}_write_bytes"] for way in ("mapped", "file", "message")] == [9, 9, 9]
    assert counted["irqs_intx"] == 3
