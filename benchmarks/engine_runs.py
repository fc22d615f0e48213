# SPDX-License-Identifier: BSD-3-Clause
"""Both engines with the same device, and libvfio-user's C sample: three servers in each round.

The libvfio-user engine pays for the library's work and for the way into Python and back; what is left between
the native engine and it is what our own protocol code is worth.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.benchmarks.dma_runs import SPARE, guest_memory, time_of_a_pair
from vfio_user.benchmarks.processes import our_server, server_process
from vfio_user.benchmarks.protocol_runs import MODES, Measured, Pair, Peer, pinned, two_cpus, warm_up
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.statistics import percentile
from vfio_user.benchmarks.wire import Wire, posted_writes, read_latencies, reads_in_flight
from vfio_user.client.qemu.lab import Lab

NATIVE, LIBRARY, SAMPLE = "native", "library", "sample"
FIGURES = ("read", "flight", "posted", "dma")
POSTED_REGION = {NATIVE: 0, LIBRARY: 0, SAMPLE: 1}  # the sample's BAR0 is a timer


@dataclass(frozen=True, slots=True)
class Engines:
    """The servers by the names above, the memory to map, and the two CPUs."""

    peers: Sequence[Peer]
    fd: int
    cpus: tuple[int, int]

    def round(self, number: int, results: Results) -> None:
        """Each server on one CPU with us and on two, in an order that turns with the rounds."""
        start = number % len(self.peers)
        order = [*self.peers[start:], *self.peers[:start]]
        for mode, together in MODES.items():
            measured = dict(self._measure_all(order, mode, together))
            for key, peer in measured[SAMPLE].items():
                for name in (NATIVE, LIBRARY):
                    results.add(f"{name}.{key}", measured[name][key], peer)

    def _measure_all(
        self, order: Sequence[Peer], mode: str, together: bool
    ) -> Iterator[tuple[str, Measured]]:
        first, second, third = order
        third.process.pin({self.cpus[0 if together else 1]})
        with pinned(Pair(first, second, self.cpus), together):
            for peer in order:
                warm_up(peer.wire)
                name = peer.process.name
                yield name, {f"{key}.{mode}": value for key, value in self._measure(peer.wire, name).items()}

    def _measure(self, wire: Wire, name: str) -> Measured:
        values = (
            percentile(read_latencies(wire, 1000), 50) / 1000,
            reads_in_flight(wire, 100) / 1000,
            posted_writes(wire, 100, POSTED_REGION[name]) / 1000,
            time_of_a_pair(wire, self.fd, 200),
        )
        return dict(zip(FIGURES, values, strict=True))


@contextlib.contextmanager
def side_by_side(lab: Lab, folder: Path) -> Iterator[Engines]:
    """`scratch` under both engines, and the sample."""
    commands = {
        NATIVE: our_server("scratch"),
        LIBRARY: our_server("scratch", "--engine", "libvfio-user"),
        SAMPLE: [str(lab.sample("server")), "{socket}"],
    }
    with contextlib.ExitStack() as stack:
        peers = []
        for name, words in commands.items():
            process = stack.enter_context(server_process(name, words, folder))
            sock = process.connect()
            stack.callback(sock.close)
            peers.append(Peer(process, Wire(sock)))
        yield Engines(peers, stack.enter_context(guest_memory(SPARE)), two_cpus())
