# SPDX-License-Identifier: BSD-3-Clause
"""The receive ring: from the packet buffer into guest memory (Software Developer's Manual, 3.2)."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple
from zlib import crc32

from vfio_user.device_models.device import Dma, DmaError, Host, pause
from vfio_user.device_models.e1000 import checksum
from vfio_user.device_models.e1000.bits import Cause, Ctrl, Rctl, Rxcsum
from vfio_user.device_models.e1000.descriptors import (
    CHECKSUM_SHIFT,
    DD,
    EOP,
    ERRORS_SHIFT,
    IXSM,
    PIF,
    SPECIAL_SHIFT,
    STATUS_SHIFT,
    VP,
    build_receive,
    parse_addresses,
)
from vfio_user.device_models.e1000.filters import INEXACT
from vfio_user.device_models.e1000.interrupts import Causes, DelayedCause
from vfio_user.device_models.e1000.options import Settings, Verify
from vfio_user.device_models.e1000.packet_buffer import PacketBuffer
from vfio_user.device_models.e1000.ring import Ring
from vfio_user.device_models.e1000.statistics import FCS, Statistics
from vfio_user.device_models.net import NetBackend
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.registers import RegisterFile
from vfio_user.device_models.state import U64, Apply, Fields, Reader, Section, counted

SHORTEST = 60  # bytes without FCS; what a real wire would have padded
BATCH = 64  # descriptors
VERIFIED = 8
"""Up to so many waiting frames have their checksums verified under the policy "auto"."""

_RUNS_OUT_SHIFT = 3
"""An eighth of the ring: where the guest says "few" of a half, it hears of it in time all the same."""
_NO_FCS = bytes(FCS)
_BUFFER_SIZES = (2048, 1024, 512, 256)


class _Batch(NamedTuple):
    """What one turn of the task writes."""

    frames: int
    used: int
    """Descriptors."""
    data: list[tuple[int, Buffer]]
    done: bytes
    """The descriptors as they are to be written back."""


class Receiver:
    """The task that moves frames into guest memory."""

    def __init__(
        self,
        host: Host,
        port: NetBackend,
        file: RegisterFile,
        causes: Causes,
        statistics: Statistics,
        settings: Settings,
    ) -> None:
        self._host = host
        self._causes = causes
        self._settings = settings
        self._trusts = settings.verify is Verify.TRUST
        self._rctl, self._ctrl, self._vet = file.cell("RCTL"), file.cell("CTRL"), file.cell("VET")
        self._rxcsum, self._small = file.cell("RXCSUM"), file.cell("RSRPD")
        self.ring = Ring(file, "RD")
        self.delay = DelayedCause(host, causes, Cause.RXT0, file.cell("RDTR"), file.cell("RADV"))
        self.buffer = PacketBuffer(host, port, file, causes, statistics, self.ring, self.work)
        self._limit = BATCH
        self.dma_errors = 0
        causes.ring_runs_out = self._runs_out

    def _runs_out(self) -> bool:
        """Whether what comes next would have to wait, or does already."""
        ring, buffer = self.ring, self.buffer
        if ring.owned <= min(self._few(), ring.count >> _RUNS_OUT_SHIFT):
            return True
        waits = buffer.frames and not buffer.under_way
        return bool(waits) and ring.owned < self._needed(len(buffer.frames[0][0]))

    def _few(self) -> int:
        """The receive descriptor minimum threshold (RCTL.RDMTS), in descriptors."""
        return self.ring.count >> 1 + (self._rctl.value >> Rctl.RDMTS_SHIFT & 3)

    def ring_moved(self) -> None:
        """The guest has written the ring's base, length or head: what was read is void."""
        self.ring.generation += 1

    def reset(self) -> None:
        """After the registers have been reset and the task was cut."""
        self.ring_moved()
        self.delay.reset()
        self._limit = BATCH
        self.buffer.configure()
        self.buffer.discard()

    def section(self) -> Section:
        """What the registers and the packet buffer do not hold."""
        return Section("receive_ring", 1, self._save, self._load)

    def _save(self) -> Fields:
        return {"delay": self.delay.save(), "dma_errors": counted(self.dma_errors)}

    def _load(self, reader: Reader) -> Apply:
        apply_delay = self.delay.load(reader.maybe_record("delay"))
        dma_errors = reader.integer("dma_errors", U64)

        def apply() -> None:
            apply_delay()
            self.ring_moved()
            self._limit, self.dma_errors = BATCH, dma_errors

        return apply

    def restored(self) -> None:
        """Let the delay end, and the task look for frames."""
        self.delay.restored()
        self.buffer.restored()

    async def work(self) -> None:
        """The task: moves frames into guest memory until there are no frames or no descriptors left."""
        while await self._batch(self._host.dma):
            await pause()

    async def _batch(self, dma: Dma) -> bool:
        """Move a bounded number of frames; tell whether to go on.

        Until the writes have returned, frames stay in the packet buffer and the head stays where it is: a
        batch that was cut is done again, into the same descriptors. Data and descriptors are two writes:
        were they one, a buffer that fails would not keep its descriptor from being marked as done.
        """
        ring, buffer = self.ring, self.buffer
        if not buffer.frames or not self._rctl.value & Rctl.EN or not ring.owned:
            return False
        generation, wanted = ring.generation, max(self._limit, self._needed(len(buffer.frames[0][0])))
        try:
            descriptors = await ring.read(dma, wanted)
            if ring.generation != generation or not buffer.frames:
                return bool(buffer.frames)
            batch = self._fill(descriptors)
            if not batch.frames:
                return self._give_up_on_first()
            buffer.under_way = batch.frames
            await dma.write_many(batch.data)
            if ring.generation == generation:
                await dma.write_many(ring.write_back(batch.done, batch.used))
        except DmaError:
            self.dma_errors += 1
            return ring.generation != generation or self._failed()
        finally:
            buffer.under_way = 0
        if ring.generation == generation:
            self._commit(batch)
        return bool(buffer.frames)

    def _needed(self, length: int) -> int:
        """Descriptors for a frame of `length` bytes."""
        return -(-(max(length, SHORTEST) + FCS) // self.buffer_size())

    def buffer_size(self) -> int:
        """Bytes of each receive buffer (RCTL.BSIZE and BSEX)."""
        choice = self._rctl.value >> Rctl.BSIZE_SHIFT & 3
        extended = self._rctl.value & Rctl.BSEX and choice
        return _BUFFER_SIZES[choice] << 4 if extended else _BUFFER_SIZES[choice]

    def _fill(self, descriptors: Buffer) -> _Batch:
        """Match waiting frames with descriptors.

        The loop is the hot path of receiving, half a microsecond a frame for the usual one, hence one long
        function: what the settings rule out is decided before it.
        """
        control, offload = self._rctl.value, self._rxcsum.value
        size, crc = self.buffer_size(), b"" if control & Rctl.SECRC else _NO_FCS
        waiting, vlans = self.buffer.frames, self._ctrl.value & Ctrl.VME
        vet = self._vet.value.to_bytes(2, "big")
        wanted = offload & (Rxcsum.IPOFL | Rxcsum.TUOFL)
        trusts = wanted and self._trusts
        verify = wanted and (self._settings.verify is Verify.ALWAYS or len(waiting) <= VERIFIED)
        special_cases = verify or offload & Rxcsum.PCSS or self._settings.fcs
        addresses = parse_addresses(descriptors)
        room, used, frames = len(addresses), 0, 0
        data: list[tuple[int, Buffer]] = []
        done: list[int] = []
        for frame, verdict in islice(waiting, min(room, self._limit)):
            status = DD | EOP | IXSM | PIF if verdict & INEXACT else DD | EOP | IXSM
            if trusts and (sums := checksum.vouched(frame, offload)):
                status = status & ~IXSM | sums
            last = status << STATUS_SHIFT
            special_case = special_cases or (vlans and frame[12:14] == vet)
            if special_case:
                frame, last = self._special_case(frame, status, bool(verify))
            length = len(frame)
            frame = frame + crc if length >= SHORTEST else frame.ljust(SHORTEST, b"\0") + crc
            if special_case and crc and self._settings.fcs:
                frame = frame[:-FCS] + crc32(frame[:-FCS]).to_bytes(FCS, "little")
            length = len(frame)
            address = addresses[used]
            if length <= size and address:
                data.append((address, frame))
                done += (address, last | length)
                used += 1
            else:
                count = self._spread(frame, addresses[used:], data, done, last)
                if not count:
                    break
                used += count
            frames += 1
            if used == room:
                break
        return _Batch(frames, used, data, build_receive(done))

    def _special_case(self, frame: bytes, status: int, verify: bool) -> tuple[bytes, int]:
        """Strip a VLAN tag, look at checksums: the frame, and what its descriptor says but for the length."""
        offload, vet = self._rxcsum.value, self._vet.value.to_bytes(2, "big")
        errors = special = packet_sum = 0
        tagged = frame[12:14] == vet
        if tagged and self._ctrl.value & Ctrl.VME:
            special, status, tagged = int.from_bytes(frame[14:16], "big"), status | VP, False
            frame = frame[:12] + frame[16:]
        if verify and status & IXSM:
            more, errors = checksum.examine(frame, offload, 18 if tagged else 14)
            status = status & ~IXSM | more
        if offload & Rxcsum.PCSS:
            packet_sum = checksum.packet_checksum(frame.ljust(SHORTEST, b"\0"), offload & Rxcsum.PCSS)
        fields = packet_sum << CHECKSUM_SHIFT | status << STATUS_SHIFT
        return frame, fields | errors << ERRORS_SHIFT | special << SPECIAL_SHIFT

    def _spread(
        self,
        frame: bytes,
        addresses: Sequence[int],
        data: list[tuple[int, Buffer]],
        done: list[int],
        last: int,
    ) -> int:
        """Put a frame into several buffers; give how many descriptors it takes, 0: there are too few.

        A descriptor with a null address takes no data and is written back as done (3.2.4).
        """
        size, place = self.buffer_size(), 0
        parts: list[tuple[int, Buffer]] = []
        numbers: list[int] = []
        for address in addresses:
            part = frame[place : place + size] if address else b""
            place += len(part)
            numbers += (address, (last if place == len(frame) else DD << STATUS_SHIFT) | len(part))
            if part:
                parts.append((address, part))
            if place == len(frame):
                data += parts
                done += numbers
                return len(numbers) // 2
        return 0

    def _give_up_on_first(self) -> bool:
        """The first frame needs more descriptors than there are: wait, unless there will never be enough."""
        frame = self.buffer.frames[0][0]
        if self.ring.owned < self.ring.count - 1 and self._needed(len(frame)) < self.ring.count:
            self._causes.update()
            return False
        self._lose_first()
        return True

    def _failed(self) -> bool:
        """A descriptor or buffer cannot be reached: find the frame it hits, and lose that one only."""
        if not self._host.dma.enabled:
            return False
        if self._limit > 1:
            self._limit = 1
        else:
            self._lose_first()
        return True

    def _lose_first(self) -> None:
        self.buffer.dropped += 1
        self.buffer.remove(1)

    def _commit(self, batch: _Batch) -> None:
        """The writes have returned: the frames are the guest's now."""
        ring, causes, small = self.ring, 0, self._small.value
        if small and any(len(frame) <= small for frame, _ in islice(self.buffer.frames, batch.frames)):
            causes = Cause.SRPD
        few, before = self._few(), ring.owned
        ring.advance(batch.used)
        if before - batch.used <= few < before:
            causes |= Cause.RXDMT0
        if batch.frames == len(self.buffer.frames):
            self._limit = BATCH
        if causes:
            self._causes.set(causes)
        self.delay.event()
        self._causes.received += self.buffer.remove(batch.frames)
        if self._runs_out():
            self._causes.update()  # which a cause that is held back by RDTR would not do
