# SPDX-License-Identifier: BSD-3-Clause
"""Messages on a socket: libvfio-user's C sample server and ours, in alternating rounds."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.benchmarks.processes import BenchmarkError, ServerProcess, our_server, server_process
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.statistics import percentile
from vfio_user.benchmarks.wire import Wire, read_latencies, reads_in_flight
from vfio_user.client.qemu.lab import Lab

WARM_UP = 0.03
"""Seconds of reads before each measurement: a server that spins only while it is busy is then at it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server process and our connection to it."""

    process: ServerProcess
    wire: Wire


@dataclass(frozen=True, slots=True)
class Pair:
    """What is compared, and the two CPUs that we have."""

    ours: Peer
    theirs: Peer
    cpus: tuple[int, int]


@contextlib.contextmanager
def open_pair(lab: Lab, folder: Path) -> Iterator[Pair]:
    """Both servers at work for the whole run; the C sample ends with its first connection."""
    cpus = two_cpus()
    with contextlib.ExitStack() as stack:
        sample = [str(lab.sample("server")), "{socket}"]
        theirs = stack.enter_context(server_process("c-sample", sample, folder))
        ours = stack.enter_context(server_process("scratch", our_server("scratch"), folder))
        peers = []
        for process in (ours, theirs):
            sock = process.connect()
            stack.callback(sock.close)
            peers.append(Peer(process, Wire(sock)))
        yield Pair(peers[0], peers[1], cpus)


def two_cpus() -> tuple[int, int]:
    """The CPUs for client and server. BenchmarkError where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise BenchmarkError("two CPUs are needed, to have client and server apart")
    return allowed[0], allowed[1]


@contextlib.contextmanager
def pinned(pair: Pair, together: bool) -> Iterator[None]:
    """Client on the first CPU, both servers with it or on the second; no garbage collection meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {pair.cpus[0]})
    for peer in (pair.ours, pair.theirs):
        peer.process.pin({pair.cpus[0 if together else 1]})
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        os.sched_setaffinity(0, before)


def warm_up(wire: Wire) -> None:
    end = time.monotonic() + WARM_UP
    while time.monotonic() < end:
        read_latencies(wire, 100)


Measured = Mapping[str, float]
MODES: Mapping[str, bool] = {"same": True, "split": False}


def alternately(pair: Pair, number: int, measure: Callable[[Wire], Measured]) -> tuple[Measured, Measured]:
    """Measure both, ours first in even rounds; ours is the first of the result."""
    order: Sequence[Peer] = (pair.ours, pair.theirs) if number % 2 == 0 else (pair.theirs, pair.ours)
    results = {}
    for peer in order:
        warm_up(peer.wire)
        results[peer.process.name] = measure(peer.wire)
    return results[pair.ours.process.name], results[pair.theirs.process.name]


def _round_trip(wire: Wire) -> Measured:
    times = read_latencies(wire, 2000)
    flight = reads_in_flight(wire, 200)
    return {
        "read.{}.p50": percentile(times, 50) / 1000,
        "read.{}.p99": percentile(times, 99) / 1000,
        "flight.{}": flight / 1000,
    }


def round_trip(pair: Pair, number: int, results: Results) -> None:
    """One round of single reads and of 32 in flight, on one CPU and on two."""
    for mode, together in MODES.items():
        with pinned(pair, together):
            ours, theirs = alternately(pair, number, _round_trip)
        for key, value in ours.items():
            results.add(key.format(mode), value, theirs[key])
