# SPDX-License-Identifier: BSD-3-Clause
"""The state of a device as values: sections of named fields, checked whole before anything is changed.

A model says in `Device.sections` what is to be saved. What a section saves is JSON-like (`Fields`), so a
stream, a golden file and a person can read it. What is restored comes from an untrusted stream: `load`
reads it through a `Reader`, which wants every field, of its type and within its bounds, and no other.
Nothing is changed while anything may still be found wrong: `load` gives a function that applies, and the
functions of all sections are called after all sections were found good.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

Value = int | str | bool | None | list["Value"] | dict[str, "Value"]
Fields = dict[str, Value]
"""What a section holds, by name; bytes are hexadecimal text."""

Apply = Callable[[], None]
"""Puts what was checked into the device; must not fail."""

U8, U16, U32, U64 = 0xFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
LONGEST_TIME = 1 << 62
"""Nanoseconds: no time left, and no counter, is larger."""
LONGEST, MOST_VALUES = 64 << 10, 1024
"""Of a section that says nothing else: bytes of its fields as JSON, and how many values these have."""


class StateError(Exception):
    """A saved state that cannot be restored. `section` and `field` (either may be empty) say where."""

    def __init__(self, section: str, field: str, reason: str) -> None:
        place = ", ".join(f"{kind} {name}" for kind, name in (("section", section), ("field", field)) if name)
        super().__init__(f"{place}: {reason}" if place else reason)
        self.section = section
        self.field = field
        self.reason = reason


class Reader:
    """The fields of a section, taken one by one; each that is missing, wrong or left over is a StateError.

    `path` is the name of the value that the fields belong to, for a reader of `record` or `records`.
    """

    def __init__(self, section: str, fields: Value, path: str = "") -> None:
        self.section = section
        self._path = path
        if not isinstance(fields, dict):
            raise StateError(section, path, f"an object is wanted, not {_kind(fields)}")
        self._left = dict(fields)
        self._inner: list[Reader] = []

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise StateError about the field `name`."""
        raise StateError(self.section, self._full(name), reason)

    def _full(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path and name else self._path or name

    def _take(self, name: str) -> Value:
        if name not in self._left:
            self.refuse(name, "it is missing")
        return self._left.pop(name)

    def integer(self, name: str, high: int, low: int = 0) -> int:
        """A whole number from `low` to `high`."""
        return self._integer(name, self._take(name), high, low)

    def _integer(self, name: str, value: Value, high: int, low: int = 0) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(name, f"a number is wanted, not {_kind(value)}")
        if not low <= value <= high:
            self.refuse(name, f"{_short(value)} is not from {low} to {high}")
        return value

    def maybe_integer(self, name: str, high: int, low: int = 0) -> int | None:
        """A whole number, or null."""
        value = self._take(name)
        return None if value is None else self._integer(name, value, high, low)

    def null(self, name: str) -> None:
        """Nothing: what this device does not have."""
        value = self._take(name)
        if value is not None:
            self.refuse(name, f"null is wanted, not {_kind(value)}")

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            self.refuse(name, f"true or false is wanted, not {_kind(value)}")
        return value

    def data(self, name: str, most: int, least: int | None = None) -> bytes:
        """Bytes: exactly `most`, or from `least` to `most`."""
        return self._data(name, self._take(name), most, most if least is None else least)

    def _data(self, name: str, value: Value, most: int, least: int) -> bytes:
        if not isinstance(value, str):
            self.refuse(name, f"hexadecimal text is wanted, not {_kind(value)}")
        if not 2 * least <= len(value) <= 2 * most:
            wanted = f"{most}" if least == most else f"{least} to {most}"
            self.refuse(name, f"{len(value) / 2:g} bytes, where {wanted} are wanted")
        try:
            data = bytes.fromhex(value)
        except ValueError:
            data = b""
        if data.hex() != value:  # fromhex takes white space and capitals too
            self.refuse(name, "it is not hexadecimal text in lower case")
        return data

    def _list(self, name: str, most: int, least: int) -> list[Value]:
        value = self._take(name)
        if not isinstance(value, list):
            self.refuse(name, f"a list is wanted, not {_kind(value)}")
        if not least <= len(value) <= most:
            wanted = f"{most}" if least == most else f"{least} to {most}"
            self.refuse(name, f"{len(value)} elements, where {wanted} are wanted")
        return value

    def integers(self, name: str, high: int, most: int, least: int | None = None) -> list[int]:
        """Whole numbers from 0 to `high`: exactly `most`, or from `least` to `most` of them."""
        values = self._list(name, most, most if least is None else least)
        return [self._integer(f"{name}[{place}]", value, high) for place, value in enumerate(values)]

    def data_list(self, name: str, most: int, longest: int, shortest: int = 0) -> list[bytes]:
        """Up to `most` pieces of `shortest` to `longest` bytes."""
        values = self._list(name, most, 0)
        return [
            self._data(f"{name}[{place}]", value, longest, shortest) for place, value in enumerate(values)
        ]

    def record(self, name: str) -> "Reader":
        """An object within, read like a section."""
        return self._reader(self._take(name), name)

    def maybe_record(self, name: str) -> "Reader | None":
        """An object within, or null."""
        value = self._take(name)
        return None if value is None else self._reader(value, name)

    def records(self, name: str, most: int, least: int = 0) -> list["Reader"]:
        """Up to `most` objects within."""
        values = self._list(name, most, least)
        return [self._reader(value, f"{name}[{place}]") for place, value in enumerate(values)]

    def _reader(self, value: Value, name: str) -> "Reader":
        inner = Reader(self.section, value, self._full(name))
        self._inner.append(inner)
        return inner

    def finish(self) -> None:
        """Nobody has asked for what is still left: refuse it."""
        for inner in self._inner:
            inner.finish()
        for name in self._left:
            self.refuse(_short(name), "it is not known here")


def _kind(value: Value) -> str:
    kinds = {bool: "true or false", int: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _short(value: int | str) -> str:
    """A value of the stream for a message that people read: never longer than a line."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= 40 and text.isprintable() else f"{text[:40]!r}..."


Upgrade = Callable[[Fields], Fields]
"""Makes the fields of version n + 1 from those of version n; of a bad field it may raise anything."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a device's state.

    `save` gives the fields as they are now; the device is stopped. `load` checks all of them, changes
    nothing and gives the function that applies them; of a field that is wrong it raises StateError. An
    older `version` goes through `upgrades`, by the version that each starts from; 0 is that of a stream
    without the section (its upgrade gets no fields).

    `longest` and `values` bound what the fields of any version can be: bytes as JSON without spaces, and how
    many values there are at most, with those within others, and names. What is restored is compared with
    them before anything is made of it, or a megabyte of small lists would take forty of memory.
    """

    name: str
    version: int
    save: Callable[[], Fields]
    load: Callable[[Reader], Apply]
    upgrades: Mapping[int, Upgrade] = field(default_factory=dict)
    longest: int = LONGEST
    values: int = MOST_VALUES

    def prepare(self, version: int, fields: Fields) -> Apply:
        """Upgrade, check, and give the function that applies. StateError: nothing has changed."""
        try:
            reader = Reader(self.name, self._upgrade(version, fields))
            apply = self.load(reader)
            reader.finish()
        except StateError:
            raise
        except Exception as error:  # an upgrade that met a bad field, or a model that is broken
            raise StateError(self.name, "", f"it cannot be loaded: {error!r:.200}") from error
        return apply

    def _upgrade(self, version: int, fields: Fields) -> Fields:
        if version > self.version:
            raise StateError(self.name, "", f"version {version} is newer than {self.version}, the one known")
        for step in range(version, self.version):
            if step not in self.upgrades:
                missing = "the section is missing" if step == 0 else f"version {step} is too old"
                raise StateError(self.name, "", missing)
            fields = self.upgrades[step](dict(fields))
        return fields


SavedSections = Mapping[str, tuple[int, Fields]]
"""Version and fields of each section, by its name."""


def save_sections(sections: Iterable[Section]) -> dict[str, tuple[int, Fields]]:
    """The state now."""
    return {section.name: (section.version, section.save()) for section in sections}


def load_sections(sections: Iterable[Section], saved: SavedSections) -> list[Apply]:
    """Check all that was saved; what applies it, in order. StateError: nothing has changed."""
    known = {section.name: section for section in sections}
    for name in saved:
        if name not in known:
            raise StateError(_short(name), "", "this device has no such section")
    return [section.prepare(*saved.get(name, (0, {}))) for name, section in known.items()]


def counted(value: int) -> int:
    """A counter as it is saved: it sticks at 64 bits."""
    return min(value, U64)


def time_left(deadline: int, now: int) -> int:
    """Nanoseconds from `now` to `deadline`, 0 if it has passed; how a time is saved."""
    return min(max(deadline - now, 0), LONGEST_TIME)
