# SPDX-License-Identifier: BSD-3-Clause
"""The 64-word serial EEPROM behind EECD and EERD (Software Developer's Manual, chapter 5; 13.4.3, 13.4.4).

A Microwire part of the 93C46 kind: a command is a start bit, two bits of opcode and six of address, taken
with rising clock edges while CS is high. Without a clock of its own, a write is done when CS falls.
"""

from dataclasses import dataclass, field

from vfio_user.device_models.e1000.bits import Eecd
from vfio_user.device_models.state import U16, Apply, Fields, Reader, Section

WORDS = 64
CHECKSUM_WORD, CHECKSUM = 0x3F, 0xBABA
_COMMAND_BITS, _DATA_BITS = 9, 16
_PINS = Eecd.SK | Eecd.CS | Eecd.DI | Eecd.FWE | Eecd.REQ

_CONTENT = {
    0x04: 0xFFFF,  # ID LED settings: the driver's default
    0x08: 0xFFFF,  # printed board assembly number
    0x09: 0xFFFF,
    0x0A: 0x4408,  # initialization control 1: valid signature, full duplex
    0x0B: 0x001E,  # subsystem id
    0x0C: 0x8086,  # subsystem vendor id
    0x0D: 0x100E,  # device id
    0x0E: 0x8086,  # vendor id
    0x0F: 0x3040,  # initialization control 2: advertise symmetric and asymmetric pause
}


def make_content(mac: bytes) -> list[int]:
    """The words of a new board with the station address `mac` (6 bytes); their sum is BABA."""
    words = [_CONTENT.get(place, 0) for place in range(WORDS)]
    words[:3] = [mac[place] | mac[place + 1] << 8 for place in (0, 2, 4)]
    words[CHECKSUM_WORD] = CHECKSUM - sum(words[:CHECKSUM_WORD]) & 0xFFFF
    return words


@dataclass(slots=True)
class Eeprom:
    """The chip: contents, and where a command on its pins has got to. The contents survive every reset."""

    words: list[int]
    write_enabled: bool = False
    pins: int = 0
    """What EECD's SK, CS, DI, FWE and REQ were last written with."""
    bits_in: list[int] = field(default_factory=list)
    """Taken since the start bit, and with it."""
    shift_out: int = -1
    """How many bits of a READ have been given, the leading 0 among them; -1: not reading."""
    address: int = 0

    @property
    def mac(self) -> bytes:
        """The station address, from words 0 to 2."""
        return b"".join(word.to_bytes(2, "little") for word in self.words[:3])

    def write_pins(self, value: int) -> None:
        """EECD was written."""
        before, self.pins = self.pins, value & _PINS
        if not value & Eecd.CS:
            if before & Eecd.CS:
                self._deselect()
        elif value & ~before & Eecd.SK and before & Eecd.CS:
            self._clock(bool(value & Eecd.DI))

    def read_pins(self) -> int:
        """What EECD reads as: the pins, DO, the grant of what is requested, and that a chip is there."""
        value = self.pins | Eecd.PRES
        if value & Eecd.REQ:
            value |= Eecd.GNT
        return value | Eecd.DO if self._output() else value

    def read_word(self, address: int) -> int:
        """For EERD: 16 bits at the word `address`, 0 beyond the end."""
        return self.words[address] if address < WORDS else 0

    def _output(self) -> bool:
        """DO: the data of a READ after a leading 0; otherwise high, which says ready."""
        if self.shift_out < 0:
            return True
        if self.shift_out == 0:
            return False
        word, bit = divmod(self.shift_out - 1, _DATA_BITS)
        return bool(self.words[(self.address + word) % WORDS] >> (_DATA_BITS - 1 - bit) & 1)

    def _clock(self, data: bool) -> None:
        if self.shift_out >= 0:
            self.shift_out = (
                self.shift_out % (WORDS * _DATA_BITS) + 1
            )  # words follow each other round and round
        elif (data or self.bits_in) and len(self.bits_in) < _COMMAND_BITS + _DATA_BITS:
            self.bits_in.append(int(data))
            if len(self.bits_in) == _COMMAND_BITS and self._command()[0] == 0b10:
                self.address, self.shift_out = self._command()[1], 0

    def _command(self) -> tuple[int, int]:
        """Opcode and address of the bits so far."""
        value = int("".join(map(str, self.bits_in[:_COMMAND_BITS])), 2)
        return value >> 6 & 0b11, value & 0x3F

    def _deselect(self) -> None:
        """CS fell: carry out the command that is complete, then wait for the next start bit."""
        if len(self.bits_in) >= _COMMAND_BITS:
            opcode, address = self._command()
            complete = len(self.bits_in) == _COMMAND_BITS + _DATA_BITS
            data = int("".join(map(str, self.bits_in[_COMMAND_BITS:])) or "0", 2)
            self._execute(opcode, address, data if complete else None)
        self.bits_in, self.shift_out = [], -1

    def _execute(self, opcode: int, address: int, data: int | None) -> None:
        if opcode == 0b00 and address >> 4 in (0b11, 0b00):  # EWEN, EWDS
            self.write_enabled = address >> 4 == 0b11
        elif not self.write_enabled:
            return
        elif opcode == 0b01 and data is not None:  # WRITE
            self.words[address] = data
        elif opcode == 0b11:  # ERASE
            self.words[address] = 0xFFFF
        elif opcode == 0b00 and address >> 4 == 0b10:  # ERAL
            self.words[:] = [0xFFFF] * WORDS
        elif opcode == 0b00 and address >> 4 == 0b01 and data is not None:  # WRAL
            self.words[:] = [data] * WORDS

    # State

    def section(self) -> Section:
        """The contents, and where a command has got to."""
        return Section("eeprom", 1, self._save, self._load)

    def _save(self) -> Fields:
        return {
            "words": [*self.words],
            "write_enabled": self.write_enabled,
            "pins": self.pins,
            "bits_in": [*self.bits_in],
            "shift_out": self.shift_out,
            "address": self.address,
        }

    def _load(self, reader: Reader) -> Apply:
        words, write_enabled = reader.integers("words", U16, WORDS), reader.flag("write_enabled")
        pins = reader.integer("pins", _PINS)
        if pins & ~_PINS:
            reader.refuse("pins", f"{pins:#x} has bits that are no pins")
        bits_in = reader.integers("bits_in", 1, _COMMAND_BITS + _DATA_BITS, 0)
        shift_out = reader.integer("shift_out", WORDS * _DATA_BITS, -1)
        address = reader.integer("address", WORDS - 1)

        def apply() -> None:
            self.words[:], self.bits_in = words, bits_in
            self.write_enabled, self.pins = write_enabled, pins
            self.shift_out, self.address = shift_out, address

        return apply
