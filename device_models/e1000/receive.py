# SPDX-License-Identifier: BSD-3-Clause
"""The receive side: filters, the packet buffer, and the ring (Software Developer's Manual, 3.2)."""

from collections import deque
from collections.abc import Callable
from zlib import crc32

from vfio_user.device_models.device import Dma, DmaError, Host, pause
from vfio_user.device_models.e1000 import checksum
from vfio_user.device_models.e1000.bits import Cause, Ctrl, Rctl, Rxcsum
from vfio_user.device_models.e1000.descriptors import ADDRESS, DD, EOP, IXSM, PIF, RECEIVE, SIZE, VP
from vfio_user.device_models.e1000.filters import ACCEPTED, FLOW_CONTROL, INEXACT, AddressFilter
from vfio_user.device_models.e1000.interrupts import Causes, DelayedCause
from vfio_user.device_models.e1000.options import Settings
from vfio_user.device_models.e1000.ring import Ring
from vfio_user.device_models.e1000.statistics import FCS, Statistics
from vfio_user.device_models.net import NetBackend
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.registers import RegisterFile

CAPACITY = 128 * 1024
"""Bytes that the packet buffer holds before frames are refused. The chip has 48 KiB, but its frames come at
the speed of a wire; ours come in bursts, as a scheduler lets them."""
SHORTEST = 60  # bytes without FCS; what a real wire would have padded
LONGEST_STANDARD, LONGEST = 1522, 16384  # with FCS (3.2.1, 13.4.22 RCTL.LPE)
BATCH = 64  # descriptors
NEVER = 1 << 62
VERIFIED = 8
"""Up to so many waiting frames have their checksums verified under the policy "auto"."""

_NO_FCS = bytes(FCS)
_BUFFER_SIZES = (2048, 1024, 512, 256)


class Receiver:
    """Frames from the wire (or looped back) on their way into guest memory."""

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
        self._port = port
        self._causes = causes
        self._statistics = statistics
        self._counts = statistics.received
        self._always_verify, self._real_fcs = settings.verify, settings.fcs
        self._rctl, self._ctrl, self._vet = file.cell("RCTL"), file.cell("CTRL"), file.cell("VET")
        self._rxcsum, self._small = file.cell("RXCSUM"), file.cell("RSRPD")
        self._no_buffers = file.cell("RNBC")
        self.ring = Ring(file, "RD")
        self.filter = AddressFilter(file)
        self.delay = DelayedCause(host, causes, Cause.RXT0, file.cell("RDTR"), file.cell("RADV"))
        self.on_flow_control: Callable[[bytes], bool] = lambda frame: False
        """Takes a frame sent to the flow control address; says whether it was one, and is used up."""
        self.xoff_above = NEVER
        """Bytes in the packet buffer above which `on_full` is called."""
        self.on_full: Callable[[], None] = lambda: None
        self.on_room: Callable[[], None] = lambda: None
        """Called when frames have left the packet buffer."""
        self.fifo: deque[tuple[bytes, int]] = deque()
        """Frames without FCS, each with its verdict."""
        self.fifo_bytes = 0
        self.refused = False
        """Whether the port waits to be told that there is room."""
        self.open = False
        """Whether frames reach the MAC: there is a link, and no loopback."""
        self._limit = BATCH
        self._under_way = 0
        self.filtered = self.dropped = self.missed = self.dma_errors = 0

    @property
    def enabled(self) -> bool:
        return bool(self._rctl.value & Rctl.EN)

    @property
    def has_room(self) -> bool:
        return self.fifo_bytes < CAPACITY

    def receive(self, frame: bytes) -> bool:
        """A frame from the port: see `net.Receiver.receive`."""
        if self.fifo_bytes >= CAPACITY:
            self.refused = True
            return False
        if self.open:
            self.take(frame)
        else:
            self.dropped += 1
        return True

    def take(self, frame: bytes, *, looped: bool = False) -> None:
        """A frame has reached the MAC: filter it, count it, put it into the packet buffer."""
        verdict = self.filter.verdicts.get(frame[:6])
        if verdict is None:
            if len(frame) < 14:
                self._statistics.count("RUC")
                return
            verdict = self.filter.judge(frame[:6])
        length = len(frame) + FCS
        plain = verdict == ACCEPTED and length <= LONGEST_STANDARD and not self._rctl.value & Rctl.VFE
        if not plain and not self._passes(frame, verdict, length):
            self._counts.add_other(length)
            return
        if looped and len(self.fifo) >= self.ring.owned:
            self._miss(length)
            return
        self._counts.add(1, length, frame)
        if not self._rctl.value & Rctl.EN:  # packets are counted even so (13.4.22, RCTL.EN)
            self.dropped += 1
            return
        if self.ring.head.value == self.ring.tail.value:
            self._no_buffers.value += 1
        self.fifo.append((frame, verdict))
        self.fifo_bytes += length
        if self.fifo_bytes > self.xoff_above:
            self.on_full()
        self._host.start("receive", self.work)

    def _passes(self, frame: bytes, verdict: int, length: int) -> bool:
        """The rarer parts of the filter."""
        if verdict & FLOW_CONTROL and self.on_flow_control(frame):
            return False
        if not verdict & ACCEPTED:
            self.filtered += 1
            return False
        control = self._rctl.value
        if length > LONGEST_STANDARD and (not control & Rctl.LPE or length > LONGEST):
            self._statistics.count("ROC")
            self.dropped += 1
            return False
        tagged = int.from_bytes(frame[12:14], "big") == self._vet.value
        if control & Rctl.VFE and tagged and not self.filter.vlan_passes(int.from_bytes(frame[14:16], "big")):
            self.filtered += 1
            return False
        return True

    def _miss(self, length: int) -> None:
        """The frame is lost: there is nobody to hold it back, and no descriptor for it."""
        self.missed += 1
        self._statistics.count("MPC")
        self._counts.add_other(length)
        self._causes.set(Cause.RXO)

    def ring_moved(self) -> None:
        """The guest has written the ring's base, length or head: what was read is void."""
        self.ring.generation += 1

    def reset(self) -> None:
        self.ring_moved()
        self.delay.reset()
        self.filter.changed()
        self.discard()

    def discard(self) -> None:
        """Forget the frames in the packet buffer, but those that are on their way into guest memory."""
        while len(self.fifo) > self._under_way:
            self.fifo_bytes -= len(self.fifo.pop()[0]) + FCS
            self.dropped += 1
        self._limit = BATCH
        self._tell_room()

    def _tell_room(self) -> None:
        if self.refused and self.fifo_bytes <= CAPACITY // 2:
            self.refused = False
            self._port.ready()
        self.on_room()

    def wake(self) -> None:
        """Something that the task may have waited for has changed."""
        if self.fifo:
            self._host.start("receive", self.work)

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
        ring = self.ring
        if not self.fifo or not self.enabled or not ring.owned:
            return False
        generation, wanted = ring.generation, max(self._limit, self._needed(len(self.fifo[0][0])))
        try:
            descriptors = await ring.read(dma, wanted)
            if ring.generation != generation or not self.fifo:
                return bool(self.fifo)
            frames, used, segments, done = self._fill(descriptors)
            if not frames:
                return self._give_up_on_first()
            self._under_way = frames
            await dma.write_many(segments)
            if ring.generation == generation:
                await dma.write_many(ring.write_back(done, used))
        except DmaError:
            self.dma_errors += 1
            return ring.generation != generation or self._failed()
        finally:
            self._under_way = 0
        if ring.generation == generation:
            self._commit(frames, used)
        return True

    def _needed(self, length: int) -> int:
        """Descriptors for a frame of `length` bytes."""
        return -(-(max(length, SHORTEST) + FCS) // self.buffer_size())

    def buffer_size(self) -> int:
        """Bytes of each receive buffer (RCTL.BSIZE and BSEX)."""
        choice = self._rctl.value >> Rctl.BSIZE_SHIFT & 3
        extended = self._rctl.value & Rctl.BSEX and choice
        return _BUFFER_SIZES[choice] << 4 if extended else _BUFFER_SIZES[choice]

    def _fill(self, descriptors: Buffer) -> tuple[int, int, list[tuple[int, Buffer]], bytearray]:
        """Match waiting frames with descriptors: how many of each, the data, the descriptors when done.

        The loop over frames is the hot path of receiving (1 to 2 us each), hence one long function.
        """
        control, offload = self._rctl.value, self._rxcsum.value
        size, crc = self.buffer_size(), b"" if control & Rctl.SECRC else _NO_FCS
        real_fcs = crc and self._real_fcs
        vet = self._vet.value.to_bytes(2, "big") if self._ctrl.value & Ctrl.VME else None
        verify = offload & (Rxcsum.IPOFL | Rxcsum.TUOFL) and (
            self._always_verify or len(self.fifo) <= VERIFIED
        )
        first_byte = offload & Rxcsum.PCSS
        room = len(descriptors) // SIZE
        done, used, frames = bytearray(descriptors), 0, 0
        segments: list[tuple[int, Buffer]] = []
        for frame, verdict in self.fifo:
            if used == room or frames == self._limit:
                break
            status, errors, special, packet_sum = DD | EOP, 0, 0, 0
            if verdict & INEXACT:
                status |= PIF
            if frame[12:14] == vet:
                special, status = int.from_bytes(frame[14:16], "big"), status | VP
                frame = frame[:12] + frame[16:]
            if verify:
                more, errors = checksum.examine(frame, offload, self._network_start(frame))
                status |= more
            else:
                status |= IXSM
            if len(frame) < SHORTEST:
                frame = frame.ljust(SHORTEST, b"\0")
            if first_byte:
                packet_sum = checksum.packet_checksum(frame, first_byte)
            frame += crc32(frame).to_bytes(FCS, "little") if real_fcs else crc
            length = len(frame)
            (address,) = ADDRESS.unpack_from(done, used * SIZE)
            if length <= size and address:
                segments.append((address, frame))
                RECEIVE.pack_into(done, used * SIZE, address, length, packet_sum, status, errors, special)
                used += 1
            else:
                end = self._spread(frame, done, used, segments, (packet_sum, status, errors, special))
                if end < 0:
                    break
                used = end
            frames += 1
        return frames, used, segments, done

    def _network_start(self, frame: bytes) -> int:
        """Where the network header begins: behind a tag that was left in."""
        return 18 if frame[12:14] == self._vet.value.to_bytes(2, "big") else 14

    def _spread(
        self,
        frame: bytes,
        done: bytearray,
        used: int,
        segments: list[tuple[int, Buffer]],
        last: tuple[int, int, int, int],
    ) -> int:
        """Put a frame into several buffers; give the descriptors used up to then, or -1: there are too few.

        A descriptor with a null address takes no data and is written back as done (3.2.4).
        """
        size, place, parts = self.buffer_size(), 0, []
        while place < len(frame):
            if (used + 1) * SIZE > len(done):
                return -1
            (address,) = ADDRESS.unpack_from(done, used * SIZE)
            part = frame[place : place + size] if address else b""
            place += len(part)
            ends = place == len(frame)
            fields = last if ends else (0, DD, 0, 0)
            parts.append((address, part))
            RECEIVE.pack_into(done, used * SIZE, address, len(part), *fields)
            used += 1
        segments += [(address, part) for address, part in parts if part]
        return used

    def _give_up_on_first(self) -> bool:
        """The first frame needs more descriptors than there are: wait, unless there will never be enough."""
        frame = self.fifo[0][0]
        if self.ring.owned < self.ring.count - 1 and self._needed(len(frame)) < self.ring.count:
            return False
        self._drop_first()
        return True

    def _failed(self) -> bool:
        """A descriptor or buffer cannot be reached: find the frame it hits, and lose that one only."""
        if not self._host.dma.enabled:
            return False
        if self._limit > 1:
            self._limit = 1
        else:
            self._drop_first()
        return True

    def _drop_first(self) -> None:
        frame, _ = self.fifo.popleft()
        self.fifo_bytes -= len(frame) + FCS
        self.dropped += 1
        self._tell_room()

    def _commit(self, frames: int, used: int) -> None:
        """The write has returned: the frames are the guest's now."""
        small, causes, size = self._small.value, 0, 0
        for _ in range(frames):
            length = len(self.fifo.popleft()[0])
            size += length + FCS
            if length <= small:
                causes = Cause.SRPD
        self.fifo_bytes -= size
        threshold = self.ring.count >> 1 + (self._rctl.value >> Rctl.RDMTS_SHIFT & 3)
        before = self.ring.owned
        self.ring.advance(used)
        if self.ring.owned <= threshold < before:
            causes |= Cause.RXDMT0
        if not self.fifo:
            self._limit = BATCH
        if causes:
            self._causes.set(causes)
        self.delay.event()
        self._tell_room()
