# SPDX-License-Identifier: BSD-3-Clause
"""A reusable receive buffer from which large payloads are lent without a copy.

Bytes `start` to `end` of `buffer` are received and not taken yet; whoever parses in place advances `start`.
A body of up to `COPY_BELOW` bytes is copied out. A larger one is a read-only view of the buffer, and stays
valid for as long as somebody holds it: the buffer is not written again while views of it exist, but
replaced by a new one. (A bytearray refuses to be resized while it is exported; that is how we know.)
"""

from __future__ import annotations

from typing import Final

INITIAL_SIZE: Final = 65536
COPY_BELOW: Final = 16384
"""Copying this much costs less than a page fault or two of a new buffer."""
_LEAST_ROOM: Final = 4096


class ReceiveBuffer:
    """`position` is the stream position of `buffer[0]`."""

    def __init__(self) -> None:
        self.buffer = bytearray(INITIAL_SIZE)
        self.start = 0
        self.end = 0
        self.position = 0
        self._room: memoryview | None = None
        self._room_start = 0
        self._lent = False

    def get_room(self, message_size: int, room: int) -> memoryview:
        """Free space behind `end`: enough for the message under way, which has `message_size` bytes (0: not
        known), and at least `room` bytes. Valid until `commit` or the next `get_room`."""
        unread = self.end - self.start
        whole = self._room if not self._room_start else None
        if not unread and not self._lent and whole is not None and room <= len(whole) >= message_size:
            # The way of a server's loop: all has been parsed, and the view of the whole buffer still fits.
            self.position += self.start
            self.start = self.end = 0
            return whole
        self._release()
        wanted = max(message_size, unread + max(room, 1))
        free = len(self.buffer) - self.end
        if not unread or self.start + wanted > len(self.buffer) or (self.start and free < _LEAST_ROOM):
            self._recycle(unread, wanted)
        self._room = memoryview(self.buffer)[self.end :]
        self._room_start = self.end
        return self._room

    def commit(self, nbytes: int) -> None:
        if not 0 <= nbytes <= len(self.buffer) - self.end:
            raise ValueError(f"{nbytes} bytes cannot have been received")
        self.end += nbytes

    def lend(self, start: int, stop: int) -> bytes | memoryview:
        """The bytes from index `start` to `stop`, safe to keep."""
        view = memoryview(self.buffer)[start:stop].toreadonly()
        if stop - start <= COPY_BELOW:
            return bytes(view)
        self._lent = True
        return view

    def _recycle(self, unread: int, wanted: int) -> None:
        """Move what is unread to the front: of this buffer, or of a new one if this is lent or too small."""
        if wanted > len(self.buffer) or self._is_lent():
            fresh = bytearray(max(INITIAL_SIZE, wanted + _LEAST_ROOM))
            fresh[:unread] = memoryview(self.buffer)[self.start : self.end]
            self.buffer = fresh
            self._lent = False
        elif self.start and unread:
            self.buffer[:unread] = self.buffer[self.start : self.end]
        self.position += self.start
        self.start, self.end = 0, unread

    def _is_lent(self) -> bool:
        if self._lent:
            try:
                self.buffer.append(self.buffer.pop())
            except BufferError:
                return True
            self._lent = False
        return False

    def _release(self) -> None:
        if self._room is not None:
            self._room.release()
            self._room = None
