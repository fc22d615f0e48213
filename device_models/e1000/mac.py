# SPDX-License-Identifier: BSD-3-Clause
"""The parts of the 82540EM put together: where frames go, what the link is, what a reset does."""

from vfio_user.device_models.device import Host
from vfio_user.device_models.e1000.bits import (
    LOOPBACK_MAC,
    LOOPBACK_TRANSCEIVER,
    RAH_AV,
    Cause,
    Ctrl,
    Rctl,
    Status,
)
from vfio_user.device_models.e1000.eeprom import Eeprom, make_content
from vfio_user.device_models.e1000.flow_control import FlowControl
from vfio_user.device_models.e1000.interrupts import Causes
from vfio_user.device_models.e1000.options import Settings
from vfio_user.device_models.e1000.phy import Phy
from vfio_user.device_models.e1000.receive import Receiver
from vfio_user.device_models.e1000.statistics import Statistics
from vfio_user.device_models.e1000.transmit import Transmitter
from vfio_user.device_models.interrupts import Interrupts
from vfio_user.device_models.net import NetBackend, Offload, WireSize
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.registers import RegisterFile
from vfio_user.device_models.segmentation import segment, wire_size
from vfio_user.device_models.state import Apply, Reader, Section


class Mac:
    """Owns the parts. Every part keeps its state in register cells and plain attributes."""

    def __init__(
        self, host: Host, port: NetBackend, file: RegisterFile, pin: Interrupts, settings: Settings
    ) -> None:
        self._host = host
        self._port = port
        self.registers = file
        self.statistics = Statistics(file)
        self.causes = Causes(host, pin, file, settings.itr, settings.rx_itr)
        self.receiver = Receiver(host, port, file, self.causes, self.statistics, settings)
        self.transmitter = Transmitter(host, file, self.causes, self.statistics, self._send)
        self.buffer = self.receiver.buffer
        self.flow = FlowControl(host, port, file, self.statistics, self.buffer)
        self.eeprom = Eeprom(make_content(settings.mac))
        self.link = False
        """What STATUS.LU says."""
        self.loopback = False
        self.phy = Phy(host, port.link_up, self.path_changed)
        self.buffer.on_room = self._room
        self.flow.on_change = self.path_changed

    def _send(self, pieces: list[Buffer], offload: Offload | None) -> WireSize | None:
        """For the transmitter: out to the port, or back in."""
        if not self.loopback:
            return self._port.send(pieces, offload)
        if not self.buffer.has_room and self.receiver.ring.owned:
            return None  # it will have room: descriptors are there
        size = wire_size(pieces, offload)
        for frame in segment(pieces, offload):
            self.buffer.take(frame, looped=True)
        return size

    def _room(self) -> None:
        """Frames have left the packet buffer."""
        self.flow.drained()
        if self.loopback:
            self.transmitter.wake()

    def path_changed(self) -> None:
        """The link, the loopback or a pause may have changed: where frames go from now on."""
        mode = self.registers.cell("RCTL").value & Rctl.LBM
        self.loopback = self.phy.loopback or mode in (LOOPBACK_MAC, LOOPBACK_TRANSCEIVER)
        changed, self.link = self.link != self.phy.link, self.phy.link
        self.buffer.open = self.link and not self.loopback
        self.transmitter.open = self.loopback or (self.link and not self.flow.paused)
        self.update_status()
        if changed:
            self.causes.set(Cause.LSC)
        self.transmitter.wake()

    def update_status(self) -> None:
        """Make STATUS anew."""
        control, link = self.registers.cell("CTRL").value, self.phy
        speed = control >> Ctrl.SPEED_SHIFT & 3 if control & Ctrl.FRCSPD else link.speed
        full_duplex = bool(control & Ctrl.FD) if control & Ctrl.FRCDPX else link.full_duplex
        value = Status.MTXCKOK | speed << Status.SPEED_SHIFT | link.speed << Status.ASDV_SHIFT
        value |= (Status.FD if full_duplex else 0) | (Status.LU if self.link else 0)
        self.flow.speed = min(speed, 2)
        self.registers.cell("STATUS").value = value | (Status.TXOFF if self.flow.paused else 0)

    def load_address(self) -> None:
        """Receive address 0 from the EEPROM."""
        mac = self.eeprom.mac
        self.registers.cell("RAL").value = int.from_bytes(mac[:4], "little")
        self.registers.cell("RAH").value = int.from_bytes(mac[4:], "little") | RAH_AV
        self.buffer.configure()

    # State

    def sections(self) -> tuple[Section, ...]:
        """Everything but the I/O window, in the order of applying."""
        return (
            Section("registers", 1, self.statistics.save_registers, self.registers.load),
            self.statistics.section(),
            self.eeprom.section(),
            self.phy.section(),
            Section("link", 1, lambda: {"up": self.link}, self._load_link),
            self.causes.section(),
            self.flow.section(),
            self.buffer.section(),
            self.receiver.section(),
            self.transmitter.section(),
        )

    def _load_link(self, reader: Reader) -> Apply:
        up = reader.flag("up")

        def apply() -> None:
            self.link = up

        return apply

    def restored(self) -> None:
        """Timers, filters, where frames go, and the tasks that have work; the cable is that of our port."""
        self.phy.restored()
        self.flow.restored()
        self.path_changed()
        self.receiver.restored()
        self.transmitter.restored()
        self.causes.restored()
        self.phy.plug(self._port.link_up)

    def reset(self) -> None:
        """CTRL.RST: everything but PCI configuration, EEPROM and PHY (13.4.1)."""
        for key in ("transmit", "receive"):
            self._host.cancel(key)
        self.registers.reset()
        self.statistics.clear()
        self.transmitter.reset()
        self.receiver.reset()
        self.flow.reset()
        self.causes.reset()
        self.link = self.phy.link  # no cause: the link itself has not changed
        self.load_address()
        self.path_changed()
