# SPDX-License-Identifier: BSD-3-Clause
"""What is measured, against whom, and the marks to reach. One row for each line of the report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Sense = Literal["most", "least", "none"]
Verdict = Literal["moonshot", "met", "missed", ""]

C = "libvfio-user's C sample server"
LIBRARY = "a C server of libvfio-user with memory of the same size"
REGION_READS = "REGION_READ of 256 MiB by 1 MiB, from a C server of libvfio-user: it has no MIG_DATA_READ"
BUILT_IN = "QEMU's built-in e1000 in the same guest"
SIDE_BY_SIDE = "the C sample server, with both our engines in the same rounds"
CLEAN_V1 = "libvfio-user's C sample server: v1, and no page written"
EMPTY = "ourselves with no region mapped"
UNLOGGED_GUEST = "the same card without dirty logging, in the same guest"
MOVED_ALONE = "the same guest with QEMU's built-in e1000, moved by QEMU alone"
WHOLE = "the whole downtime of that move"
UNLOGGED = "ourselves without dirty logging, in one process"


@dataclass(frozen=True, slots=True)
class Measure:
    """A ratio ours / peer. With sense `most` it may be at most `mark`, with `least` it must be that at least;
    `none`: it is shown for what it is."""

    key: str
    text: str
    unit: str
    peer: str
    sense: Sense = "none"
    mark: float | None = None
    moonshot: float | None = None
    allowance: float | None = None
    """A mark that is no ratio: at most so much more than the peer, in `unit`."""

    def verdict(self, ratio: float, more: float = 0.0) -> Verdict:
        """Which mark a ratio, or a difference, reaches."""
        if self.allowance is not None:
            return "met" if more <= self.allowance else "missed"
        if self._reaches(ratio, self.moonshot):
            return "moonshot"
        if self.mark is None:
            return ""
        return "met" if self._reaches(ratio, self.mark) else "missed"

    def _reaches(self, ratio: float, bound: float | None) -> bool:
        if bound is None or self.sense == "none":
            return False
        return ratio <= bound if self.sense == "most" else ratio >= bound

    def mark_text(self) -> str:
        """The mark as the report shows it."""
        return self.bound(self.mark) if self.allowance is None else f"≤ +{self.allowance:g}"

    def bound(self, value: float | None) -> str:
        """A mark as the report shows it."""
        sign = {"most": "≤", "least": "≥", "none": ""}[self.sense]
        return "" if value is None else f"{sign} {value:g}"


_ROWS = (
    Measure("read.same.p50", "REGION_READ 8 bytes, one CPU, p50", "µs", C, "most", 1.6, 1.2),
    Measure("read.same.p99", "REGION_READ 8 bytes, one CPU, p99", "µs", C),
    Measure("read.split.p50", "REGION_READ 8 bytes, two CPUs, p50", "µs", C, "most", 0.5, 0.25),
    Measure("read.split.p99", "REGION_READ 8 bytes, two CPUs, p99", "µs", C),
    Measure("wake.same", "the same after 2 ms of rest, one CPU, p50", "µs", C),
    Measure("wake.split", "the same after 2 ms of rest, two CPUs, p50", "µs", C),
    Measure("flight.same", "32 reads in flight, one CPU", "k/s", C, "least", 2.5, 4.0),
    Measure("flight.split", "32 reads in flight, two CPUs", "k/s", C),
    Measure("posted.same", "posted REGION_WRITE, one CPU", "k/s", C),
    Measure("posted.split", "posted REGION_WRITE, two CPUs", "k/s", C),
    Measure("dma.same", "DMA_MAP + UNMAP of 1 MiB, one CPU, p50", "µs", C),
    Measure("dma.split", "DMA_MAP + UNMAP of 1 MiB, two CPUs, p50", "µs", C),
    Measure("dma15.same", "the same with 15 regions there, one CPU", "µs", C),
    Measure("dma15.split", "the same with 15 regions there, two CPUs", "µs", C),
    *(
        Measure(f"{engine}.{key}.{mode}", f"{text}, {cpus}: {name}", unit, SIDE_BY_SIDE)
        for key, text, unit in (
            ("read", "REGION_READ 8 bytes", "µs"),
            ("flight", "32 reads in flight", "k/s"),
            ("posted", "posted REGION_WRITE", "k/s"),
            ("dma", "DMA_MAP + UNMAP", "µs"),
        )
        for mode, cpus in (("same", "one CPU"), ("split", "two CPUs"))
        for engine, name in (("native", "native"), ("library", "ctypes"))
    ),
    Measure("bulk64k.same", "REGION_READ 64 KiB, one CPU", "MB/s", LIBRARY),
    Measure("bulk64k.split", "REGION_READ 64 KiB, two CPUs", "MB/s", LIBRARY),
    Measure("bulk1m.same", "REGION_READ 1 MiB, one CPU", "MB/s", LIBRARY),
    Measure("bulk1m.split", "REGION_READ 1 MiB, two CPUs", "MB/s", LIBRARY),
    Measure("dma10k.same", "DMA_MAP + UNMAP at 10,000 regions, one CPU", "µs", EMPTY, "most", 1.15),
    Measure("dma10k.split", "DMA_MAP + UNMAP at 10,000 regions, two CPUs", "µs", EMPTY, "most", 1.15),
    *(
        Measure(f"{key}{kind}.{mode}", f"dirty report of {size}{how}, {cpus}", "ms", peer, "most", mark, moon)
        for kind, how, peer in (
            ("", "", C),
            (".v2", ", v2", CLEAN_V1),
            (".written", ", pages written", CLEAN_V1),
            (".v2.written", ", v2, pages written", CLEAN_V1),
        )
        for key, size, mark, moon in (("dirty16g", "16 GiB", 1.0, 0.7), ("dirty1t", "1 TiB", 0.7, 0.5))
        for mode, cpus in (("same", "one CPU"), ("split", "two CPUs"))
    ),
    Measure(
        "state.same", "MIG_DATA_READ, 256 MiB by 1 MiB, one CPU", "MB/s", REGION_READS, "least", 1.0, 1.3
    ),
    Measure(
        "state.split", "MIG_DATA_READ, 256 MiB by 1 MiB, two CPUs", "MB/s", REGION_READS, "least", 1.5, 1.8
    ),
    Measure("mark.store", "a write of 1,514 bytes with dirty logging", "ns", UNLOGGED),
    Measure("mark.receive", "the e1000 receives with dirty logging", "k/s", UNLOGGED, "least", 0.9),
    Measure("default.out", "guest TCP out, as it comes", "Mbit/s", BUILT_IN),
    Measure("default.in", "guest TCP in, as it comes", "Mbit/s", BUILT_IN),
    Measure("tcp.out", "guest TCP out, the guest's own ITR, tuned", "Mbit/s", BUILT_IN, "least", 1.5),
    Measure("tcp.in", "guest TCP in, the guest's own ITR, tuned", "Mbit/s", BUILT_IN, "least", 1.1),
    Measure("best.out", "guest TCP out, best policy", "Mbit/s", BUILT_IN, "least", 2.0, 3.5),
    Measure("best.in", "guest TCP in, best policy", "Mbit/s", BUILT_IN, "least", 1.5, 2.2),
    Measure("logged.in", "guest TCP in with dirty logging, tuned", "Mbit/s", UNLOGGED_GUEST, "least", 0.9),
    Measure("default.ping", "ping from the guest, as it comes, p50", "µs", BUILT_IN),
    Measure("default.rr", "TCP request/response, as it comes, p50", "µs", BUILT_IN),
    Measure("ping", "ping from the guest, tuned, p50", "µs", BUILT_IN, "most", 1.5, 1.1),
    Measure("rr", "TCP request/response, tuned, p50", "µs", BUILT_IN, "most", 1.5, 1.1),
    Measure("rr.p99", "TCP request/response, tuned, p99", "µs", BUILT_IN),
    Measure("best.ping", "ping from the guest, best policy, p50", "µs", BUILT_IN),
    Measure("best.rr", "TCP request/response, best policy, p50", "µs", BUILT_IN),
    Measure("ipv6.out", "guest TCP out, IPv6", "Mbit/s", BUILT_IN),
    Measure("ipv6.in", "guest TCP in, IPv6", "Mbit/s", BUILT_IN),
    Measure("mss.out", "guest TCP out, segments of 777 bytes", "Mbit/s", BUILT_IN),
    Measure("mss.in", "guest TCP in, segments of 777 bytes", "Mbit/s", BUILT_IN),
    Measure("jumbo.out", "guest TCP out, MTU 9000", "Mbit/s", BUILT_IN),
    Measure("jumbo.in", "guest TCP in, MTU 9000", "Mbit/s", BUILT_IN),
    Measure("downtime", "downtime of a move", "ms", MOVED_ALONE, allowance=20.0),
    Measure("downtime.written", "the same, and a device writes 100 MB/s", "ms", MOVED_ALONE, allowance=20.0),
    *(
        Measure(f"{key}.{part}", f"{text}{name}", "ms", WHOLE)
        for key, text in (("downtime", ""), ("downtime.written", "100 MB/s: "))
        for part, name in (
            ("stop", "the devices stop"),
            ("hand_over", "logs, interrupts, view"),
            ("last_pass", "QEMU's last pages"),
            ("restore", "QEMU's view is restored"),
            ("start", "devices and CPUs start"),
        )
    ),
)
MEASURES: Mapping[str, Measure] = {row.key: row for row in _ROWS}
