# SPDX-License-Identifier: BSD-3-Clause
"""Which message do the file descriptors of a read belong to?

The header has no count of file descriptors, so their place in the stream has to tell. The kernel (AF_UNIX
stream) joins several sent buffers in one read, and ends the read after a buffer that carries descriptors:
they belong to the *last* sender's buffer in the read. That is normally the last message which has been
started so far, perhaps in an earlier read, perhaps with an incomplete header. When one sender's buffer
holds several messages, it may also be an earlier one of the same read. So, last first, each message of the
read takes as many as its command may have. What nobody may take is closed, and the last message started is
refused.

This is a guess where a sender puts two messages that may both take descriptors in one buffer; a sender
avoids that by sending messages with descriptors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from vfio_user.protocol import constants as c
from vfio_user.protocol.codec_bodies import IRQ_SET_BODY
from vfio_user.protocol.commands import BY_NUMBER
from vfio_user.protocol.constants import Command, Role
from vfio_user.protocol.events import Fd, close_all

FD_LIMIT_BYTES: Final = c.HEADER_SIZE + IRQ_SET_BODY.size
"""How much of a message `fd_limit` looks at."""


def fd_limit(role: Role, number: int, flags: int, body: bytes | bytearray) -> int:
    """How many fds a message to `role` may have; SET_IRQS as many as it says. `body` is as much of the body
    as has been received."""
    row, kind = BY_NUMBER.get(number), flags & c.TYPE_MASK
    if row is None or flags & c.FLAG_ERROR:
        return 0
    if kind == c.TYPE_REPLY:
        return row.reply_fds[1] if row.sender is role else 0
    if kind != c.TYPE_COMMAND or row.sender is role:
        return 0
    if row.command is Command.DEVICE_SET_IRQS and len(body) >= IRQ_SET_BODY.size:
        _, irq_flags, _, _, count = IRQ_SET_BODY.unpack_from(body)
        return min(row.request_fds[1], count if irq_flags & c.IrqSetFlags.DATA_EVENTFD else 0)
    return row.request_fds[1]


Taken: TypeAlias = tuple[tuple[Fd, ...], bool]
"""The fds of a message, and whether it is to be refused for others."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A message in the stream, by stream positions; `limit` is how many fds it may have, None while its
    header is incomplete."""

    start: int
    stop: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class _Batch:
    """The fds of one read, and the stream positions that the read covers."""

    fds: tuple[Fd, ...]
    start: int
    stop: int


class FdQueue:
    """File descriptors on their way from a read to a message. It owns what it holds."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []
        self._claims: dict[int, tuple[Fd, ...]] = {}
        self._refused: set[int] = set()

    def __bool__(self) -> bool:
        """Whether any message in the buffer is to be looked at with its fds, or refused for them."""
        return bool(self._batches or self._claims or self._refused)

    @property
    def undecided(self) -> bool:
        return bool(self._batches)

    def add(self, fds: Sequence[Fd], start: int, stop: int) -> None:
        self._batches.append(_Batch(tuple(fds), start, stop))

    def assign(self, frames: Sequence[Frame], most: int) -> None:
        """Give the fds to messages. Waits while the last message of a read has an incomplete header; that
        one may have up to `most`, and is refused at once when there are more."""
        while self._batches:
            batch = self._batches[0]
            candidates = [frame for frame in frames if frame.stop > batch.start and frame.start < batch.stop]
            if candidates and candidates[-1].limit is None:
                self._bound(frames, most)
                return
            del self._batches[0]
            self._distribute(batch.fds, candidates)

    def _bound(self, frames: Sequence[Frame], most: int) -> None:
        """Whoever sends a header byte by byte must not make us hold more than its message may have."""
        waiting = [frame for frame in frames if frame.stop > self._batches[0].start]
        room = sum(most if frame.limit is None else frame.limit for frame in waiting)
        while sum(len(batch.fds) for batch in self._batches) > room:
            close_all(self._batches.pop().fds)
            self._refused.add(waiting[-1].start)

    def _distribute(self, fds: tuple[Fd, ...], candidates: Sequence[Frame]) -> None:
        for frame in reversed(candidates):
            held = self._claims.get(frame.start, ())
            room = (frame.limit or 0) - len(held)
            if room > 0 and fds:
                self._claims[frame.start] = held + fds[-room:]
                fds = fds[:-room]
        close_all(fds)
        if fds and candidates:
            self._refused.add(candidates[-1].start)

    def must_wait(self, frame: Frame) -> bool:
        """Whether this complete message may still get fds of a read that is not decided."""
        return bool(self._batches and frame.limit and frame.stop > self._batches[0].start)

    def take(self, start: int) -> Taken:
        """The fds of the message that starts here, now the caller's, and whether it is to be refused."""
        refused = start in self._refused
        self._refused.discard(start)
        return self._claims.pop(start, ()), refused

    def close(self) -> None:
        for batch in self._batches:
            close_all(batch.fds)
        for fds in self._claims.values():
            close_all(fds)
        self._batches.clear()
        self._claims.clear()
        self._refused.clear()
