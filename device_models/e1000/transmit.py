# SPDX-License-Identifier: BSD-3-Clause
"""The transmit side: the ring and its packets (Software Developer's Manual, 3.3 and 3.4)."""

import dataclasses
from collections import deque
from collections.abc import Callable

from vfio_user.device_models.device import Dma, DmaError, Host, pause
from vfio_user.device_models.e1000.bits import Cause, Ctrl, Tctl
from vfio_user.device_models.e1000.descriptors import DD, STATUS_OFFSET, Context, read_context
from vfio_user.device_models.e1000.interrupts import Causes, DelayedCause
from vfio_user.device_models.e1000.packets import Packet, Parsed, parse
from vfio_user.device_models.e1000.ring import Ring
from vfio_user.device_models.e1000.statistics import FCS, Statistics
from vfio_user.device_models.net import Offload, WireSize
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.registers import RegisterFile
from vfio_user.device_models.state import (
    LONGEST,
    MOST_VALUES,
    U64,
    Apply,
    Fields,
    Reader,
    Section,
    counted,
)

BATCH = 64  # descriptors
BATCH_BYTES = 64 * 1024
LONGEST_CHAIN = 4096
"""Descriptors after which a packet without an end is given up."""

Send = Callable[[list[Buffer], Offload | None], WireSize | None]
"""Puts a frame on the wire, or loops it back; None: not now, `wake` will be called."""


class Transmitter:
    """Frames on their way out of guest memory."""

    def __init__(
        self, host: Host, file: RegisterFile, causes: Causes, statistics: Statistics, send: Send
    ) -> None:
        self._host = host
        self._causes = causes
        self._statistics = statistics
        self._counts = statistics.sent
        self._send = send
        self._tctl, self._ctrl, self._vet = file.cell("TCTL"), file.cell("CTRL"), file.cell("VET")
        self._txdctl = file.cell("TXDCTL")
        self.ring = Ring(file, "TD")
        self.delay = DelayedCause(host, causes, Cause.TXDW, file.cell("TIDV"), file.cell("TADV"))
        self.open = False
        """Whether frames may leave: there is a link or a loopback, and no pause."""
        self.context = Context()
        """Set up by the last context descriptor that the head has passed."""
        self.owed: deque[tuple[int, Buffer]] = deque()
        """Where descriptors are done and still to be marked so: guest addresses, and what goes there."""
        self.owed_delayed = False
        """Whether the delayed interrupt is owed with them."""
        self.owed_causes = 0
        """Causes that are owed with them."""
        self._wanted = BATCH
        self._single = False
        self.malformed = self.dma_errors = 0

    def wake(self) -> None:
        """There may be something to do: the tail, the link or the enable bit has changed."""
        if self._tctl.value & Tctl.EN and self.open and (self.ring.owned or self.owed):
            self._host.start("transmit", self.work)

    def ring_moved(self) -> None:
        """The guest has written the ring's base, length or head: what was read or owed is void."""
        self.ring.generation += 1
        self.owed = deque()  # not emptied: a task may be waiting for the writes of the old one
        self.owed_delayed, self.owed_causes = False, 0
        self._wanted, self._single = BATCH, False

    def reset(self) -> None:
        self.ring_moved()
        self.delay.reset()
        self.context = Context()

    def section(self) -> Section:
        """What the registers do not hold: of a packet whose end has not come nothing is kept here either."""
        longest, values = LONGEST + LONGEST_CHAIN * 24, MOST_VALUES + LONGEST_CHAIN
        return Section("transmit", 1, self._save, self._load, longest=longest, values=values)

    def _save(self) -> Fields:
        return {
            "context": dataclasses.asdict(self.context),
            "owed": [address for address, _ in self.owed],
            "owed_delayed": self.owed_delayed,
            "owed_causes": self.owed_causes,
            "delay": self.delay.save(),
            "malformed": counted(self.malformed),
            "dma_errors": counted(self.dma_errors),
        }

    def _load(self, reader: Reader) -> Apply:
        context = read_context(reader.record("context"))
        owed = reader.integers("owed", U64, LONGEST_CHAIN, 0)
        owed_delayed, owed_causes = reader.flag("owed_delayed"), reader.integer("owed_causes", Cause.ALL)
        apply_delay = self.delay.load(reader.maybe_record("delay"))
        malformed, dma_errors = reader.integer("malformed", U64), reader.integer("dma_errors", U64)

        def apply() -> None:
            self.ring_moved()
            self.context, self.owed = context, deque((address, _DONE) for address in owed)
            self.owed_delayed, self.owed_causes = owed_delayed, owed_causes
            apply_delay()
            self.malformed, self.dma_errors = malformed, dma_errors

        return apply

    def restored(self) -> None:
        """Let the delay end, and the task do what is owed."""
        self.delay.restored()
        self.wake()

    async def work(self) -> None:
        """The task: sends what is between head and tail."""
        await self._settle(self._host.dma)
        while await self._batch(self._host.dma):
            await pause()

    async def _batch(self, dma: Dma) -> bool:
        """Send a bounded number of packets; tell whether to go on.

        Frames leave and the head moves in one step; marking the descriptors as done is then owed.
        """
        ring = self.ring
        if not self._tctl.value & Tctl.EN or not self.open or not ring.owned:
            return False
        generation = ring.generation
        try:
            descriptors = bytes(await ring.read(dma, self._wanted))
            if ring.generation != generation:
                return True
            parsed = parse(descriptors, self.context, 1 if self._single else BATCH_BYTES)
            views = await dma.read_many(parsed.segments) if parsed.segments else []
        except DmaError:
            return await self._failed(dma)
        if ring.generation != generation or not self._host.running:
            return True
        if not self._tctl.value & Tctl.EN or not self.open:
            return True
        if not parsed.used:
            return await self._look_further(dma, len(descriptors))
        blocked = self._send_all(parsed, views)
        self._wanted, self._single = BATCH, False
        del views
        await self._settle(dma)
        return not blocked and bool(self.ring.owned)

    def _send_all(self, parsed: Parsed, views: list[Buffer]) -> bool:
        """Send the packets, move the head; tell whether the rest has to wait."""
        place = done = 0
        blocked = False
        for packet in parsed.packets:
            end = place + len(packet.segments)
            if not self._send_packet(packet, views[place:end]):
                blocked = True
                break
            place, done = end, packet.end
            self.context = packet.context
        if not blocked:
            done, self.context = parsed.used, parsed.context
        self._passed(parsed, done)
        return blocked

    def _passed(self, parsed: Parsed, steps: int) -> None:
        """The head goes over `steps` descriptors; those that want a report are owed one."""
        for step, delayed in parsed.reports:
            if step < steps:
                self.owed.append((self.ring.address(step) + STATUS_OFFSET, _DONE))
                self.owed_delayed |= delayed
                self.owed_causes |= 0 if delayed else Cause.TXDW
        before = self.ring.owned
        self.ring.advance(steps)
        low = 8 * (self._txdctl.value >> 25)
        if low and self.ring.owned <= low < before:
            self.owed_causes |= Cause.TXD_LOW
        if steps and not self.ring.owned:
            self.owed_causes |= Cause.TXQE

    def _send_packet(self, packet: Packet, pieces: list[Buffer]) -> bool:
        """Send one packet; False: it has to wait. A malformed one is counted and gone."""
        if packet.total and not packet.inserts_fcs:
            pieces = _without_fcs(pieces, packet.total)
        tag = packet.tag if self._ctrl.value & Ctrl.VME else None
        prepared = packet.prepare(pieces, tag, self._vet.value)
        if prepared is None:
            self._count_malformed(packet)
            return True
        pieces, offload, total = prepared
        if total < 60 and self._tctl.value & Tctl.PSP:
            pieces, total = [*pieces, bytes(60 - total)], 60
        first = bytes(pieces[0][:6]) if pieces else b""
        size = self._send(pieces, offload)
        if size is None:
            return False
        if size.frames:
            self._count(size, offload, total, first)
        else:
            self._count_malformed(packet)
        return True

    def _count(self, size: WireSize, offload: Offload | None, total: int, first: bytes) -> None:
        """Count what is on the wire now: one frame, or the segments of a burst, all alike but the last."""
        self._causes.sent += size.bytes
        if offload is not None and offload.segmentation:
            self._statistics.count("TSCTC")
        whole = size.frames - 1
        if whole and offload is not None:
            headers = (size.bytes - total) // whole
            each = headers + offload.segment_size
            self._counts.add(whole, each + FCS, first)
            self._counts.add(1, size.bytes - whole * each + FCS, first)
        else:
            self._counts.add(1, size.bytes + FCS, first)

    def _count_malformed(self, packet: Packet) -> None:
        if packet.total:
            self.malformed += 1
        if packet.segmented:
            self._statistics.count("TSCTFC")

    async def _settle(self, dma: Dma) -> None:
        """Mark as done what is owed, then tell the guest of it."""
        if self.owed:
            generation, owed = self.ring.generation, self.owed
            try:
                await dma.write_each(owed)
            except DmaError:
                self.dma_errors += 1
            if self.ring.generation != generation:
                return
            owed.clear()
        causes, delayed = self.owed_causes, self.owed_delayed
        self.owed_causes, self.owed_delayed = 0, False
        if delayed and not causes & Cause.TXDW:
            self.delay.event()
        if causes:
            self._causes.set(causes)

    async def _look_further(self, dma: Dma, length: int) -> bool:
        """No packet ends in what was read: read more, wait for more, or give up on an endless one."""
        if self._wanted < LONGEST_CHAIN and self._wanted < self.ring.owned:
            self._wanted = min(4 * self._wanted, LONGEST_CHAIN)
            return True
        if self.ring.owned < min(LONGEST_CHAIN, self.ring.count - 1):
            self._wanted = BATCH
            return False
        self.malformed += 1
        self.ring.advance(min(self.ring.owned, LONGEST_CHAIN))
        await self._settle(dma)
        return True

    async def _failed(self, dma: Dma) -> bool:
        """Guest memory cannot be read: find the packet whose data it is, and lose that one only."""
        self.dma_errors += 1
        if not dma.enabled:
            return False
        if not self._single:
            self._single = True
            return True
        self._single = False
        generation = self.ring.generation
        try:
            descriptors = bytes(await self.ring.read(dma, self._wanted))
        except DmaError:
            return False
        parsed = parse(descriptors, self.context, 1)
        if parsed.used and self.ring.generation == generation:
            self.context = parsed.context
            self._passed(parsed, parsed.used)
            await self._settle(dma)
        return bool(parsed.used)


_DONE = bytes([DD])


def _without_fcs(pieces: list[Buffer], total: int) -> list[Buffer]:
    """The frame brings its own FCS; the wire makes one anyway."""
    kept: list[Buffer] = []
    left = max(total - FCS, 0)
    for piece in pieces:
        kept.append(piece[:left])
        left -= len(kept[-1])
    return [piece for piece in kept if len(piece)]
