# SPDX-License-Identifier: BSD-3-Clause
"""The statistics registers (Software Developer's Manual, 13.7, "Statistics Registers").

All are cleared by reading and stick at their largest value. Octet counters are 64 bits wide in two
registers and count from the destination address through the CRC: a frame that crosses the packet port with
n bytes counts n + 4, so an octet counter equals the port's bytes plus 4 times its frames, exactly.

The manual clears an octet counter when its high half is read. What arrives between the two reads of a
driver would then be lost, so here the low half's read also notes the value, and the high half's read
takes away only what was noted.
"""

from functools import partial

from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.registers import ReadHook, Register, RegisterFile
from vfio_user.device_models.state import U32, U64, Apply, Fields, Reader, Section, counted

FCS = 4
"""Bytes of the frame check sequence."""
BROADCAST = b"\xff" * 6

_COUNTERS = (
    (0x4000, "CRCERRS", "frames with CRC errors"),
    (0x4004, "ALGNERRC", "alignment errors"),
    (0x4008, "SYMERRS", "symbol errors"),
    (0x400C, "RXERRC", "receive errors"),
    (0x4010, "MPC", "missed packets: the packet buffer was full"),
    (0x4014, "SCC", "single collisions"),
    (0x4018, "ECOL", "excessive collisions"),
    (0x401C, "MCC", "multiple collisions"),
    (0x4020, "LATECOL", "late collisions"),
    (0x4028, "COLC", "collisions"),
    (0x4030, "DC", "deferrals"),
    (0x4034, "TNCRS", "transmits without carrier sense"),
    (0x4038, "SEC", "sequence errors"),
    (0x403C, "CEXTERR", "carrier extension errors"),
    (0x4040, "RLEC", "receive length errors"),
    (0x4048, "XONRXC", "XON received"),
    (0x404C, "XONTXC", "XON sent"),
    (0x4050, "XOFFRXC", "XOFF received"),
    (0x4054, "XOFFTXC", "XOFF sent"),
    (0x4058, "FCRUC", "unsupported flow control frames received"),
    (0x405C, "PRC64", "received, 64 bytes or less"),
    (0x4060, "PRC127", "received, 65 to 127 bytes"),
    (0x4064, "PRC255", "received, 128 to 255 bytes"),
    (0x4068, "PRC511", "received, 256 to 511 bytes"),
    (0x406C, "PRC1023", "received, 512 to 1023 bytes"),
    (0x4070, "PRC1522", "received, 1024 bytes or more"),
    (0x4074, "GPRC", "good packets received that passed the filters"),
    (0x4078, "BPRC", "broadcasts received"),
    (0x407C, "MPRC", "multicasts received"),
    (0x4080, "GPTC", "good packets sent"),
    (0x40A0, "RNBC", "packets received with no descriptor free"),
    (0x40A4, "RUC", "undersized frames received"),
    (0x40A8, "RFC", "fragments received"),
    (0x40AC, "ROC", "oversized frames received"),
    (0x40B0, "RJC", "jabber received"),
    (0x40B4, "MGTPRC", "management packets received"),
    (0x40B8, "MGTPDC", "management packets dropped"),
    (0x40BC, "MGTPTC", "management packets sent"),
    (0x40D0, "TPR", "packets received, all"),
    (0x40D4, "TPT", "packets sent, all"),
    (0x40D8, "PTC64", "sent, 64 bytes or less"),
    (0x40DC, "PTC127", "sent, 65 to 127 bytes"),
    (0x40E0, "PTC255", "sent, 128 to 255 bytes"),
    (0x40E4, "PTC511", "sent, 256 to 511 bytes"),
    (0x40E8, "PTC1023", "sent, 512 to 1023 bytes"),
    (0x40EC, "PTC1522", "sent, 1024 bytes or more"),
    (0x40F0, "MPTC", "multicasts sent"),
    (0x40F4, "BPTC", "broadcasts sent"),
    (0x40F8, "TSCTC", "segmentation contexts sent"),
    (0x40FC, "TSCTFC", "segmentation contexts failed"),
)
_OCTETS = (
    (0x4088, "GORC", "good octets received"),
    (0x4090, "GOTC", "good octets sent"),
    (0x40C0, "TOR", "octets received, all"),
    (0x40C8, "TOT", "octets sent, all"),
)
STATISTICS = tuple(Register(name, offset, text=text) for offset, name, text in _COUNTERS) + tuple(
    Register(name + half, offset + step, derived=True, text=f"{text}, {word}")
    for offset, name, text in _OCTETS
    for half, step, word in (("L", 0, "low"), ("H", 4, "high"))
)

_SIZES = ("64", "127", "255", "511", "1023", "1522")
_LIMITS = (64, 127, 255, 511, 1023)
SIZE_CLASS = bytes(sum(size > limit for limit in _LIMITS) for size in range(1025))
"""Which of the six size counters a frame of so many bytes belongs to; longer ones to the last."""


class OctetCounter:
    """A 64-bit counter in two registers."""

    __slots__ = ("noted", "value")

    def __init__(self) -> None:
        self.value = 0
        self.noted: int | None = None

    def read_low(self, _index: int) -> int:
        self.noted = min(self.value, 2**64 - 1)
        return self.noted & 0xFFFF_FFFF

    def read_high(self, _index: int) -> int:
        value = min(self.value, 2**64 - 1) if self.noted is None else self.noted
        self.value, self.noted = max(self.value - value, 0), None
        return value >> 32

    def clear(self) -> None:
        self.value, self.noted = 0, None


class Direction:
    """What is counted for each frame of one direction.

    Frames are first counted in `lengths` alone, and from there into the registers by `settle`, before one
    of them is looked at.
    """

    __slots__ = ("broadcasts", "good", "good_octets", "lengths", "multicasts", "octets", "sizes", "total")

    def __init__(self, file: RegisterFile, letter: str, octets: OctetCounter, good: OctetCounter) -> None:
        """`letter` is R or T, as in GPRC and GPTC."""
        self.octets, self.good_octets = octets, good
        self.good, self.total = file.cell(f"GP{letter}C"), file.cell(f"TP{letter}")
        self.sizes = [file.cell(f"P{letter}C{size}") for size in _SIZES]
        self.broadcasts, self.multicasts = file.cell(f"BP{letter}C"), file.cell(f"MP{letter}C")
        self.lengths: dict[int, int] = {}
        """Good frames by their bytes (with FCS) that are not in the registers yet."""

    def add(self, frames: int, length: int, first: Buffer) -> None:
        """Count `frames` good ones of `length` bytes (with FCS); `first` begins with their destination."""
        self.lengths[length] = self.lengths.get(length, 0) + frames
        if first[0] & 1:
            self.add_group(first, frames)

    def add_group(self, first: Buffer, frames: int = 1) -> None:
        """Count frames, counted already in `lengths`, that go to a group of stations."""
        (self.broadcasts if first[:6] == BROADCAST else self.multicasts).value += frames

    def settle(self) -> None:
        """Bring the registers up to date."""
        for length, frames in self.lengths.items():
            self.total.value += frames
            self.good.value += frames
            self.sizes[SIZE_CLASS[length] if length < 1024 else 5].value += frames
            self.octets.value += length * frames
            self.good_octets.value += length * frames
        self.lengths.clear()

    def add_other(self, length: int) -> None:
        """Count a frame that is on the wire, but not a good one for us: filtered, or flow control."""
        self.total.value += 1
        self.octets.value += length


class Statistics:
    """All of the counters: 32-bit ones are cells of the register file, octets are kept here."""

    def __init__(self, file: RegisterFile) -> None:
        self._file = file
        self.octets = {name: OctetCounter() for _, name, _ in _OCTETS}
        self.received = Direction(file, "R", self.octets["TOR"], self.octets["GORC"])
        self.sent = Direction(file, "T", self.octets["TOT"], self.octets["GOTC"])

    def read_hooks(self) -> dict[str, ReadHook]:
        """By register name."""
        hooks: dict[str, ReadHook] = {name: partial(self._read_counter, name) for _, name, _ in _COUNTERS}
        for name, counter in self.octets.items():
            hooks[name + "L"] = partial(self._read_octets, counter.read_low)
            hooks[name + "H"] = partial(self._read_octets, counter.read_high)
        return hooks

    def settle(self) -> None:
        """Bring all registers up to date: before they are read or saved."""
        self.received.settle()
        self.sent.settle()

    def save_registers(self) -> Fields:
        """The register file's state, with the 32-bit counters among it as a read would give them."""
        self.settle()
        for _, name, _ in _COUNTERS:
            cell = self._file.cell(name)
            cell.value = min(cell.value, U32)
        return self._file.save()

    def section(self) -> Section:
        """The octet counters."""
        return Section("octets", 1, self._save, self._load)

    def _save(self) -> Fields:
        self.settle()
        return {
            name: {"value": counted(counter.value), "noted": counter.noted}
            for name, counter in self.octets.items()
        }

    def _load(self, reader: Reader) -> Apply:
        records = [reader.record(name) for name in self.octets]
        values = [(record.integer("value", U64), record.maybe_integer("noted", U64)) for record in records]

        def apply() -> None:
            self.received.lengths.clear()
            self.sent.lengths.clear()
            for counter, (value, noted) in zip(self.octets.values(), values, strict=True):
                counter.value, counter.noted = value, noted

        return apply

    def _read_octets(self, read: ReadHook, index: int) -> int:
        self.settle()
        return read(index)

    def count(self, name: str, events: int = 1) -> None:
        """Count a rare event, by register name."""
        self._file.cell(name).value += events

    def _read_counter(self, name: str, _index: int) -> int:
        self.settle()
        cell = self._file.cell(name)
        value, cell.value = cell.value, 0
        return min(value, 0xFFFF_FFFF)

    def clear(self) -> None:
        """For a reset: what the register file does not hold."""
        self.received.lengths.clear()
        self.sent.lengths.clear()
        for counter in self.octets.values():
            counter.clear()
