# SPDX-License-Identifier: BSD-3-Clause
"""The hot loop against the declared layouts: the same replies and the same stop, whatever comes, however cut.

`Oracle` does what the loop's description says with nothing but protocol/layouts.py and its own bytes.
"""

import errno
from collections.abc import Iterator, Sequence
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from vfio_user.device_models.regions import Buffer, RamRegion, Region
from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.commands import BY_REQUEST
from vfio_user.protocol.constants import HEADER_SIZE, Command, IrqSetFlags
from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.server.fastpath import SMALL, HotTables, serve_run

SIZE = 0x3000
REGIONS = RAM, READ_ONLY, WRITE_ONLY, BROKEN = range(4)
NO_REPLY, REPLY, ERROR = 0x10, 0x01, 0x20
UNMASK = m.DeviceSetIrqsRequest(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK, 0, 0, 1)


class Broken(Region):
    """Fails at every access."""

    def read(self, offset: int, count: int) -> bytes:
        raise RuntimeError("broken")

    def write(self, offset: int, data: Buffer) -> None:
        raise RuntimeError("broken")


class Oracle:
    """Serves a stream by the layouts. `unmasked` counts; `memory` is what was written, by region."""

    def __init__(self) -> None:
        self.memory = {region: bytearray(SIZE) for region in (RAM, READ_ONLY, WRITE_ONLY)}
        self.unmasked = 0

    def serve(self, stream: bytes) -> tuple[int, bytes]:
        """How many bytes are taken, and the replies joined."""
        taken, out = 0, b""
        while (header := self._header(stream[taken:])) is not None:
            body = stream[taken + HEADER_SIZE : taken + header.size]
            try:
                replies = self._message(header, body)
            except RuntimeError:
                taken += header.size
                failed = m.Header(header.message_id, header.command, HEADER_SIZE, REPLY | ERROR, errno.EIO)
                return taken, out + (b"" if header.flags & NO_REPLY else layouts.build(failed))
            if replies is None:
                break
            taken += header.size
            out += b"".join(_reply(header, reply) for reply in replies)
        return taken, out

    def _header(self, rest: bytes) -> m.Header | None:
        """Of a message that is there as a whole."""
        if len(rest) < HEADER_SIZE:
            return None
        header = layouts.parse(m.Header, rest)
        return header if HEADER_SIZE <= header.size <= len(rest) else None

    def _message(self, header: m.Header, body: bytes) -> Sequence[m.Message] | None:
        """The replies (one, or none to a posted write); None: not to be served here."""
        posted = header.flags == NO_REPLY
        try:
            match header.command:
                case Command.REGION_READ if not header.flags:
                    return self._read(layouts.parse(m.RegionReadRequest, body), body)
                case Command.REGION_WRITE if posted or not header.flags:
                    reply = self._write(layouts.parse(m.RegionWriteRequest, body))
                    return () if posted and reply else reply
                case Command.DEVICE_SET_IRQS if not header.flags and not header.error:
                    return self._set_irqs(layouts.parse(m.DeviceSetIrqsRequest, body), body)
        except RemoteProtocolError:
            pass
        return None

    def _read(self, request: m.RegionReadRequest, body: bytes) -> Sequence[m.Message] | None:
        offset, end = request.offset, request.offset + request.count
        if body != layouts.build(request) or request.count > SMALL or end > SIZE:
            return None
        if request.region == BROKEN:
            raise RuntimeError
        if request.region not in (RAM, READ_ONLY):
            return None
        data = bytes(self.memory[request.region][offset:end])
        return (m.RegionReadReply(offset, request.region, data),)

    def _write(self, request: m.RegionWriteRequest) -> Sequence[m.Message] | None:
        offset, count = request.offset, len(request.data)
        if count > SMALL or offset + count > SIZE:
            return None
        if request.region == BROKEN:
            raise RuntimeError
        if request.region not in (RAM, WRITE_ONLY):
            return None
        self.memory[request.region][offset : offset + count] = request.data
        return (m.RegionWriteReply(offset, request.region, count),)

    def _set_irqs(self, request: m.DeviceSetIrqsRequest, body: bytes) -> Sequence[m.Message] | None:
        if request != UNMASK or body != layouts.build(UNMASK):
            return None
        self.unmasked += 1
        return (m.DeviceSetIrqsReply(),)


def _reply(header: m.Header, reply: m.Message) -> bytes:
    body = layouts.build(reply)
    return layouts.build(m.Header(header.message_id, header.command, HEADER_SIZE + len(body), REPLY)) + body


class Loop:
    """`serve_run` on a buffer that fills: bytes in front of it are served already, those behind `end` are
    not there yet, whatever they are."""

    def __init__(self, stream: bytes) -> None:
        self.regions: dict[int, Region] = {
            RAM: RamRegion(SIZE),
            READ_ONLY: RamRegion(SIZE),
            WRITE_ONLY: RamRegion(SIZE),
            BROKEN: Broken(SIZE),
        }
        self.regions[READ_ONLY].writable = self.regions[WRITE_ONLY].readable = False
        self.unmasked = 0
        self.tables = HotTables(self.regions, self._unmask)
        self.stream = stream

    def _unmask(self) -> None:
        self.unmasked += 1

    def serve(self, start: int, end: int) -> tuple[int, bytes]:
        out: list[bytes] = []
        taken = serve_run(self.tables, bytearray(self.stream), start, end, out)
        return taken, b"".join(out)

    def memory(self, region: int) -> bytes:
        found = self.regions[region]
        assert isinstance(found, RamRegion)
        return found.read(0, SIZE)


U16 = st.integers(0, 0xFFFF)


def wire(
    message_id: int, body: m.Message, flags: int = 0, error: int = 0, more: bytes = b"", size: int = 0
) -> bytes:
    """A message; `more` follows its body, and its header says `size` too much."""
    data = layouts.build(body) + more
    command, size = BY_REQUEST[type(body)].command, (HEADER_SIZE + len(data) + size) & 0xFFFFFFFF
    return layouts.build(m.Header(message_id, command, size, flags, error)) + data


def variants() -> Iterator[bytes]:
    """Messages of every kind, in order and with one thing or two wrong."""
    bases: list[m.Message] = [m.RegionReadRequest(8, RAM, 4), m.RegionWriteRequest(8, RAM, b"abcd"), UNMASK]
    for region, count, flags in product((*REGIONS, 9), (0, 1, SMALL, SMALL + 1), (0, NO_REPLY)):
        yield wire(1, m.RegionReadRequest(64, region, count), flags)
        yield wire(2, m.RegionWriteRequest(64, region, bytes(count)), flags)
    for offset, count in product((SIZE - 1, SIZE, SIZE + 1, (1 << 64) - 1), (0, 1, 2)):
        yield wire(3, m.RegionReadRequest(offset, RAM, count))
        yield wire(4, m.RegionWriteRequest(offset, RAM, bytes(count)))
    for body in bases:
        yield from (wire(5, body, flags) for flags in (*range(0x40), 1 << 31))
        yield from (wire(6, body, size=size) for size in (-16, -4, -1, 1, 8, 1 << 20))
        yield from (wire(7, body, error=5), wire(8, body, more=b"x"), wire(9, body, more=bytes(16)))
    for index, start, count in product(range(2), range(2), range(3)):
        yield wire(10, m.DeviceSetIrqsRequest(UNMASK.flags, index, start, count))
    yield from (wire(11, m.DeviceSetIrqsRequest(flags, 0, 0, 1)) for flags in (0x09, 0x21, 0x14))
    yield wire(12, m.DeviceSetIrqsRequest(UNMASK.flags, 0, 0, 1, argsz=24))
    yield from (layouts.build(m.Header(13, command, 48)) + bytes(32) for command in range(20))


VARIANTS = list(variants())
INSIDE, DATA = st.integers(0, SIZE - SMALL), st.binary(max_size=16) | st.just(SMALL).map(bytes)
REGULAR = st.one_of(
    st.builds(
        wire,
        U16,
        st.builds(
            m.RegionReadRequest, INSIDE, st.sampled_from([RAM, READ_ONLY]), st.sampled_from([0, 4, SMALL])
        ),
    ),
    st.builds(
        wire,
        U16,
        st.builds(m.RegionWriteRequest, INSIDE, st.sampled_from([RAM, WRITE_ONLY]), DATA),
        st.sampled_from([0, NO_REPLY]),
    ),
    st.builds(wire, U16, st.just(UNMASK)),
)
ANY = REGULAR | st.integers(0, len(VARIANTS) - 1).map(VARIANTS.__getitem__) | st.binary(max_size=60)
CUTS = st.lists(st.integers(0, 400), max_size=4)


def check(stream: bytes, cuts: Sequence[int] = (), before: bytes = b"") -> int:
    """Both serve the stream, which arrives in pieces behind bytes `before`; how many bytes they take."""
    oracle, loop = Oracle(), Loop(before + stream)
    taken = 0
    for end in [*sorted(min(cut, len(stream)) for cut in cuts), len(stream)]:
        more, replies = oracle.serve(stream[taken:end])
        assert loop.serve(len(before) + taken, len(before) + end) == (len(before) + taken + more, replies)
        taken += more
    assert loop.unmasked == oracle.unmasked
    assert {region: loop.memory(region) for region in oracle.memory} == oracle.memory
    return taken


@given(st.lists(REGULAR, max_size=8), CUTS, st.binary(max_size=9))
def test_what_is_in_order_is_served_to_the_end(messages: list[bytes], cuts: list[int], before: bytes) -> None:
    stream = b"".join(messages)
    assert check(stream, cuts, before) == len(stream)


@given(st.lists(ANY, max_size=8), CUTS)
def test_anything_else_stops_it_where_the_layouts_say(messages: list[bytes], cuts: list[int]) -> None:
    check(b"".join(messages), cuts)


def test_every_kind_of_message_between_two_others() -> None:
    other = wire(99, m.RegionReadRequest(8, RAM, 4))
    served = [check(other + message + other) > len(other) for message in VARIANTS]
    assert served.count(True) > 30
    assert served.count(False) > 200


def test_a_stream_may_be_cut_at_every_byte() -> None:
    write = m.RegionWriteRequest(8, RAM, b"abcde")
    bodies: list[m.Message] = [m.RegionReadRequest(8, RAM, 4), write, UNMASK, m.RegionReadRequest(9, RAM, 4)]
    served = b"".join(wire(number, body) for number, body in enumerate(bodies))
    stream = served + wire(5, write, NO_REPLY) + wire(6, m.DeviceResetRequest())
    for cut in range(len(stream)):
        assert check(stream, [cut]) == len(served) + 37
