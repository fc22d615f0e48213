# SPDX-License-Identifier: BSD-3-Clause
"""A server's e1000, driven through all that a driver does, and compared with what the server has counted."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vfio_user.client.drivers.e1000 import DriverCounters, open_e1000
from vfio_user.client.drivers.e1000_traffic import BulkReport, Measure, Traffic
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.client.memory import DmaCounters
from vfio_user.client.server_process import ServerError, ServerProcess

OPTIONS = {shared: VmmOptions(shared=shared, resample=True, spin=100e-6) for shared in (True, False)}
"""By whether the device may map guest memory. INTx is unmasked by an eventfd, as under KVM; the driver
looks for a reply for 100 us before it sleeps, as a busy vCPU would."""
PINGS, REGISTER_READS = 200, 500


class Teller(Protocol):
    """Who is told what happens."""

    def step(self, text: str) -> None:
        """One thing is done."""

    def progress(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Something goes on; to be called with how much is done."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the driver.

    `interrupts` is how often the eventfd was signalled; `link_seconds` is from connecting to a link,
    `seconds` all of it; `server` is what the server counted meanwhile.
    """

    mapped: bool
    registers: Measure
    pings: Measure
    bulk: BulkReport
    segments: BulkReport
    driver: DriverCounters
    interrupts: int
    dma: DmaCounters
    link_seconds: float
    seconds: float
    server: Mapping[str, int] = field(default_factory=dict)

    @property
    def verified(self) -> int:
        """Frames received and compared: the ARP reply too."""
        return 1 + self.pings.count + self.bulk.frames + self.segments.frames

    def problem(self) -> str:
        """What the server counted otherwise than the driver's side; empty when nothing. Segments went no
        further than the PHY's loopback."""
        frames = self.driver.frames_sent - self.segments.frames
        expected = {
            "net_sent_frames": frames,
            "net_received_frames": frames,
            "net_bad_checksums": 0,
            "irqs_intx": self.interrupts,
            "dma_message_reads": self.dma.reads,
            "dma_message_writes": self.dma.writes,
            "dma_errors": 0,
        }
        wrong = [
            f"{name} {self.server[name]}, not {n}" for name, n in expected.items() if self.server[name] != n
        ]
        if self.mapped == bool(self.dma.writes) or self.mapped != bool(self.server["dma_mapped_writes"]):
            wrong.append(f"DMA went the wrong way: {self.dma}")
        return f"the server counted {', '.join(wrong)}" if wrong else ""


async def try_e1000(server: ServerProcess, frames: int, shared: bool, teller: Teller) -> Trial:
    """Drive the card with mapped or with private memory, then ask the server, whose network is `echo`, what
    it counted. TrafficError, DriverError or ServerError when something is wrong."""
    before = await server.ask_counters()
    driven = await _drive(server.path, frames, shared, teller)
    after = await server.ask_counters()
    trial = replace(driven, server={name: n - before[name] for name, n in after.items()})
    if problem := trial.problem():
        raise ServerError(problem)
    teller.step("the server's counters of frames and of DMA agree too")
    return trial


async def _drive(path: Path, frames: int, shared: bool, teller: Teller) -> Trial:
    begun = time.perf_counter()
    async with open_vmm(path, OPTIONS[shared], step=teller.step) as vmm:
        async with open_e1000(vmm) as nic:
            up = time.perf_counter() - begun
            teller.step(f"reset through the I/O BAR, EEPROM sum BABA, PHY found, link up ({up:.2f} s)")
            traffic = Traffic(nic)
            peer = await traffic.resolve()
            teller.step(f"ARP: {peer.ip} is at {peer.mac.hex(':')}, we are {nic.mac.hex(':')}")
            registers = await traffic.register_reads(REGISTER_READS)
            pings = await traffic.ping(PINGS)
            teller.step(f"ping: {pings.count} of {pings.count} answered, p50 {pings.median * 1e6:.0f} us")
            with teller.progress("UDP echo", frames) as progress:
                bulk = await traffic.bulk(frames, progress=progress)
            teller.step(f"UDP echo: {bulk.frames:,} frames of 64 to 1514 bytes out and back, compared")
            segments = await traffic.segments()
            teller.step(f"TCP segmentation: 60,000 bytes cut into {segments.frames} frames, sums right")
            await traffic.check_statistics()
            teller.step("the device's statistics registers agree with the driver's count")
        return Trial(
            shared,
            registers,
            pings,
            bulk,
            segments,
            nic.counters,
            vmm.intx.count,
            vmm.ram.counters,
            up,
            time.perf_counter() - begun,
        )
