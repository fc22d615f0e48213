# SPDX-License-Identifier: BSD-3-Clause
"""The client side of the protocol benchmarks: a blocking socket and messages that were made beforehand.

It is the same for every server, and as thin as Python allows, so that a ratio speaks of the server.
"""

import array
import socket
import time
from collections.abc import Sequence

from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.protocol import capabilities, codec
from vfio_user.protocol.constants import FLAG_ERROR, HEADER_SIZE, TYPE_REPLY, Command

Nanoseconds = int
_TIMEOUT = 10.0


class Wire:
    """A negotiated connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        # SO_RCVTIMEO rather than settimeout: the socket stays blocking, without a poll for each call.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_TIMEOUT))
        self._negotiate()

    def _negotiate(self) -> None:
        version = capabilities.Version(0, capabilities.Capabilities(max_msg_fds=8))
        request = capabilities.propose(version)
        body = codec.build_parts(request)
        self.request(Command.VERSION, b"".join(bytes(part) for part in body))

    def request(self, command: Command, body: bytes, fds: Sequence[int] = ()) -> bytes:
        """Send one request and return the body of its reply. BenchmarkError when it is refused."""
        message = codec.pack_header(1, command, HEADER_SIZE + len(body)) + body
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([message], ancillary)
        head = self.receive(HEADER_SIZE)
        _, replied, size, flags, error = codec.unpack_header(head)
        body = self.receive(size - HEADER_SIZE)
        if flags & FLAG_ERROR or replied != command:
            raise BenchmarkError(f"{command.name} is answered with {replied}, error {error}")
        return body

    def receive(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        try:
            data = self.socket.recv(count, socket.MSG_WAITALL) if count else b""
        except OSError as error:
            raise BenchmarkError(f"no answer from the server: {error.strerror}") from error
        if len(data) != count:
            raise BenchmarkError(f"the server closed the connection ({len(data)} of {count} bytes)")
        return data

    def receive_into(self, view: memoryview) -> None:
        """Fill `view`."""
        got = self.socket.recv_into(view, 0, socket.MSG_WAITALL)
        if got != len(view):
            raise BenchmarkError(f"the server closed the connection ({got} of {len(view)} bytes)")


def _timeval(seconds: float) -> bytes:
    return array.array("q", [int(seconds), int(seconds % 1 * 1e6)]).tobytes()


def read_reply_head(message_id: int, offset: int, region: int, count: int) -> bytes:
    """Header and fixed body of a good reply to REGION_READ: what comes before the data."""
    numbers = (Command.REGION_READ, codec.ACCESS_SIZE + count, TYPE_REPLY, 0, offset, region, count)
    return codec.REGION_ACCESS.pack(message_id, *numbers)


def read_latencies(
    wire: Wire, rounds: int, region: int = 0, count: int = 8, rest: float = 0.0
) -> list[Nanoseconds]:
    """Time of each of `rounds` reads, `rest` seconds apart. Every reply is checked, outside of the time."""
    ids = range(100, 164)
    messages = [codec.pack_region_read(i, 0, region, count) for i in ids]
    heads = [read_reply_head(i, 0, region, count) for i in ids]
    size, head_size = codec.ACCESS_SIZE + count, codec.ACCESS_SIZE
    buffer, times, clock = bytearray(size), [], time.perf_counter_ns
    send, receive, turns = wire.socket.send, wire.socket.recv_into, len(messages)
    for number in range(rounds):
        message, head = messages[number % turns], heads[number % turns]
        if rest:
            time.sleep(rest)
        begun = clock()
        send(message)
        got = receive(buffer)
        times.append(clock() - begun)
        if got != size or buffer[:head_size] != head:
            _complete(wire, buffer, got, head)
    return times


def _complete(wire: Wire, buffer: bytearray, got: int, head: bytes) -> None:
    """A reply in pieces is legal, if slow; a wrong one ends the benchmark."""
    if got < len(buffer):
        buffer[got:] = wire.receive(len(buffer) - got)
    if buffer[: len(head)] != head:
        raise BenchmarkError(f"wrong reply: {bytes(buffer[:40]).hex()}")


def reads_in_flight(wire: Wire, batches: int, depth: int = 32, count: int = 8) -> float:
    """Reads a second with `depth` requests sent together, and the next as soon as all are answered."""
    ids = range(200, 200 + depth)
    request = b"".join(codec.pack_region_read(i, 0, 0, count) for i in ids)
    heads = [read_reply_head(i, 0, 0, count) for i in ids]
    each, total = codec.ACCESS_SIZE + count, depth * (codec.ACCESS_SIZE + count)
    buffer = bytearray(total)
    view, send, receive = memoryview(buffer), wire.socket.sendall, wire.socket.recv_into
    begun = time.perf_counter_ns()
    for _ in range(batches):
        send(request)
        got = receive(buffer)
        while got < total:
            got += receive(view[got:]) or _closed()
    elapsed = time.perf_counter_ns() - begun
    for number, head in enumerate(heads):
        if buffer[number * each :][: len(head)] != head:
            raise BenchmarkError("wrong reply to a request in flight")
    return batches * depth / elapsed * 1e9


def posted_writes(wire: Wire, batches: int, region: int, depth: int = 64) -> float:
    """Writes a second that ask for no reply, 8 bytes each; a read after each `depth` waits for them."""
    data = bytes(range(8))
    writes = [codec.pack_region_write(i, 0, region, data, no_reply=True) for i in range(300, 300 + depth)]
    request = b"".join(writes) + codec.pack_region_read(99, 0, region, 8)
    good = read_reply_head(99, 0, region, 8) + data
    buffer, send, receive = bytearray(len(good)), wire.socket.sendall, wire.socket.recv_into
    begun = time.perf_counter_ns()
    for _ in range(batches):
        send(request)
        got = receive(buffer)
        if got != len(good) or buffer != good:
            _complete(wire, buffer, got, good)
    return batches * depth / (time.perf_counter_ns() - begun) * 1e9


def bulk_reads(wire: Wire, count: int, total: int, region: int, span: int = 0) -> float:
    """Bytes a second, in reads of `count` bytes one after the other until `total` bytes are there.

    They are all at offset 0, or go through the first `span` bytes.
    """
    places = range(0, max(span, count), count)
    requests = [codec.pack_region_read(98, place, region, count) for place in places]
    heads = [read_reply_head(98, place, region, count) for place in places]
    buffer = bytearray(len(heads[0]) + count)
    send, receive, turns = wire.socket.send, wire.socket.recv_into, total // count
    begun = time.perf_counter_ns()
    for turn in range(turns):
        send(requests[turn % len(requests)])
        got = receive(buffer, 0, socket.MSG_WAITALL)
        if got != len(buffer) or not buffer.startswith(heads[turn % len(heads)]):
            raise BenchmarkError(f"wrong reply: {got} bytes, {bytes(buffer[:32]).hex()}")
    return turns * count / (time.perf_counter_ns() - begun) * 1e9


def _closed() -> int:
    raise BenchmarkError("the server closed the connection")
