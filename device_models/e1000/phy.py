# SPDX-License-Identifier: BSD-3-Clause
"""The M88E1000 PHY inside the 82540EM: IEEE 802.3 clause 22 registers and the vendor's own.

Sources: IEEE 802.3, 22.2.4 and 28.2.4.1 (registers 0 to 10 and 15); Software Developer's Manual, 13.4.2.1,
"PHY Registers". The link partner is imagined: it can do every speed, and takes no PAUSE frames.
"""

from collections.abc import Callable

from vfio_user.device_models.device import Host
from vfio_user.device_models.state import U16, Apply, Fields, Reader, Section, Value, time_left
from vfio_user.device_models.timers import Timer

ADDRESS = 1
"""Its address on the management bus."""
NEGOTIATION_TIME = 2_000_000
"""Nanoseconds. Real ones take 1 to 3 s, but Linux' driver looks for the link just after an interface is
opened, and then only every 2 s. Nor may the end fall into the moments after a reset in which its self-test
counts interrupts, some 100 ms later."""

CONTROL, STATUS, ID1, ID2, ADVERTISE, PARTNER, EXPANSION = 0, 1, 2, 3, 4, 5, 6
NEXT_PAGE, GIGABIT_CONTROL, GIGABIT_STATUS, EXTENDED_STATUS = 7, 9, 10, 15
SPECIFIC_CONTROL, SPECIFIC_STATUS, INTERRUPT_ENABLE, INTERRUPT_STATUS, EXTENDED_CONTROL = 16, 17, 18, 19, 20
PAGE, PAGED = 29, 30

RESET, LOOPBACK, SPEED_LOW, NEGOTIATE, POWER_DOWN = 1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11
ISOLATE, RESTART, FULL_DUPLEX, SPEED_HIGH = 1 << 10, 1 << 9, 1 << 8, 1 << 6
NEGOTIATED, LINK = 1 << 5, 1 << 2

_DEFAULTS = {
    CONTROL: NEGOTIATE | FULL_DUPLEX | SPEED_HIGH,
    STATUS: 0x7949,  # 10 and 100 Mb/s, extended status, preamble suppression, negotiation, extended registers
    ID1: 0x0141,
    ID2: 0x0C20,
    ADVERTISE: 0x0DE1,
    EXPANSION: 0x0004,
    NEXT_PAGE: 0x2001,
    GIGABIT_CONTROL: 0x0E00,
    EXTENDED_STATUS: 0x3000,  # 1000BASE-T, both duplexes
    SPECIFIC_CONTROL: 0x0068,
    EXTENDED_CONTROL: 0x0C68,
}
_WRITABLE = {
    CONTROL: 0x7DC0,  # RESET and RESTART clear themselves
    ADVERTISE: 0xBFFF,
    NEXT_PAGE: 0xB7FF,
    GIGABIT_CONTROL: 0xFF00,
    SPECIFIC_CONTROL: 0xFFFF,
    INTERRUPT_ENABLE: 0xFFFF,
    EXTENDED_CONTROL: 0xFFFF,
    PAGE: 0xFFFF,
}
_KEPT_BY_SOFT_RESET = (ADVERTISE, GIGABIT_CONTROL, SPECIFIC_CONTROL, EXTENDED_CONTROL, INTERRUPT_ENABLE)
_PARTNER, _PARTNER_GIGABIT = 0x41E1, 0x7C00  # all 10 and 100 modes, acknowledged; 1000BASE-T, receivers fine

# What both sides can do, best first: our register and bit, speed (0, 1, 2 for 10, 100, 1000), duplex.
_MODES = (
    (GIGABIT_CONTROL, 1 << 9, 2, True),
    (GIGABIT_CONTROL, 1 << 8, 2, False),
    (ADVERTISE, 1 << 8, 1, True),
    (ADVERTISE, 1 << 7, 1, False),
    (ADVERTISE, 1 << 6, 0, True),
    (ADVERTISE, 1 << 5, 0, False),
)


class Phy:
    """The registers and the link. `on_change` is called after everything that may change the link."""

    def __init__(self, host: Host, cable: bool, on_change: Callable[[], None]) -> None:
        self._host = host
        self._on_change = on_change
        self._timer: Timer | None = None
        self.negotiated_at: int | None = None
        """Device time at which a negotiation that runs will be over."""
        self.cable = cable
        self.registers = [0] * 32
        self.paged: dict[int, int] = {}
        """Register 30 by the page in register 29."""
        self.link = False
        self.link_was_down = True
        """The status register's link bit latches low until read."""
        self.speed, self.full_duplex = 2, True
        self._set_defaults()

    def _set_defaults(self) -> None:
        self.registers[:] = [_DEFAULTS.get(number, 0) for number in range(32)]
        self.paged.clear()

    @property
    def loopback(self) -> bool:
        """Whether frames are sent back at the PHY."""
        return self.registers[CONTROL] & (LOOPBACK | POWER_DOWN) == LOOPBACK

    def reset(self) -> None:
        """The hardware reset (CTRL.PHY_RST, power-on)."""
        self._set_defaults()
        self.restart()

    def read(self, number: int) -> int:
        """Read as over the management bus, with side effects."""
        if number == STATUS:
            value = self.registers[STATUS] & (~LINK if self.link_was_down else 0xFFFF)
            self.link_was_down = not self.link
            return value
        if number == PAGED:
            return self.paged.get(self.registers[PAGE], 0)
        value = self.registers[number]
        if number == INTERRUPT_STATUS:
            self.registers[number] = 0
        return value

    def write(self, number: int, value: int) -> None:
        """Write as over the management bus; read-only registers ignore it."""
        if number == CONTROL:
            self._write_control(value)
        elif number == PAGED:
            self.paged[self.registers[PAGE] & 0xFF] = value  # bounded: a guest must not fill our memory
        else:
            mask = _WRITABLE.get(number, 0)
            self.registers[number] = self.registers[number] & ~mask | value & mask

    def _write_control(self, value: int) -> None:
        before = self.registers[CONTROL]
        if value & RESET:
            self._soft_reset()
        self.registers[CONTROL] = value & _WRITABLE[CONTROL]
        changed = before ^ self.registers[CONTROL]
        significant = NEGOTIATE | POWER_DOWN | LOOPBACK | ISOLATE | SPEED_LOW | SPEED_HIGH | FULL_DUPLEX
        if value & (RESET | RESTART) or changed & significant:
            self.restart()

    def _soft_reset(self) -> None:
        kept = [(number, self.registers[number]) for number in _KEPT_BY_SOFT_RESET]
        self._set_defaults()
        for number, value in kept:
            self.registers[number] = value

    def plug(self, cable: bool) -> None:
        """The cable was plugged in or pulled out."""
        if cable != self.cable:
            self.cable = cable
            self.restart()

    def restart(self) -> None:
        """Drop the link and look for it again: at once if the mode is forced, else after negotiation."""
        self._stop_timer()
        control = self.registers[CONTROL]
        able = self.cable and not control & (POWER_DOWN | ISOLATE | LOOPBACK)
        self._set_link(False)
        if able and control & NEGOTIATE:
            self.negotiated_at = self._host.clock() + NEGOTIATION_TIME
            self._timer = self._host.call_at(self.negotiated_at, self._negotiated)
        elif able:
            speed = 2 if control & SPEED_HIGH else int(bool(control & SPEED_LOW))
            self._set_link(True, speed, bool(control & FULL_DUPLEX))
        self._on_change()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.negotiated_at = None

    def _negotiated(self) -> None:
        self._timer = self.negotiated_at = None
        for number, bit, speed, full_duplex in _MODES:
            if self.registers[number] & bit:
                self.registers[PARTNER], self.registers[EXPANSION] = _PARTNER, 0x0007
                self.registers[GIGABIT_STATUS] = _PARTNER_GIGABIT
                self._set_link(True, speed, full_duplex)
                self.registers[STATUS] |= NEGOTIATED
                break
        self._on_change()

    def _set_link(self, up: bool, speed: int = 2, full_duplex: bool = True) -> None:
        registers = self.registers
        if self.link and not up:
            self.link_was_down = True
        if self.link != up:
            registers[INTERRUPT_STATUS] |= 1 << 10
        self.link, self.speed, self.full_duplex = up, speed, full_duplex
        registers[STATUS] = registers[STATUS] & ~(LINK | NEGOTIATED) | LINK * up
        registers[SPECIFIC_STATUS] = (speed << 14 | full_duplex << 13 | 3 << 10) if up else 0
        if not up:
            registers[PARTNER] = registers[GIGABIT_STATUS] = 0
            registers[EXPANSION] = _DEFAULTS[EXPANSION]

    # State

    def section(self) -> Section:
        """Registers, link and a negotiation under way."""
        return Section("phy", 1, self._save, self._load)

    def _save(self) -> Fields:
        at = self.negotiated_at
        paged: list[Value] = [{"page": page, "value": value} for page, value in sorted(self.paged.items())]
        return {
            "registers": [*self.registers],
            "paged": paged,
            "cable": self.cable,
            "link": self.link,
            "link_was_down": self.link_was_down,
            "speed": self.speed,
            "full_duplex": self.full_duplex,
            "negotiation": None if at is None else time_left(at, self._host.clock()),
        }

    def _load(self, reader: Reader) -> Apply:
        registers = reader.integers("registers", U16, 32)
        pages = reader.records("paged", 256)
        paged = {page.integer("page", 0xFF): page.integer("value", U16) for page in pages}
        cable, link, was_down = reader.flag("cable"), reader.flag("link"), reader.flag("link_was_down")
        speed, full_duplex = reader.integer("speed", 2), reader.flag("full_duplex")
        left = reader.maybe_integer("negotiation", NEGOTIATION_TIME)

        def apply() -> None:
            self._stop_timer()
            self.registers[:], self.paged = registers, paged
            self.cable, self.link, self.link_was_down = cable, link, was_down
            self.speed, self.full_duplex = speed, full_duplex
            self.negotiated_at = None if left is None else self._host.clock() + left

        return apply

    def restored(self) -> None:
        """Let a negotiation end."""
        if self.negotiated_at is not None:
            self._timer = self._host.call_at(self.negotiated_at, self._negotiated)
