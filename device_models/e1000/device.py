# SPDX-License-Identifier: BSD-3-Clause
"""The Intel 82540EM (8086:100e) as a device model: its regions, and the registers that do something.

Source: Intel, "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vfio_user.device_models.device import Host
from vfio_user.device_models.e1000 import phy
from vfio_user.device_models.e1000 import registers as rows
from vfio_user.device_models.e1000.bits import FPD, RAH_AV, Cause, Ctrl, CtrlExt, Eerd, Mdic, Rctl, Tctl
from vfio_user.device_models.e1000.mac import Mac
from vfio_user.device_models.e1000.options import OPTIONS, Settings
from vfio_user.device_models.e1000.statistics import STATISTICS
from vfio_user.device_models.net import NetBackend, NetDevice
from vfio_user.device_models.pci import Bar, Identity, power_management
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.registers import ReadHook, RegisterFile, WriteHook
from vfio_user.device_models.state import Section

REGISTERS = (
    *rows.CONTROL,
    *rows.INTERRUPT,
    *rows.RECEIVE,
    *rows.TRANSMIT,
    *rows.WAKE_UP,
    *STATISTICS,
)
_FILTER_ROWS = ("RAL", "RAH", "MTA", "FCAL", "FCAH")
_PACKET_BUFFER = 64  # KiB, for both directions


class E1000(NetDevice, PciDevice):
    model = "e1000"
    summary = "Intel 82540EM gigabit Ethernet, for the e1000 driver of every system"
    options = OPTIONS
    state_version = 1
    identity = Identity(
        vendor_id=0x8086,
        device_id=0x100E,
        class_code=0x020000,
        revision=2,
        subsystem_vendor_id=0x8086,
        subsystem_id=0x001E,
    )

    def __init__(self, host: Host, port: NetBackend, **options: Any) -> None:
        """`options` are the fields of `Settings`."""
        self.registers = RegisterFile(rows.MAC_SIZE, REGISTERS)
        self.window = RegisterFile(rows.IO_SIZE, rows.IO_WINDOW)
        bars = {0: Bar(self.registers), 2: Bar(self.window, io=True)}
        super().__init__(host, bars, capabilities=(power_management(),))
        self.port = port
        self.mac = Mac(host, port, self.registers, self.interrupts, Settings(**options))
        self._connect()
        self.reset_state()
        port.attach(self)

    # From the port: see net.Receiver

    def receive(self, frame: bytes) -> bool:
        return self.mac.buffer.receive(frame)

    def link_changed(self, up: bool) -> None:
        self.mac.phy.plug(up)

    # From an operator: see net.NetDevice

    def station_address(self) -> bytes | None:
        low, high = self.registers.cell("RAL").value, self.registers.cell("RAH").value
        valid = high & RAH_AV
        return low.to_bytes(4, "little") + (high & 0xFFFF).to_bytes(2, "little") if valid else None

    # From the host: see device.Device

    def state_sections(self) -> Sequence[Section]:
        return (self.window.section("window"), *self.mac.sections())

    def restored(self) -> None:
        super().restored()
        self.mac.restored()

    def reset_state(self) -> None:
        self.window.reset()
        self.mac.phy.reset()
        self.mac.reset()

    def _config_changed(self) -> None:
        super()._config_changed()
        if self.host.dma.enabled:
            self.mac.buffer.wake()
            self.mac.transmitter.wake()

    def counters(self) -> Mapping[str, int]:
        """What became of the frames beyond what the port counts.

        `received_filtered`: not for this station. `received_dropped`: the receiver was off, there was no
        link, a buffer could not be written, or the frame was too long. `received_missed`: no room.
        """
        buffer, receiver, transmitter = self.mac.buffer, self.mac.receiver, self.mac.transmitter
        return {
            "received_filtered": buffer.filtered,
            "received_dropped": buffer.dropped,
            "received_missed": buffer.missed,
            "transmitted_malformed": transmitter.malformed,
            "dma_errors": receiver.dma_errors + transmitter.dma_errors,
            "interrupts": self.mac.causes.fired,
        }

    # Registers with side effects

    def _connect(self) -> None:
        for name, read in self._read_hooks().items():
            for cell in self.registers.array(name):
                cell.on_read = read
        for name, write in self._write_hooks().items():
            for cell in self.registers.array(name):
                cell.on_write = write
        data = self.window.cell("IODATA")
        data.on_read, data.on_write = self._read_window, self._write_window

    def _read_hooks(self) -> dict[str, ReadHook]:
        control, eeprom = self.registers.cell("CTRL"), self.mac.eeprom
        return {
            "CTRL_DUP": lambda _: control.value,
            "EECD": lambda _: eeprom.read_pins(),
            "ICR": self.mac.causes.read_icr,
            "ICS": self.mac.causes.read_ics,
            **self.mac.statistics.read_hooks(),
        }

    def _write_hooks(self) -> dict[str, WriteHook]:
        mac = self.mac
        hooks: dict[str, WriteHook] = {
            "CTRL": self._write_ctrl,
            "CTRL_DUP": self._write_ctrl,
            "CTRL_EXT": self._write_ctrl_ext,
            "EECD": lambda _, value: mac.eeprom.write_pins(value),
            "EERD": self._write_eerd,
            "MDIC": self._write_mdic,
            "PBA": self._write_pba,
            "ICR": mac.causes.write_icr,
            "ICS": mac.causes.write_ics,
            "IMS": mac.causes.write_ims,
            "IMC": mac.causes.write_imc,
            "ITR": mac.causes.write_itr,
            "RCTL": self._write_rctl,
            "RDT": self._write_rdt,
            "RDTR": self._storing("RDTR", mac.receiver.delay.flush, only=FPD),
            "FCRTH": self._storing("FCRTH", mac.flow.configure),
            "TCTL": self._write_tctl,
            "TDT": self._write_tdt,
            "TIDV": self._storing("TIDV", mac.transmitter.delay.flush, only=FPD),
        }
        hooks |= {name: self._storing(name, mac.buffer.configure) for name in _FILTER_ROWS}
        for suffix in ("BAL", "BAH", "LEN", "H"):
            hooks["RD" + suffix] = self._storing("RD" + suffix, mac.receiver.ring_moved)
            hooks["TD" + suffix] = self._storing("TD" + suffix, mac.transmitter.ring_moved)
        return hooks

    def _storing(self, name: str, then: Callable[[], None], only: int = 0) -> WriteHook:
        """A hook that stores, and calls `then` afterwards: always, or if a bit of `only` is written."""
        cells = self.registers.array(name)

        def write(index: int, value: int) -> None:
            cells[index].store(value)
            if not only or value & only:
                then()

        return write

    def _write_ctrl(self, _index: int, value: int) -> None:
        if value & Ctrl.RST:
            self.mac.reset()
        else:
            self.registers.cell("CTRL").store(value)
            self.mac.flow.configure()
        if value & Ctrl.PHY_RST:
            self.mac.phy.reset()
        self.mac.update_status()

    def _write_ctrl_ext(self, _index: int, value: int) -> None:
        self.registers.cell("CTRL_EXT").store(value)
        if value & CtrlExt.EE_RST:
            self.mac.load_address()

    def _write_eerd(self, _index: int, value: int) -> None:
        if value & Eerd.START:
            address = value >> Eerd.ADDRESS_SHIFT & 0xFF
            word = self.mac.eeprom.read_word(address)
            result = word << Eerd.DATA_SHIFT | address << Eerd.ADDRESS_SHIFT | Eerd.DONE
            self.registers.cell("EERD").value = result

    def _write_mdic(self, _index: int, value: int) -> None:
        number, operation = value >> Mdic.REGISTER_SHIFT & 31, value & (Mdic.WRITE | Mdic.READ)
        result = value & ~(Mdic.ERROR | Mdic.READY)
        if value >> Mdic.PHY_SHIFT & 31 != phy.ADDRESS or operation not in (Mdic.WRITE, Mdic.READ):
            result |= Mdic.ERROR
        elif operation == Mdic.READ:
            result = result & ~Mdic.DATA | self.mac.phy.read(number)
        else:
            self.mac.phy.write(number, value & Mdic.DATA)
        self.registers.cell("MDIC").value = result | Mdic.READY
        if value & Mdic.INTERRUPT:
            self.mac.causes.set(Cause.MDAC)

    def _write_pba(self, _index: int, value: int) -> None:
        """The guest says what receive gets; transmit gets the rest."""
        receive = min(value & 0x7F, _PACKET_BUFFER)
        self.registers.cell("PBA").value = _PACKET_BUFFER - receive << 16 | receive

    def _write_rctl(self, _index: int, value: int) -> None:
        cell, buffer = self.registers.cell("RCTL"), self.mac.buffer
        stops = cell.value & ~value & Rctl.EN
        cell.store(value)
        buffer.configure()
        if stops:
            buffer.discard()
        self.mac.path_changed()
        buffer.wake()

    def _write_rdt(self, _index: int, value: int) -> None:
        self.mac.receiver.ring.tail.store(value)
        self.mac.buffer.wake()

    def _write_tctl(self, _index: int, value: int) -> None:
        self.registers.cell("TCTL").store(value)
        if value & Tctl.SWXOFF:
            self.mac.flow.send(self.registers.cell("FCTTV").value)
        self.mac.transmitter.wake()

    def _write_tdt(self, _index: int, value: int) -> None:
        transmitter = self.mac.transmitter
        transmitter.ring.tail.store(value)
        transmitter.wake()

    def _read_window(self, _index: int) -> int:
        offset = self.window.cell("IOADDR").value
        if offset > rows.MAC_SIZE - 4:
            return 0
        return int.from_bytes(self.registers.read(offset, 4), "little")

    def _write_window(self, _index: int, value: int) -> None:
        offset = self.window.cell("IOADDR").value
        if offset <= rows.MAC_SIZE - 4:
            self.registers.write(offset, value.to_bytes(4, "little"))
