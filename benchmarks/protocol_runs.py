# SPDX-License-Identifier: BSD-3-Clause
"""Messages on a socket: libvfio-user's C sample server and ours, in alternating rounds."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.benchmarks.processes import BenchmarkError, ServerProcess, compiled, our_server, server_process
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.statistics import percentile
from vfio_user.benchmarks.wire import Wire, bulk_reads, posted_writes, read_latencies, reads_in_flight
from vfio_user.client.qemu.lab import Lab
from vfio_user.protocol.constants import PciRegion

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


Entrant = tuple[str, Sequence[str]]
"""Name and command line of a server."""


@contextlib.contextmanager
def open_pair(ours: Entrant, theirs: Entrant, folder: Path) -> Iterator[Pair]:
    """Both servers at work for the whole run; those in C end with their first connection."""
    cpus = two_cpus()
    with contextlib.ExitStack() as stack:
        peers = []
        for name, words in (ours, theirs):
            process = stack.enter_context(server_process(name, words, folder))
            sock = process.connect()
            stack.callback(sock.close)
            peers.append(Peer(process, Wire(sock)))
        yield Pair(peers[0], peers[1], cpus)


def against_sample(lab: Lab, folder: Path) -> contextlib.AbstractContextManager[Pair]:
    """Our `scratch` and libvfio-user's sample."""
    sample = [str(lab.sample("server")), "{socket}"]
    return open_pair(("scratch", our_server("scratch")), ("c-sample", sample), folder)


def c_memory_server(lab: Lab, folder: Path, mebibytes: int = 1) -> Entrant:
    """Memory behind BAR1, in C with libvfio-user."""
    library = lab.libvfio_library.parent
    flags = ("-I", str(lab.libvfio_source / "include"), "-L", str(library), "-lvfio-user")
    program = compiled("bulk_server", folder, *flags, f"-Wl,-rpath,{library}")
    return "c-memory", [str(program), "{socket}", str(mebibytes)]


def against_library(lab: Lab, folder: Path) -> contextlib.AbstractContextManager[Pair]:
    """1 MiB of memory behind BAR1, with us and with libvfio-user."""
    ours = our_server("vfio_user.benchmarks.memory_device:Memory")
    return open_pair(("memory", ours), c_memory_server(lab, folder), folder)


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
        read_latencies(wire, 100, PciRegion.CONFIG, 4)


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


def in_both_modes(pair: Pair, number: int, results: Results, measure: Callable[[Wire], Measured]) -> None:
    """One round on one CPU and on two; the keys that `measure` gives have {} for the mode."""
    for mode, together in MODES.items():
        with pinned(pair, together):
            ours, theirs = alternately(pair, number, measure)
        for key, value in ours.items():
            results.add(key.format(mode), value, theirs[key])


def _round_trip(wire: Wire) -> Measured:
    times = read_latencies(wire, 2000)
    return {
        "read.{}.p50": percentile(times, 50) / 1000,
        "read.{}.p99": percentile(times, 99) / 1000,
        "wake.{}": percentile(read_latencies(wire, 60, rest=0.002), 50) / 1000,
        "flight.{}": reads_in_flight(wire, 200) / 1000,
    }


def round_trip(pair: Pair, number: int, results: Results) -> None:
    """Single reads, one after the other and after a rest, and 32 in flight."""
    in_both_modes(pair, number, results, _round_trip)


def _bulk(wire: Wire) -> Measured:
    bulk_reads(wire, 1 << 20, 4 << 20, region=1)
    return {
        "bulk64k.{}": bulk_reads(wire, 1 << 16, 24 << 20, region=1) / 1e6,
        "bulk1m.{}": bulk_reads(wire, 1 << 20, 48 << 20, region=1) / 1e6,
    }


def bulk(pair: Pair, number: int, results: Results) -> None:
    """Large reads."""
    in_both_modes(pair, number, results, _bulk)


def posted(pair: Pair, number: int, results: Results) -> None:
    """Writes without a reply. The sample's BAR0 is a timer: there BAR1 is written."""
    regions = {id(pair.ours.wire): 0, id(pair.theirs.wire): 1}

    def measure(wire: Wire) -> Measured:
        return {"posted.{}": posted_writes(wire, 150, regions[id(wire)]) / 1000}

    in_both_modes(pair, number, results, measure)
