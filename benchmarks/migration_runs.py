# SPDX-License-Identifier: BSD-3-Clause
"""Reading 256 MiB of a device's state, in reads of 1 MiB: MIG_DATA_READ of ours against a C server.

The libvfio-user of the lab knows no MIG_DATA_READ. Its part is a REGION_READ of the same length, which costs
it what its later edition's MIG_DATA_READ costs: one callback that copies, one send. Ours makes records,
counts all of it in the digest, and does that from STOP to the end of the stream.
"""

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vfio_user.benchmarks.processes import BenchmarkError, our_server
from vfio_user.benchmarks.protocol_runs import Measured, Pair, c_memory_server, in_both_modes, open_pair
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.wire import Wire, bulk_reads
from vfio_user.client.qemu.lab import Lab
from vfio_user.protocol import codec, layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import (
    HEADER_SIZE,
    MIG_DATA_SIZE,
    Command,
    DeviceFeature,
    DeviceFeatureFlags,
    MigrationState,
)

STATE = 256 << 20
PIECE = 1 << 20
_NO_FD = 0xFFFFFFFF
_HEAD = HEADER_SIZE + MIG_DATA_SIZE


def set_state(wire: Wire, state: MigrationState) -> None:
    """DEVICE_FEATURE, SET of MIG_DEVICE_STATE."""
    flags = DeviceFeature.MIG_DEVICE_STATE | DeviceFeatureFlags.SET
    data = layouts.build(m.FeatureMigState(state, _NO_FD))
    parts = codec.build_parts(m.DeviceFeatureRequest(flags, data))
    wire.request(Command.DEVICE_FEATURE, b"".join(bytes(part) for part in parts))


def fill(wire: Wire) -> None:
    """Random bytes into all of BAR 2, so that no block of it is zero."""
    piece = random.Random(1).randbytes(PIECE)
    for offset in range(0, STATE, PIECE):
        body = codec.pack_region_write(1, offset, 2, piece)[HEADER_SIZE:]
        wire.request(Command.REGION_WRITE, body)


def read_state(wire: Wire) -> float:
    """Bytes a second, from the first MIG_DATA_READ to the one that comes back short."""
    body = layouts.build(m.MigDataReadRequest(PIECE))
    request = codec.pack_header(1, Command.MIG_DATA_READ, HEADER_SIZE + len(body)) + body
    buffer = memoryview(bytearray(_HEAD + PIECE))
    send, receive = wire.socket.send, wire.receive_into
    set_state(wire, MigrationState.STOP_COPY)
    begun = time.perf_counter()
    for _ in range(STATE // PIECE):
        send(request)
        receive(buffer)
    send(request)
    receive(buffer[:HEADER_SIZE])
    rest = codec.unpack_header(buffer)[2] - HEADER_SIZE
    receive(buffer[:rest])
    elapsed = time.perf_counter() - begun
    set_state(wire, MigrationState.RUNNING)
    if rest >= HEADER_SIZE + PIECE:
        raise BenchmarkError(f"a state of {STATE} bytes and a little does not end")
    return (STATE + rest - MIG_DATA_SIZE) / elapsed


def _measure(ours: Wire, wire: Wire) -> Measured:
    rate = read_state(wire) if wire is ours else bulk_reads(wire, PIECE, STATE, region=1, span=STATE)
    return {"state.{}": rate / 1e6}


@dataclass(frozen=True, slots=True)
class StateContest:
    """A device with a large state, and a server in C with memory to read."""

    pair: Pair

    def round(self, number: int, results: Results) -> None:
        in_both_modes(self.pair, number, results, partial(_measure, self.pair.ours.wire))


@contextlib.contextmanager
def against_library(lab: Lab, folder: Path) -> Iterator[StateContest]:
    """Our `scratch` with 256 MiB, and as much memory behind a C server."""
    ours = our_server("scratch", "--set", f"memory={STATE >> 20}M")
    with open_pair(("scratch", ours), c_memory_server(lab, folder, STATE >> 20), folder) as pair:
        fill(pair.ours.wire)
        yield StateContest(pair)
