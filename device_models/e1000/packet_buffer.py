# SPDX-License-Identifier: BSD-3-Clause
"""The way of a frame from the wire into the packet buffer (Software Developer's Manual, 3.2.1 and 3.2.2)."""

from collections import deque
from collections.abc import Callable

from vfio_user.device_models.device import Host
from vfio_user.device_models.e1000.bits import Cause, Rctl
from vfio_user.device_models.e1000.filters import ACCEPTED, FLOW_CONTROL, INEXACT, AddressFilter
from vfio_user.device_models.e1000.interrupts import Causes
from vfio_user.device_models.e1000.ring import Ring
from vfio_user.device_models.e1000.statistics import FCS, Statistics
from vfio_user.device_models.net import NetBackend
from vfio_user.device_models.registers import RegisterFile
from vfio_user.device_models.state import U64, Apply, Fields, Reader, Section, counted
from vfio_user.device_models.tasks import Work

CAPACITY = 128 * 1024
"""Bytes that the packet buffer holds before frames are refused. The chip has 48 KiB, but its frames come at
the speed of a wire; ours come in bursts, as a scheduler lets them."""
MOST = 3 * CAPACITY
"""Bytes beyond which a frame that is looped back is lost."""
LONGEST_STANDARD, LONGEST = 1522, 16384  # bytes with FCS (3.2.1, and RCTL.LPE in 13.4.22)
SHORTEST = 14 + FCS  # a frame without even a header is a fragment; shorter than 64 is not: nobody pads here
MOST_FRAMES = MOST // SHORTEST + 1
_LONGEST_SECTION = 2 * (MOST + LONGEST) + 5 * MOST_FRAMES + 512
"""Bytes as JSON: hexadecimal frames with what is around each and its verdict, and the rest."""
NEVER = 1 << 62
_KEPT = {verdict | flow for verdict in (ACCEPTED, ACCEPTED | INEXACT) for flow in (0, FLOW_CONTROL)}


def _from_version_1(fields: Fields) -> Fields:
    """Version 1 left out by which filter each frame had passed, and judged it anew: by filters that the
    guest may have changed since. "Inexact" is always true enough: it makes the guest look for itself."""
    frames = fields["frames"]
    count = len(frames) if isinstance(frames, list) else 0
    return {**fields, "verdicts": bytes([ACCEPTED | INEXACT] * count).hex()}


class PacketBuffer:
    """The receiving MAC and its buffer. `work` is the task that empties it."""

    def __init__(
        self,
        host: Host,
        port: NetBackend,
        file: RegisterFile,
        causes: Causes,
        statistics: Statistics,
        ring: Ring,
        work: Work,
    ) -> None:
        self._host = host
        self._port = port
        self._causes = causes
        self._statistics = statistics
        self._counts = statistics.received
        self._ring = ring
        self._work = work
        self._rctl, self._vet = file.cell("RCTL"), file.cell("VET")
        self._no_descriptors = file.cell("RNBC")
        self.filter = AddressFilter(file)
        self._verdicts = self.filter.verdicts
        self.on_flow_control: Callable[[bytes], bool] = lambda frame: False
        """Takes a frame sent to the flow control address; says whether it was one, and is used up."""
        self.on_full: Callable[[], None] = lambda: None
        """Called when a frame has come and more than `xoff_above` bytes wait."""
        self.on_room: Callable[[], None] = lambda: None
        """Called when frames have left the buffer."""
        self.frames: deque[tuple[bytes, int]] = deque()
        """Without FCS, each with the filter's verdict."""
        self.bytes = 0
        """Of the frames, with FCS."""
        self.refused = False
        """Whether the port waits to be told that there is room."""
        self.open = False
        """Whether the wire's frames come in: there is a link, and no loopback."""
        self.xoff_above = NEVER
        self.under_way = 0
        """How many of the first frames are being written into guest memory."""
        self._plain = 0
        self.filtered = self.dropped = self.missed = 0

    @property
    def has_room(self) -> bool:
        return self.bytes < CAPACITY

    def configure(self) -> None:
        """RCTL or a register of the filter was written.

        Frames up to `_plain` bytes whose destination is accepted need no further look.
        """
        self.filter.changed()
        plain = self._rctl.value & (Rctl.EN | Rctl.VFE) == Rctl.EN
        self._plain = LONGEST_STANDARD if plain else 0

    def receive(self, frame: bytes) -> bool:
        """A frame from the port: see `net.Receiver.receive`. The hot path of receiving."""
        if self.bytes >= CAPACITY or not self._host.running:
            self.refused = True
            if not self._host.running:
                self._host.start("port", self._tell_port)
            return False
        if not self.open:
            self.dropped += 1
            return True
        length = len(frame) + FCS
        if self._verdicts.get(frame[:6]) == ACCEPTED and SHORTEST <= length <= self._plain:
            self._keep(frame, ACCEPTED, length)
        else:
            self.take(frame)
        return True

    def take(self, frame: bytes, *, looped: bool = False) -> None:
        """A frame, of any kind, has reached the MAC: filter it, count it, keep it."""
        length = len(frame) + FCS
        if length < SHORTEST:
            self._statistics.count("RUC")
            self.dropped += 1
            return
        verdict = self._verdicts.get(frame[:6])
        if verdict is None:
            verdict = self.filter.judge(frame[:6])
        if not self._passes(frame, verdict, length):
            self._counts.add_other(length)
        elif looped and (len(self.frames) >= self._ring.owned or self.bytes >= MOST):
            self._miss(length)
        elif self._rctl.value & Rctl.EN:
            self._keep(frame, verdict, length)
        else:  # counted even so (13.4.22, RCTL.EN)
            self._counts.add(1, length, frame)
            self.dropped += 1

    def _passes(self, frame: bytes, verdict: int, length: int) -> bool:
        if verdict & FLOW_CONTROL and self.on_flow_control(frame):
            return False
        control = self._rctl.value
        if not verdict & ACCEPTED or not self._vlan_passes(frame, control):
            self.filtered += 1
            return False
        if length > LONGEST_STANDARD and (not control & Rctl.LPE or length > LONGEST):
            self._statistics.count("ROC")
            self.dropped += 1
            return False
        return True

    def _vlan_passes(self, frame: bytes, control: int) -> bool:
        if not control & Rctl.VFE or int.from_bytes(frame[12:14], "big") != self._vet.value:
            return True
        return self.filter.vlan_passes(int.from_bytes(frame[14:16], "big"))

    def _keep(self, frame: bytes, verdict: int, length: int) -> None:
        lengths = self._counts.lengths
        lengths[length] = lengths.get(length, 0) + 1
        if frame[0] & 1:
            self._counts.add_group(frame)
        ring, frames = self._ring, self.frames
        if ring.head.value == ring.tail.value:
            self._no_descriptors.value += 1
        if not frames:  # otherwise the task runs, or waits for something that a frame does not change
            self._host.start("receive", self._work)
        frames.append((frame, verdict))
        self.bytes += length
        if self.bytes > self.xoff_above:
            self.on_full()

    def _miss(self, length: int) -> None:
        """The frame is lost: there is nobody to hold it back, and no descriptor for it."""
        self.missed += 1
        self._statistics.count("MPC")
        self._counts.add_other(length)
        self._causes.set(Cause.RXO)

    def wake(self) -> None:
        """Something that the task may have waited for has changed."""
        if self.frames:
            self._host.start("receive", self._work)

    def remove(self, frames: int) -> int:
        """The first frames are in guest memory, or lost; their bytes."""
        before = self.bytes
        if frames == len(self.frames):
            self.frames.clear()
            self.bytes = 0
        else:
            for _ in range(frames):
                self.bytes -= len(self.frames.popleft()[0]) + FCS
        removed = before - self.bytes
        self._tell_room()  # more may come at once
        return removed

    def discard(self) -> None:
        """Forget all frames, but those that are on their way into guest memory."""
        while len(self.frames) > self.under_way:
            self.bytes -= len(self.frames.pop()[0]) + FCS
            self.dropped += 1
        self._tell_room()

    def _tell_room(self) -> None:
        self._accept()
        self.on_room()

    def _accept(self) -> None:
        if self.refused and self.bytes <= CAPACITY // 2:
            self.refused = False
            self._port.ready()

    async def _tell_port(self) -> None:
        """A task that runs when the device is not stopped any more."""
        self._accept()

    # State

    def section(self) -> Section:
        """The frames that the wire has got rid of and the guest has not got."""
        upgrades = {1: _from_version_1}
        return Section("receive", 2, self._save, self._load, upgrades, _LONGEST_SECTION, MOST_FRAMES + 64)

    def _save(self) -> Fields:
        return {
            "frames": [frame.hex() for frame, _ in self.frames],
            "verdicts": bytes(verdict for _, verdict in self.frames).hex(),
            "filtered": counted(self.filtered),
            "dropped": counted(self.dropped),
            "missed": counted(self.missed),
        }

    def _load(self, reader: Reader) -> Apply:
        frames = reader.data_list("frames", MOST_FRAMES, LONGEST - FCS, SHORTEST - FCS)
        total = sum(map(len, frames)) + FCS * len(frames)
        if total > MOST + LONGEST:
            reader.refuse("frames", f"{total} bytes are more than the packet buffer holds")
        verdicts = reader.data("verdicts", len(frames))
        if not {*verdicts} <= _KEPT:
            reader.refuse("verdicts", "the filter keeps no frame with such a verdict")
        filtered, dropped, missed = (reader.integer(n, U64) for n in ("filtered", "dropped", "missed"))

        def apply() -> None:
            self.frames = deque(zip(frames, verdicts, strict=True))
            self.bytes = total
            self.filtered, self.dropped, self.missed = filtered, dropped, missed

        return apply

    def restored(self) -> None:
        """What follows from the registers; `refused` is between this device and its own port."""
        self.configure()
        self.wake()
        if self.refused:
            self._host.start("port", self._tell_port)
