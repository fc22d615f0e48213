# SPDX-License-Identifier: BSD-3-Clause
"""What dirty logging costs a device: the e1000 receives frames into mapped memory, with it and without.

All in this process and without a guest, so that nothing hides the cost: a guest's own share is much larger.
"""

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vfio_user.benchmarks.dma_runs import guest_memory
from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.benchmarks.results import Results
from vfio_user.client.qemu.lab import Lab
from vfio_user.device_models.e1000.bench import Bench
from vfio_user.server.dirty_tracking import DirtyTracking
from vfio_user.server.dma_region import DmaRegion
from vfio_user.server.dma_table import DmaTable
from vfio_user.server.guest_memory import GuestMemory
from vfio_user.transport.fds import OwnedFd

PAGE = 4096
SIZE = 4 << 20
RING = 256
BURST = 60  # frames that the card's packet buffer holds
FRAME = b"\xff" * 6 + bytes(1508)
COMMAND = 0x04  # of the configuration space: memory, I/O, bus master


@dataclass(frozen=True, slots=True)
class MarkingContest:
    """A card with real guest memory, and its dirty log."""

    bench: Bench
    region: DmaRegion
    tracking: DirtyTracking

    def round(self, number: int, results: Results) -> None:
        """First with logging in even rounds."""
        figures = {logged: self._measure(logged) for logged in (number % 2 == 0, number % 2 == 1)}
        for key, value in figures[True].items():
            results.add(key, value, figures[False][key])

    def _measure(self, logged: bool) -> dict[str, float]:
        if logged:
            self.tracking.start(PAGE, keep_unmapped=False)
        else:
            self.tracking.stop()
        return {"mark.store": self._store(), "mark.receive": self._receive(100) / 1000}

    def _store(self, turns: int = 100_000) -> float:
        """Nanoseconds for a write of a frame into one page."""
        store, data = self.region.store, FRAME
        begun = time.perf_counter_ns()
        for _ in range(turns):
            store(PAGE, data)
        return (time.perf_counter_ns() - begun) / turns

    def _receive(self, bursts: int) -> float:
        """Frames a second; the driver gives every descriptor back."""
        bench, offer = self.bench, self.bench.port.offer
        begun = time.perf_counter()
        for _ in range(bursts):
            if not all(offer(FRAME) for _ in range(BURST)):
                raise BenchmarkError("the card has refused a frame")
            bench.host.run()
            bench.next_received = (bench.next_received + BURST) % RING
            bench.write("RDT", (bench.next_received - 1) % RING)
        return bursts * BURST / (time.perf_counter() - begun)


@contextlib.contextmanager
def logged_card(_lab: Lab, _folder: Path) -> Iterator[MarkingContest]:
    """The card on its test bench; its memory is that of a region, as a client gives it."""
    with guest_memory(SIZE) as fd, mmap.mmap(fd, SIZE) as memory:
        table = DmaTable()
        region = table.map(0, SIZE, OwnedFd(os.dup(fd)))
        bench = Bench()
        bench.start(rx=RING)
        memory[:] = bytes(bench.memory)
        bench.host.dma, bench.memory = GuestMemory(table), memory  # type: ignore[assignment]
        bench.device.config.write(COMMAND, b"\x07\0")
        try:
            yield MarkingContest(bench, region, DirtyTracking(table))
        finally:
            table.unmap_all()
