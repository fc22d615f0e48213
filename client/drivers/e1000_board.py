# SPDX-License-Identifier: BSD-3-Clause
"""What surrounds the rings of an 82540EM: reset through the I/O BAR, EEPROM, PHY, addresses, link."""

from collections.abc import Mapping

import trio

from vfio_user.client.config_space import VENDOR_ID
from vfio_user.client.drivers import e1000_hardware as hw
from vfio_user.client.drivers.e1000_hardware import Ctrl, Eecd, Mdic, Reg
from vfio_user.client.guest import DriverAccess

_POLLS = 200

LINK_PATIENCE = 5.0
"""Seconds that a driver waits for a link: auto-negotiation takes some."""


class DriverError(Exception):
    """The device does not do what the manual says."""


class Board:
    """Register access and the slow parts of start-up."""

    def __init__(self, device: DriverAccess, link_patience: float = LINK_PATIENCE) -> None:
        self.mac = bytes(6)
        self.eeprom: list[int] = []
        """The 64 words."""
        self._device = device
        self._link_patience = link_patience

    async def read(self, offset: int) -> int:
        return await self._device.read(hw.MEMORY_BAR, offset)

    async def write(self, offset: int, value: int) -> None:
        await self._device.write(hw.MEMORY_BAR, offset, value)

    async def write_all(self, values: Mapping[Reg, int]) -> None:
        """In the order of the mapping."""
        for register, value in values.items():
            await self.write(register, value)

    async def reset(self) -> None:
        """Mask interrupts, stop both engines, and CTRL.RST through the I/O window, as Linux's driver."""
        identity = await self._device.config.read(VENDOR_ID, 4)
        if identity != hw.VENDOR_AND_DEVICE:
            raise DriverError(f"device {identity >> 16:04x} of vendor {identity & 0xFFFF:04x} is no 82540EM")
        await self.write_all({Reg.IMC: 0xFFFF_FFFF, Reg.RCTL: 0, Reg.TCTL: hw.TCTL_PSP})
        control = await self.read(Reg.CTRL)
        await self._write_io(Reg.CTRL, control | Ctrl.RST)
        await self._until(Reg.CTRL, Ctrl.RST, 0, "the reset does not end")
        await self.write(Reg.IMC, 0xFFFF_FFFF)
        await self.read(Reg.ICR)

    async def _write_io(self, register: Reg, value: int) -> None:
        """IOADDR and IODATA (13.2.2.2)."""
        bar = next((bar.index for bar in self._device.bars.values() if bar.io), None)
        if bar is None:
            raise DriverError("there is no I/O BAR")
        await self._device.write(bar, 0, register)
        await self._device.write(bar, 4, value)

    async def set_up(self) -> None:
        """EEPROM, PHY, addresses, link."""
        await self._read_eeprom()
        await self._set_up_phy()
        await self._set_addresses()
        await self._wait_for_link()

    # EEPROM, bit by bit (13.4.3 and the Microwire parts' data sheets)

    async def _read_eeprom(self) -> None:
        self._eecd = await self.read(Reg.EECD)
        if not self._eecd & Eecd.PRES:
            raise DriverError("there is no EEPROM")
        await self._pins(Eecd.REQ)
        await self._until(Reg.EECD, Eecd.GNT, Eecd.GNT, "the EEPROM is not granted")
        self.eeprom = [await self._read_word(place) for place in range(hw.EEPROM_SUM_WORDS)]
        await self._pins(Eecd(0))
        if sum(self.eeprom) & 0xFFFF != hw.EEPROM_SUM:
            raise DriverError(f"the EEPROM's sum is {sum(self.eeprom) & 0xFFFF:04x}, not BABA")
        self.mac = b"".join(word.to_bytes(2, "little") for word in self.eeprom[:3])

    async def _read_word(self, place: int) -> int:
        bits = 8 if self._eecd & Eecd.SIZE else 6
        await self._pins(Eecd.REQ | Eecd.CS)
        await self._shift_out(hw.EEPROM_READ, 3)
        await self._shift_out(place, bits)
        word = 0
        for _ in range(16):
            word = word << 1 | await self._shift_in()
        await self._pins(Eecd.REQ)
        return word

    async def _shift_out(self, value: int, bits: int) -> None:
        for bit in reversed(range(bits)):
            data = Eecd.DI if value >> bit & 1 else Eecd(0)
            await self._clock(Eecd.REQ | Eecd.CS | data)

    async def _shift_in(self) -> int:
        await self._pins(Eecd.REQ | Eecd.CS | Eecd.SK)
        level = await self.read(Reg.EECD) & Eecd.DO
        await self._pins(Eecd.REQ | Eecd.CS)
        return int(bool(level))

    async def _clock(self, pins: Eecd) -> None:
        await self._pins(pins)
        await self._pins(pins | Eecd.SK)
        await self._pins(pins)

    async def _pins(self, pins: Eecd) -> None:
        driven = Eecd.REQ | Eecd.CS | Eecd.DI | Eecd.SK
        await self.write(Reg.EECD, self._eecd & ~driven | pins)

    # PHY

    async def read_phy(self, register: int) -> int:
        return await self._mdic(Mdic.READ, register, 0) & 0xFFFF

    async def write_phy(self, register: int, value: int) -> None:
        await self._mdic(Mdic.WRITE, register, value)

    async def _mdic(self, operation: Mdic, register: int, value: int) -> int:
        await self.write(Reg.MDIC, operation | hw.PHY_ADDRESS << 21 | register << 16 | value)
        result = await self._until(Reg.MDIC, Mdic.READY, Mdic.READY, "the PHY does not answer")
        if result & Mdic.ERROR:
            raise DriverError(f"PHY register {register}: error")
        return result

    async def _set_up_phy(self) -> None:
        """Find the PHY, reset it, advertise everything and negotiate (13.5, IEEE 802.3 clause 22)."""
        await self.write(Reg.CTRL, Ctrl.FD | Ctrl.SLU | Ctrl.ASDE)
        found = await self.read_phy(hw.PHY_ID1)
        if found != hw.PHY_M88:
            raise DriverError(f"PHY of vendor {found:04x}")
        control = await self.read_phy(hw.PHY_CONTROL)
        await self.write_phy(hw.PHY_CONTROL, control | hw.PHY_RESET)
        await self.write_phy(hw.PHY_ADVERTISE, 0x0DE1)
        await self.write_phy(hw.PHY_1000_CONTROL, 0x0200)
        await self.write_phy(hw.PHY_CONTROL, hw.PHY_AUTONEG | hw.PHY_RESTART | hw.PHY_FULL_1000)

    async def set_loopback(self, on: bool) -> None:
        """The PHY's loopback, in the way of the self-test of Linux's driver; off: negotiate again."""
        if on:
            forced = Ctrl.FRCSPD | Ctrl.FRCDPX | Ctrl.SPEED_1000 | Ctrl.FD | Ctrl.ILOS | Ctrl.SLU
            await self.write_phy(hw.PHY_CONTROL, hw.PHY_LOOPBACK | hw.PHY_FULL_1000)
            await self.write(Reg.CTRL, forced)
        else:
            await self._set_up_phy()
            await self._wait_for_link()

    # Addresses and link

    async def _set_addresses(self) -> None:
        """Receive address 0 from the EEPROM, an empty multicast table."""
        await self.write(Reg.RAL0, int.from_bytes(self.mac[:4], "little"))
        await self.write(Reg.RAH0, int.from_bytes(self.mac[4:], "little") | hw.RAH_VALID)
        for entry in range(128):
            await self.write(Reg.MTA + 4 * entry, 0)

    async def _wait_for_link(self) -> None:
        end = trio.current_time() + self._link_patience
        while not await self.read(Reg.STATUS) & hw.STATUS_LINK_UP:
            if trio.current_time() > end:
                raise DriverError(f"no link within {self._link_patience:g} s")
            await trio.sleep(0.005)

    async def _until(self, register: Reg, mask: int, wanted: int, failure: str) -> int:
        """Read until the masked bits are as wanted."""
        for _ in range(_POLLS):
            value = await self.read(register)
            if value & mask == wanted:
                return value
            await trio.sleep(0.0005)
        raise DriverError(failure)
