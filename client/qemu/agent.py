# SPDX-License-Identifier: BSD-3-Clause
"""The lines between us and the guest's command agent (guest/agent), without I/O.

A command goes in as `run NUMBER SECONDS TEXT`. An answer is ^A, the number, exit status and length,
a newline, and that many bytes of output. The agent says `ready` in the same form when the guest has booted.
What comes before a ^A is noise of the serial port at reset.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

_START = b"\x01"
READY = "ready"
# Exit status of a command that the guest killed because its time was up.
KILLED = 137
# Sent raw into a terminal in raw mode: more than this might outrun the guest's input buffer.
LONGEST_COMMAND = 16384


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: the command's number (or READY), its exit status and raw output."""

    tag: str
    status: int
    output: bytes


def command_line(number: int, seconds: float, text: str) -> bytes:
    """The line that starts a command. Raises ValueError for NUL and for a command that is too long."""
    if "\0" in text:
        raise ValueError("a shell command cannot hold NUL")
    line = f"run {number} {max(1, round(seconds))} $'".encode() + _escaped(text) + b"'\n"
    if len(line) > LONGEST_COMMAND:
        raise ValueError(f"the command takes {len(line)} bytes on the line, more than {LONGEST_COMMAND}")
    return line


def _escaped(text: str) -> bytes:
    """The text inside the shell's $'': three octal digits for whatever is not plain."""
    plain = set(range(0x20, 0x7F)) - set(b"\\'")
    return b"".join(bytes([octet]) if octet in plain else b"\\%03o" % octet for octet in text.encode())


@dataclass(slots=True)
class AnswerParser:
    """Cuts the byte stream from the guest into answers; the borders of `feed` do not matter."""

    _data: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[Answer]:
        """The answers that are complete with `data`."""
        self._data += data
        while (answer := self._next()) is not None:
            yield answer

    def _next(self) -> Answer | None:
        start = self._data.find(_START)
        if start < 0:
            self._data.clear()
            return None
        del self._data[:start]
        end = self._data.find(b"\n")
        if end < 0:
            return None
        head = self._data[1:end].decode(errors="replace").split()
        if len(head) != 3 or not (head[1].isdecimal() and head[2].isdecimal()):
            del self._data[:1]
            return self._next()
        return self._cut(head[0], int(head[1]), end + 1, int(head[2]))

    def _cut(self, tag: str, status: int, start: int, length: int) -> Answer | None:
        if len(self._data) < start + length:
            return None
        output = bytes(self._data[start : start + length])
        del self._data[: start + length]
        return Answer(tag, status, output)
