# SPDX-License-Identifier: BSD-3-Clause
"""Lines of QEMU's human monitor and what they print: port I/O, physical memory, configuration space.

A line is `COMMAND/FORMAT`; the letter b, h or w in FORMAT is the width (1, 2, 4 bytes), a digit is a count,
and without a letter the width is that of whatever `x` or `xp` was last. So every line here has its letter.
Configuration space is reached by the ports 0xcf8 and 0xcfc (PCI Local Bus 3.0, 3.2.2.3.2): x86 machines,
and the first 256 bytes.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vfio_user.client.qemu_migration.qmp import Qmp

ADDRESS_PORT, DATA_PORT = 0xCF8, 0xCFC
_LETTERS = {1: "b", 2: "h", 4: "w"}
_PORT = re.compile(r"port[bwl]\[0x[0-9a-f]+\] = 0x([0-9a-f]+)\s*")
_ROW = re.compile(r"[0-9a-f]+:((?: 0x[0-9a-f]{8})+)\s*")


class MonitorError(Exception):
    """The human monitor has printed something else than what a line of ours prints."""


@dataclass(frozen=True, slots=True)
class Function:
    """Where a PCI function is; `bus` is the number that the guest has given to it."""

    bus: int
    slot: int
    function: int

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.slot:02x}.{self.function}"


@dataclass(frozen=True, slots=True)
class Write:
    """A write to configuration space: `width` is 1, 2 or 4 bytes, `offset` a multiple of it below 256."""

    offset: int
    width: int
    value: int


def address_line(value: int) -> str:
    """The line that sets the address register."""
    return f"o/w {ADDRESS_PORT:#x} {value:#x}"


def write_lines(function: Function, writes: Iterable[Write]) -> list[str]:
    """The lines that write to a function's configuration space; they leave the address register changed."""
    lines: list[str] = []
    selected = None
    for write in writes:
        address = _address(function, write.offset)
        if address != selected:
            lines.append(address_line(address))
            selected = address
        lines.append(f"o/{_LETTERS[write.width]} {DATA_PORT + (write.offset & 3):#x} {write.value:#x}")
    return lines


def _address(function: Function, offset: int) -> int:
    return 1 << 31 | function.bus << 16 | function.slot << 11 | function.function << 8 | offset & 0xFC


def read_port_line(port: int, width: int) -> str:
    return f"i/{_LETTERS[width]} {port:#x}"


def read_memory_line(address: int, size: int) -> str:
    """Prints `size` bytes (a multiple of 4) of physical memory; a device sees accesses of 4 bytes or more."""
    return f"xp/{size // 4}xw {address:#x}"


def parse_port(text: str) -> int:
    """What `read_port_line` has printed."""
    if (found := _PORT.fullmatch(text)) is None:
        raise MonitorError(f"the monitor printed {text.strip()!r} for a port")
    return int(found[1], 16)


def parse_memory(text: str, size: int) -> bytes:
    """What `read_memory_line` has printed."""
    rows = [_ROW.fullmatch(row) for row in text.splitlines() if row.strip()]
    words = [word for row in rows if row for word in row[1].split()]
    if None in rows or len(words) * 4 != size:
        raise MonitorError(f"the monitor printed {text[:200].strip()!r} for {size} bytes of memory")
    return b"".join(int(word, 16).to_bytes(4, "little") for word in words)


def require_silence(lines: Sequence[str], answers: Sequence[str]) -> None:
    """Lines that write print nothing unless something is wrong. MonitorError."""
    for line, answer in zip(lines, answers, strict=True):
        if answer.strip():
            raise MonitorError(f"the monitor answers {line!r} with {answer.strip()!r}")


async def read_memory(qmp: Qmp, address: int, size: int = 4) -> bytes:
    """Physical memory, or what else is there: a device's register sees the read. MonitorError."""
    return parse_memory(await qmp.hmp(read_memory_line(address, size)), size)
