# SPDX-License-Identifier: BSD-3-Clause
"""The Intel 82540EM (8086:100e): the parts put together, and the registers connected to them.

Source: Intel, "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual".
"""

from collections.abc import Callable, Mapping

from vfio_user.device_models.device import Host
from vfio_user.device_models.e1000 import eeprom, phy
from vfio_user.device_models.e1000 import registers as rows
from vfio_user.device_models.e1000.bits import (
    LOOPBACK_MAC,
    LOOPBACK_TRANSCEIVER,
    RAH_AV,
    RDTR_FPD,
    TIDV_FPD,
    Cause,
    Ctrl,
    Mdic,
    Rctl,
    Status,
    Tctl,
)
from vfio_user.device_models.e1000.flow_control import FlowControl
from vfio_user.device_models.e1000.interrupts import Causes
from vfio_user.device_models.e1000.options import DEFAULT_MAC, OPTIONS, parse_mac
from vfio_user.device_models.e1000.receive import Receiver
from vfio_user.device_models.e1000.statistics import STATISTICS, Statistics
from vfio_user.device_models.e1000.transmit import Transmitter
from vfio_user.device_models.net import NetBackend, NetDevice, Offload, WireSize
from vfio_user.device_models.pci import Bar, Identity, power_management
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.registers import ReadHook, RegisterFile, WriteHook
from vfio_user.device_models.segmentation import segment, wire_size

EERD_START, EERD_DONE = 1 << 0, 1 << 4
EE_RST = 1 << 13
REGISTERS = (
    *rows.CONTROL,
    *rows.INTERRUPT,
    *rows.RECEIVE,
    *rows.TRANSMIT,
    *rows.WAKE_UP,
    *STATISTICS,
)
_FILTER_ROWS = ("RAL", "RAH", "MTA", "FCAL", "FCAH")


class E1000(NetDevice, PciDevice):
    model = "e1000"
    summary = "Intel 82540EM gigabit Ethernet, for the e1000 driver of every system"
    options = OPTIONS
    identity = Identity(
        vendor_id=0x8086,
        device_id=0x100E,
        class_code=0x020000,
        revision=2,
        subsystem_vendor_id=0x8086,
        subsystem_id=0x001E,
    )

    def __init__(
        self,
        host: Host,
        port: NetBackend,
        *,
        mac: bytes = parse_mac(DEFAULT_MAC),
        itr: int = 0,
        verify: bool = False,
        fcs: bool = False,
    ) -> None:
        """The keyword arguments are the parsed values of `options`."""
        self.registers = RegisterFile(rows.MAC_SIZE, REGISTERS)
        self.window = RegisterFile(rows.IO_SIZE, rows.IO_WINDOW)
        bars = {0: Bar(self.registers), 2: Bar(self.window, io=True)}
        super().__init__(host, bars, capabilities=(power_management(),))
        self.port = port
        self.statistics = Statistics(self.registers)
        self.causes = Causes(host, self.interrupts, self.registers, itr)
        parts = host, port, self.registers
        self.receiver = Receiver(*parts, self.causes, self.statistics, always_verify=verify, real_fcs=fcs)
        self.transmitter = Transmitter(host, self.registers, self.causes, self.statistics, self._send)
        self.flow = FlowControl(*parts, self.statistics, self.receiver)
        self.eeprom = eeprom.Eeprom(eeprom.make_content(mac))
        self.phy = phy.Phy(host, port.link_up, self._path_changed)
        self.link = False
        """What STATUS.LU says."""
        self.loopback = False
        self.receiver.on_room = self._room
        self.flow.on_change = self._path_changed
        self._connect()
        self.reset_state()
        port.attach(self)

    def _connect(self) -> None:
        """Give the registers with side effects their hooks."""
        for name, read in self._read_hooks().items():
            for cell in self.registers.array(name):
                cell.on_read = read
        for name, write in self._write_hooks().items():
            for cell in self.registers.array(name):
                cell.on_write = write
        data = self.window.cell("IODATA")
        data.on_read, data.on_write = self._read_window, self._write_window

    def _read_hooks(self) -> dict[str, ReadHook]:
        causes = self.causes
        return {
            "CTRL_DUP": lambda _: self.registers.cell("CTRL").value,
            "EECD": lambda _: self.eeprom.read_pins(),
            "ICR": causes.read_icr,
            "ICS": causes.read_ics,
            **self.statistics.read_hooks(),
        }

    def _write_hooks(self) -> dict[str, WriteHook]:
        causes = self.causes
        hooks: dict[str, WriteHook] = {
            "CTRL": self._write_ctrl,
            "CTRL_DUP": self._write_ctrl,
            "CTRL_EXT": self._write_ctrl_ext,
            "EECD": lambda _, value: self.eeprom.write_pins(value),
            "EERD": self._write_eerd,
            "MDIC": self._write_mdic,
            "FCRTH": self._write_fcrth,
            "ICR": causes.write_icr,
            "ICS": causes.write_ics,
            "IMS": causes.write_ims,
            "IMC": causes.write_imc,
            "ITR": causes.write_itr,
            "RCTL": self._write_rctl,
            "RDT": self._write_rdt,
            "RDTR": self._write_rdtr,
            "TCTL": self._write_tctl,
            "TDT": self._write_tdt,
            "TIDV": self._write_tidv,
        }
        for name in _FILTER_ROWS:
            hooks[name] = self._filter_hook(name)
        for suffix in ("BAL", "BAH", "LEN", "H"):
            hooks["RD" + suffix] = self._ring_hook("RD" + suffix, self.receiver.ring_moved)
            hooks["TD" + suffix] = self._ring_hook("TD" + suffix, self.transmitter.ring_moved)
        return hooks

    def _filter_hook(self, name: str) -> WriteHook:
        cells, changed = self.registers.array(name), self.receiver.filter.changed

        def write(index: int, value: int) -> None:
            cells[index].store(value)
            changed()

        return write

    def _ring_hook(self, name: str, moved: Callable[[], None]) -> WriteHook:
        cell = self.registers.cell(name)

        def write(_index: int, value: int) -> None:
            cell.store(value)
            moved()

        return write

    # The MAC

    def _write_ctrl(self, _index: int, value: int) -> None:
        if value & Ctrl.RST:
            self.reset_mac()
        else:
            self.registers.cell("CTRL").store(value)
            self.flow.configure()
        if value & Ctrl.PHY_RST:
            self.phy.reset()
        self._update_status()

    def _write_ctrl_ext(self, _index: int, value: int) -> None:
        self.registers.cell("CTRL_EXT").store(value & ~EE_RST)
        if value & EE_RST:
            self._load_address()

    def _write_eerd(self, _index: int, value: int) -> None:
        if value & EERD_START:
            address = value >> 8 & 0xFF
            word = self.eeprom.read_word(address)
            self.registers.cell("EERD").value = word << 16 | address << 8 | EERD_DONE

    def _write_mdic(self, _index: int, value: int) -> None:
        number, operation = value >> Mdic.REGISTER_SHIFT & 31, value & (Mdic.WRITE | Mdic.READ)
        result = value & ~(Mdic.ERROR | Mdic.READY)
        if value >> Mdic.PHY_SHIFT & 31 != phy.ADDRESS or operation not in (Mdic.WRITE, Mdic.READ):
            result |= Mdic.ERROR
        elif operation == Mdic.READ:
            result = result & ~Mdic.DATA | self.phy.read(number)
        else:
            self.phy.write(number, value & Mdic.DATA)
        self.registers.cell("MDIC").value = result | Mdic.READY
        if value & Mdic.INTERRUPT:
            self.causes.set(Cause.MDAC)

    def _write_fcrth(self, _index: int, value: int) -> None:
        self.registers.cell("FCRTH").store(value)
        self.flow.configure()

    def _read_window(self, _index: int) -> int:
        offset = self.window.cell("IOADDR").value
        if offset > rows.MAC_SIZE - 4:
            return 0
        return int.from_bytes(self.registers.read(offset, 4), "little")

    def _write_window(self, _index: int, value: int) -> None:
        offset = self.window.cell("IOADDR").value
        if offset <= rows.MAC_SIZE - 4:
            self.registers.write(offset, value.to_bytes(4, "little"))

    # Rings

    def _write_rctl(self, _index: int, value: int) -> None:
        cell = self.registers.cell("RCTL")
        stops = cell.value & ~value & Rctl.EN
        cell.store(value)
        self.receiver.filter.changed()
        if stops:
            self.receiver.discard()
        self._path_changed()
        self.receiver.wake()

    def _write_rdt(self, _index: int, value: int) -> None:
        self.receiver.ring.tail.store(value)
        self.receiver.wake()

    def _write_rdtr(self, _index: int, value: int) -> None:
        self.registers.cell("RDTR").store(value)
        if value & RDTR_FPD:
            self.receiver.delay.flush()

    def _write_tctl(self, _index: int, value: int) -> None:
        self.registers.cell("TCTL").store(value)
        if value & Tctl.SWXOFF:
            self.flow.send(self.registers.cell("FCTTV").value)
        self.transmitter.wake()

    def _write_tdt(self, _index: int, value: int) -> None:
        self.transmitter.ring.tail.store(value)
        self.transmitter.wake()

    def _write_tidv(self, _index: int, value: int) -> None:
        self.registers.cell("TIDV").store(value)
        if value & TIDV_FPD:
            self.transmitter.delay.flush()

    # The wire

    def receive(self, frame: bytes) -> bool:
        """From the port: see `net.Receiver`."""
        return self.receiver.receive(frame)

    def link_changed(self, up: bool) -> None:
        """From the port: see `net.Receiver`."""
        self.phy.plug(up)

    def _send(self, pieces: list[Buffer], offload: Offload | None) -> WireSize | None:
        if not self.loopback:
            return self.port.send(pieces, offload)
        receiver = self.receiver
        if not receiver.has_room and receiver.ring.owned:
            return None  # it will have room: descriptors are there
        size = wire_size(pieces, offload)
        for frame in segment(pieces, offload):
            receiver.take(frame, looped=True)
        return size

    def _room(self) -> None:
        self.flow.drained()
        if self.loopback:
            self.transmitter.wake()

    def _path_changed(self) -> None:
        """The link, the loopback or a pause may have changed: where frames go from now on."""
        mode = self.registers.cell("RCTL").value & Rctl.LBM
        self.loopback = self.phy.loopback or mode in (LOOPBACK_MAC, LOOPBACK_TRANSCEIVER)
        changed, self.link = self.link != self.phy.link, self.phy.link
        self.receiver.open = self.link and not self.loopback
        self.transmitter.open = self.loopback or (self.link and not self.flow.paused)
        self._update_status()
        if changed:
            self.causes.set(Cause.LSC)
        self.transmitter.wake()

    def _update_status(self) -> None:
        control, link = self.registers.cell("CTRL").value, self.phy
        speed = control >> Ctrl.SPEED_SHIFT & 3 if control & Ctrl.FRCSPD else link.speed
        full_duplex = bool(control & Ctrl.FD) if control & Ctrl.FRCDPX else link.full_duplex
        value = Status.MTXCKOK | speed << Status.SPEED_SHIFT | link.speed << Status.ASDV_SHIFT
        value |= (Status.FD if full_duplex else 0) | (Status.LU if self.link else 0)
        self.flow.speed = min(speed, 2)
        self.registers.cell("STATUS").value = value | (Status.TXOFF if self.flow.paused else 0)

    # Reset

    def _config_changed(self) -> None:
        super()._config_changed()
        if self.host.dma.enabled:
            self.receiver.wake()
            self.transmitter.wake()

    def reset_mac(self) -> None:
        """CTRL.RST: everything but PCI configuration, EEPROM and PHY (13.4.1)."""
        for key in ("transmit", "receive"):
            self.host.cancel(key)
        self.registers.reset()
        self.statistics.clear_octets()
        for part in (self.transmitter, self.receiver, self.flow, self.causes):
            part.reset()
        self.link = self.phy.link  # no cause: the link itself has not changed
        self._load_address()
        self._path_changed()

    def _load_address(self) -> None:
        """The station address, from the EEPROM."""
        mac = self.eeprom.mac
        self.registers.cell("RAL").value = int.from_bytes(mac[:4], "little")
        self.registers.cell("RAH").value = int.from_bytes(mac[4:], "little") | RAH_AV
        self.receiver.filter.changed()

    def reset_state(self) -> None:
        """Power-on."""
        self.window.reset()
        self.reset_mac()
        self.phy.reset()

    def counters(self) -> Mapping[str, int]:
        """Frames and octets are on the port's side of the filters; octets are without FCS."""
        receiver, transmitter = self.receiver, self.transmitter
        return {
            "received_filtered": receiver.filtered,
            "received_dropped": receiver.dropped,
            "received_missed": receiver.missed,
            "transmitted_malformed": transmitter.malformed,
            "dma_errors": receiver.dma_errors + transmitter.dma_errors,
            "interrupts": self.causes.fired,
        }
