# SPDX-License-Identifier: BSD-3-Clause
"""Ethernet flow control: PAUSE frames (IEEE 802.3, annex 31B; Software Developer's Manual, 8.4)."""

from collections.abc import Callable

from vfio_user.device_models.device import Host
from vfio_user.device_models.e1000.bits import XON_ENABLE, Ctrl, Rctl
from vfio_user.device_models.e1000.packet_buffer import NEVER, PacketBuffer
from vfio_user.device_models.e1000.statistics import Statistics
from vfio_user.device_models.net import NetBackend
from vfio_user.device_models.registers import RegisterFile
from vfio_user.device_models.state import U16, Apply, Fields, Reader, Section, time_left
from vfio_user.device_models.timers import Timer

PAUSE = b"\x00\x01"
"""The opcode."""
QUANTUM = (51_200, 5_120, 512)  # ns: 512 bit times at 10, 100 and 1000 Mb/s
LONGEST_PAUSE = U16 * max(QUANTUM)


class FlowControl:
    """Stops our transmitter for the partner, and the partner when our packet buffer fills."""

    def __init__(
        self, host: Host, port: NetBackend, file: RegisterFile, statistics: Statistics, buffer: PacketBuffer
    ) -> None:
        self._host = host
        self._port = port
        self._file = file
        self._statistics = statistics
        self._buffer = buffer
        self._timer: Timer | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when `paused` may have changed."""
        self.paused_until: int | None = None
        """Device time; None: the partner has asked for no pause."""
        self.xoff_sent = False
        """Whether the partner still owes us a pause."""
        self.speed = 2
        self._owed: int | None = None
        buffer.on_flow_control, buffer.on_full = self.take, self.full

    @property
    def paused(self) -> bool:
        return self.paused_until is not None

    def configure(self) -> None:
        """CTRL or a threshold was written."""
        threshold = self._file.cell("FCRTH").value & 0xFFF8
        sends = self._file.cell("CTRL").value & Ctrl.TFCE and threshold
        self._buffer.xoff_above = threshold if sends else NEVER

    def take(self, frame: bytes) -> bool:
        """A frame to the flow control address; True: it goes no further."""
        control = self._file.cell("RCTL").value
        kind = self._file.cell("FCT").value.to_bytes(2, "big")
        if not self._file.cell("CTRL").value & Ctrl.RFCE or frame[12:14] != kind or len(frame) < 18:
            return False
        if frame[14:16] != PAUSE:
            self._statistics.count("FCRUC")
            return not control & Rctl.PMCF
        self._pause(int.from_bytes(frame[16:18], "big"))
        return bool(control & Rctl.DPF)

    def _pause(self, quanta: int) -> None:
        self._statistics.count("XOFFRXC" if quanta else "XONRXC")
        self._stop_timer()
        if quanta:
            self.paused_until = self._host.clock() + quanta * QUANTUM[self.speed]
            self._timer = self._host.call_at(self.paused_until, self._over)
        self.on_change()

    def _over(self) -> None:
        self._timer = self.paused_until = None
        self.on_change()

    def full(self) -> None:
        """The packet buffer is over its upper threshold."""
        if not self.xoff_sent:
            self.xoff_sent = True
            self.send(self._file.cell("FCTTV").value)

    def drained(self) -> None:
        """Frames have left the packet buffer."""
        low = self._file.cell("FCRTL").value
        if self.xoff_sent and self._buffer.bytes <= low & 0xFFF8:
            self.xoff_sent = False
            if low & XON_ENABLE:
                self.send(0)

    def send(self, quanta: int) -> None:
        """Send a PAUSE frame: XOFF, or XON with 0. While the device is stopped, the last one is owed."""
        if not self._host.running:
            self._owed = quanta
            self._host.start("pause", self._send_owed)
            return
        self._statistics.count("XOFFTXC" if quanta else "XONTXC")
        address = self._address("FCAL", "FCAH") + self._address("RAL", "RAH")
        kind = self._file.cell("FCT").value.to_bytes(2, "big")
        frame = address + kind + PAUSE + quanta.to_bytes(2, "big")
        self._port.send([frame.ljust(60, b"\0")])
        self._statistics.sent.add_other(64)

    async def _send_owed(self) -> None:
        quanta, self._owed = self._owed, None
        if quanta is not None:
            self.send(quanta)

    def _address(self, low: str, high: str) -> bytes:
        return self._file.cell(low).value.to_bytes(4, "little") + (
            self._file.cell(high).value & 0xFFFF
        ).to_bytes(2, "little")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.paused_until = None

    def reset(self) -> None:
        self._stop_timer()
        self.xoff_sent, self._owed = False, None
        self._buffer.xoff_above = NEVER

    # State

    def section(self) -> Section:
        """Who is to pause, and for how long."""
        return Section("flow", 1, self._save, self._load)

    def _save(self) -> Fields:
        until = self.paused_until
        left = None if until is None else time_left(until, self._host.clock())
        return {"pause": left, "xoff_sent": self.xoff_sent, "owed": self._owed}

    def _load(self, reader: Reader) -> Apply:
        left, xoff_sent = reader.maybe_integer("pause", LONGEST_PAUSE), reader.flag("xoff_sent")
        owed = reader.maybe_integer("owed", U16)

        def apply() -> None:
            self._stop_timer()
            self.paused_until = None if left is None else self._host.clock() + left
            self.xoff_sent, self._owed = xoff_sent, owed

        return apply

    def restored(self) -> None:
        """Let the pause end, and send what could not be sent."""
        if self.paused_until is not None:
            self._timer = self._host.call_at(self.paused_until, self._over)
        if self._owed is not None:
            self._host.start("pause", self._send_owed)
        self.configure()
