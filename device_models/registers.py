# SPDX-License-Identifier: BSD-3-Clause
"""Register rows, and the one engine that accesses them for every device.

A device states its registers as a table of `Register` rows, plain values. `RegisterFile` serves the table
as a region: it takes partial, straddling and unaligned accesses apart, keeps reserved bits as they are,
and calls the hooks that a device gives for registers with side effects.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from vfio_user.device_models.regions import Buffer, RamRegion, Region
from vfio_user.device_models.state import LONGEST, MOST_VALUES, Apply, Fields, Reader, Section, Upgrade

_DIGITS = 24
"""Of a value of 64 bits as JSON, with what is around it."""

ReadHook = Callable[[int], int]
"""Gets the index in the array (0 for a single register), gives the value to read."""

WriteHook = Callable[[int, int], None]
"""Gets the index in the array and the value written, before any mask; it replaces the store."""


@dataclass(frozen=True, slots=True)
class Field:
    """A named part of a register: bits `shift` to `shift + bits - 1`."""

    name: str
    shift: int
    bits: int = 1


@dataclass(frozen=True, slots=True)
class Register:
    """One row: a register, or an array of `count` alike, `stride` bytes apart.

    `writable` are the bits that a write replaces, `write_1_to_clear` those that a written 1 clears,
    `read_to_clear` those that a read sets to 0. All others keep their value. `offset` and `width` are in
    bytes; the width is 1, 2, 4 or 8. Registers are little-endian.
    """

    name: str
    offset: int
    reset: int = 0
    writable: int = 0
    write_1_to_clear: int = 0
    read_to_clear: int = 0
    width: int = 4
    count: int = 1
    stride: int = 0
    fields: tuple[Field, ...] = ()
    text: str = ""
    internal: int = 0
    """Bits that the device sets besides; of a register without writable bits all may be."""
    derived: bool = False
    """The value follows from other state: it is not saved."""

    def __post_init__(self) -> None:
        limit = 1 << (8 * self.width)
        masks = (self.reset, self.writable, self.write_1_to_clear, self.read_to_clear, self.internal)
        if self.width not in (1, 2, 4, 8) or any(not 0 <= mask < limit for mask in masks):
            raise ValueError(f"register {self.name}: width {self.width} does not hold its masks")
        if self.writable & self.write_1_to_clear:
            raise ValueError(f"register {self.name}: a bit is both writable and write-1-to-clear")
        if self.count > 1 and self.stride < self.width:
            raise ValueError(f"register {self.name}: stride {self.stride} is below the width {self.width}")

    @property
    def possible(self) -> int:
        """The bits that can be set in its value."""
        if not self.writable:
            return (1 << 8 * self.width) - 1
        return self.reset | self.writable | self.write_1_to_clear | self.read_to_clear | self.internal


class Cell:
    """One register at work: its `value` may be read and set by the device without side effects."""

    __slots__ = ("index", "name", "offset", "on_read", "on_write", "row", "value", "width")

    def __init__(
        self, row: Register, index: int, on_read: ReadHook | None = None, on_write: WriteHook | None = None
    ) -> None:
        self.row = row
        self.index = index
        self.name = row.name if row.count == 1 else f"{row.name}[{index}]"
        self.offset = row.offset + index * row.stride
        self.width = row.width
        self.on_read = on_read
        self.on_write = on_write
        self.value = row.reset

    def read(self) -> int:
        """Read with all side effects, as the guest does."""
        row = self.row
        value = self.value if self.on_read is None else self.on_read(self.index)
        if row.read_to_clear:
            self.value &= ~row.read_to_clear
        return value

    def write(self, value: int) -> None:
        """Write with all side effects, as the guest does."""
        if self.on_write is None:
            self.store(value)
        else:
            self.on_write(self.index, value)

    def store(self, value: int) -> None:
        """Write by the row's masks, without the hook; hooks call it for the ordinary part."""
        row = self.row
        kept = self.value & ~row.writable & ~(value & row.write_1_to_clear)
        self.value = kept | (value & row.writable)

    def write_bytes(self, value: int, written: int) -> None:
        """Write only the bits of `written`: the others count as unchanged (as 0 where a 1 would clear)."""
        self.write((self.value & ~written & ~self.row.write_1_to_clear) | (value & written))


class RegisterFile(Region):
    """A table of registers as a region of `size` bytes, over an optional `background` of the same size.

    Places without a register belong to the background; without one they read as 0 and writes are lost.
    """

    def __init__(
        self,
        size: int,
        rows: Iterable[Register],
        on_read: Mapping[str, ReadHook] | None = None,
        on_write: Mapping[str, WriteHook] | None = None,
        background: RamRegion | None = None,
    ) -> None:
        """Raise ValueError for rows that overlap or leave the region, and for hooks of unknown names."""
        super().__init__(size)
        self.rows = tuple(rows)
        self.background = background
        on_read, on_write = on_read or {}, on_write or {}
        unknown = (on_read.keys() | on_write.keys()) - {row.name for row in self.rows}
        if unknown:
            raise ValueError(f"hooks for registers that are not in the table: {', '.join(sorted(unknown))}")
        self._arrays: dict[str, tuple[Cell, ...]] = {}
        for row in self.rows:
            self._add(row, on_read.get(row.name), on_write.get(row.name))
        cells = sorted((cell for array in self._arrays.values() for cell in array), key=lambda c: c.offset)
        self._by_offset = {cell.offset: cell for cell in cells}
        self._cells, self._offsets = cells, [cell.offset for cell in cells]
        self._first = self._offsets[0] if cells else size
        self._check_places()

    def _add(self, row: Register, on_read: ReadHook | None, on_write: WriteHook | None) -> None:
        if row.name in self._arrays:
            raise ValueError(f"register {row.name} stands twice in the table")
        self._arrays[row.name] = tuple(Cell(row, index, on_read, on_write) for index in range(row.count))

    def _check_places(self) -> None:
        for cell in self._cells:
            if cell.offset < 0 or cell.offset + cell.width > self.size:
                raise ValueError(f"register {cell.name} at {cell.offset:#x} leaves the {self.size:#x} bytes")
        for cell, other in pairwise(self._cells):
            if cell.offset + cell.width > other.offset:
                raise ValueError(f"registers {cell.name} and {other.name} overlap at {other.offset:#x}")

    @property
    def cells(self) -> list[Cell]:
        """All registers by their offsets, for the device's own use."""
        return self._cells

    def cell(self, name: str, index: int = 0) -> Cell:
        """The register `name` for the device's own use."""
        return self._arrays[name][index]

    def array(self, name: str) -> tuple[Cell, ...]:
        """All registers of the row `name`."""
        return self._arrays[name]

    def reset(self) -> None:
        """Set every register to its reset value, and the background to zeros."""
        for cell in self._cells:
            cell.value = cell.row.reset
        if self.background is not None:
            self.background.reset()

    def section(self, name: str, version: int = 1, upgrades: Mapping[int, Upgrade] | None = None) -> Section:
        """The values of all registers as a section of the state, but of rows that are derived."""
        rows = self._saved_arrays()
        values = sum(len(cells) + 2 for _, cells in rows)
        text = sum(len(row) for row, _ in rows) + values * _DIGITS
        background = 0 if self.background is None else self.background.longest
        return Section(
            name,
            version,
            self.save,
            self.load,
            upgrades or {},
            longest=LONGEST + text + background,
            values=MOST_VALUES + values,
        )

    def save(self) -> Fields:
        """The values by row name, of arrays as lists, and the background."""
        background: Fields = {} if self.background is None else {"background": self.background.save()}
        return background | {
            name: cells[0].value if cells[0].row.count == 1 else [cell.value for cell in cells]
            for name, cells in self._saved_arrays()
        }

    def load(self, reader: Reader) -> Apply:
        """See `Section.load`. A value may have the bits that are `Register.possible`."""
        values: list[tuple[Cell, int]] = []
        for _, cells in self._saved_arrays():
            values += zip(cells, _read_row(reader, cells[0].row), strict=True)
        background = self.background
        apply_background = background.load(reader.record("background")) if background is not None else None

        def apply() -> None:
            if apply_background is not None:
                apply_background()
            for cell, value in values:
                cell.value = value

        return apply

    def _saved_arrays(self) -> list[tuple[str, tuple[Cell, ...]]]:
        return [(name, cells) for name, cells in self._arrays.items() if not cells[0].row.derived]

    def read(self, offset: int, count: int) -> bytes:
        cell = self._by_offset.get(offset)
        if cell is not None and cell.width == count:  # the way of nearly every driver
            return cell.read().to_bytes(count, "little")
        background = self.background
        if background is not None and offset + count <= self._first:
            return background.read(offset, count)
        result = bytearray(count if background is None else background.read(offset, count))
        for cell in self.touched(offset, count):
            data = cell.read().to_bytes(cell.width, "little")
            start, end = max(cell.offset, offset), min(cell.offset + cell.width, offset + count)
            result[start - offset : end - offset] = data[start - cell.offset : end - cell.offset]
        return bytes(result)

    def write(self, offset: int, data: Buffer) -> None:
        count = len(data)
        cell = self._by_offset.get(offset)
        if cell is not None and cell.width == count:
            cell.write(int.from_bytes(data, "little"))
            return
        if self.background is not None:
            self.background.write(offset, data)
        for cell in self.touched(offset, count):
            start, end = max(cell.offset, offset), min(cell.offset + cell.width, offset + count)
            shift = 8 * (start - cell.offset)
            value = int.from_bytes(data[start - offset : end - offset], "little") << shift
            cell.write_bytes(value, ((1 << 8 * (end - start)) - 1) << shift)

    def touched(self, offset: int, count: int) -> list[Cell]:
        """The registers under a range, each once, in the order of their offsets."""
        first = bisect_right(self._offsets, offset)
        if first and self._offsets[first - 1] + self._cells[first - 1].width > offset:
            first -= 1
        return self._cells[first : bisect_left(self._offsets, offset + count)]


def _read_row(reader: Reader, row: Register) -> list[int]:
    high = (1 << 8 * row.width) - 1
    values = (
        [reader.integer(row.name, high)] if row.count == 1 else reader.integers(row.name, high, row.count)
    )
    for value in values:
        if value & ~row.possible:
            reader.refuse(row.name, f"{value:#x} has bits that this register has not ({row.possible:#x})")
    return values
