# SPDX-License-Identifier: BSD-3-Clause
"""Makes the state stream of a device, as much at a time as is asked for."""

from collections import deque
from collections.abc import Callable, Mapping

import xxhash

from vfio_user.device_models.device import Device
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.state_memory import StateMemory
from vfio_user.server.migration.stream import (
    BLOCK,
    END,
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    MEMORY,
    RECORD,
    ZERO,
    Kind,
    Limits,
    encode_fields,
)

_LOOK = 4 << 20
"""Bytes that one `take` looks at for zeros. What else it gives is sent as it is: so the loop is not held for
longer, and "fewer than asked for" means what it always does. Somebody may have filled a GiB with zeros, or
every second page of it."""
_LOOK_FOR_ONE = 32 << 10
"""A record costs about as much as to look at so many."""
_JOIN = 16 << 10
"""Bytes up to which a piece is put together with others: it is counted in the digest, and sent, with them."""
_PIECE = 64 << 10
_ZEROS = bytes(_PIECE)
_DIGEST = 16  # bytes
_END_SIZE = RECORD.size + END.size


class StreamWriter:
    """One session of saving. Memories are streamed while the device runs, and again where they change;
    sections are saved at the end, once the device stands still.

    Raises whatever a model raises; the session is of no use then, but for `close`.
    """

    def __init__(self, device: Device, settle: Callable[[], None] = lambda: None) -> None:
        """`settle` is called before the sections are saved."""
        self._device = device
        self._settle = settle
        self._memories: Mapping[str, StateMemory] = device.memories()
        self._queue: deque[memoryview] = deque()
        self._tail = bytearray()
        """What follows the queue, and is not counted in the digest yet."""
        self._queued = 0
        """Bytes in both."""
        self._looks = 0
        """Bytes that may still be looked at for zeros."""
        self._hash = xxhash.xxh3_128()
        self._records = 0
        self._finishing = self._ended = False
        self._failure: Exception | None = None
        """Of `prepare`."""
        self._expected = 0
        """Bytes of the sections, roughly, while they are still to come."""
        model = device.model.encode()
        self._emit(HEADER.pack(MAGIC, FORMAT_VERSION, 0, device.state_version, len(model)) + model)
        try:
            for name, memory in self._memories.items():
                memory.start_log()
                self._record(Kind.ZERO, name, ZERO.pack(0, memory.size))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The end of the session: memories are not watched any longer, and may be closed.

        Who keeps an exception keeps us too, by its traceback.
        """
        self._queue.clear()
        self._queued = 0
        self._failure = None
        for memory in self._memories.values():
            memory.stop_log()

    def finish(self) -> None:
        """The device stands still from now on. If its sections cannot be saved, nothing has changed.

        They are saved for good as late as possible: a client that does DMA for us has then answered what it
        was asked before it learned of the stop, and the device takes note of it. Otherwise the destination
        would write again what the guest can see already.
        """
        self._expected = sum(len(payload) for _, _, payload in self._sections())
        self._finishing = True

    def _sections(self) -> list[tuple[str, int, bytes]]:
        """Name, version and payload of each."""
        return [
            (section.name, section.version, encode_fields(section.name, section.save(), Limits.of(section)))
            for section in self._device.sections()
        ]

    @property
    def pending(self) -> int:
        """Bytes that `take` can give now, roughly; 0 exactly when there are none."""
        owed = _END_SIZE + self._expected if self._finishing and not self._ended else 0
        return self._queued + owed + sum(memory.pending for memory in self._memories.values())

    def take(self, size: int) -> list[Buffer]:
        """The next `size` bytes, or all that there are now.

        Once the session is finishing they may be views of the device's memory: they are to be sent before
        the device can go on.
        """
        self._raise_failure()
        self._looks = _LOOK
        while self._queued < size and self._produce():
            pass
        self._seal()
        taken: list[Buffer] = []
        while size and self._queue:
            first = self._queue.popleft()
            piece, rest = first[:size], first[size:]
            if rest:
                self._queue.appendleft(rest)
            taken.append(piece)
            self._queued -= len(piece)
            size -= len(piece)
        return taken

    def prepare(self) -> None:
        """The device stands still: put the next block of its memories into the queue, if that is short."""
        if self._queued >= BLOCK or self._failure is not None:
            return
        self._looks = _LOOK
        try:
            self._next_block()
            self._seal()  # counted in the digest now, rather than when it is wanted
        except Exception as error:
            self._failure = error  # for who reads

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def take_record(self) -> bytes:
        """What is queued, else the next record: a copy, so that the device may go on. Empty: as `take`."""
        self._raise_failure()
        self._looks = _LOOK
        if not self._queued:
            self._produce()
        self._seal()
        taken = b"".join(self._queue)
        self._queue.clear()
        self._queued = 0
        return taken

    def _produce(self) -> bool:
        """Put one more record into the queue, if there is anything to say."""
        if self._next_block():
            return True
        if not self._finishing or self._ended:
            return False
        self._keep()
        self._settle()  # which may write to a memory
        if not self._next_block():
            self._end()
        return True

    def _next_block(self) -> bool:
        for name, memory in self._memories.items():
            piece = memory.take(BLOCK)
            if piece is not None:
                self._block(name, memory.view, *piece)
                return True
        return False

    def _block(self, name: str, view: memoryview, offset: int, length: int) -> None:
        part = view[offset : offset + length]
        if self._looks > 0 and self._is_zero(part):
            self._record(Kind.ZERO, name, ZERO.pack(offset, length))
        else:
            self._record(Kind.MEMORY, name, MEMORY.pack(offset), part)

    def _is_zero(self, part: memoryview) -> bool:
        """Three bytes tell of nearly every block that it is not; only the others are looked at whole."""
        length = len(part)
        if part[0] or part[length // 2] or part[-1]:
            return False
        self._looks -= length + _LOOK_FOR_ONE
        pieces = (part[place : place + _PIECE] for place in range(0, length, _PIECE))
        return all(_ZEROS.startswith(bytes(piece)) for piece in pieces)

    def _end(self) -> None:
        for name, version, payload in self._sections():
            self._record(Kind.SECTION, name, payload, version=version)
        head = RECORD.pack(Kind.END, 0, 0, END.size) + END.pack(self._records, bytes(_DIGEST))[:-_DIGEST]
        self._emit(head)
        self._seal()
        self._emit(self._hash.digest())
        self._ended = True

    def _record(self, kind: Kind, name: str, head: bytes, data: Buffer = b"", *, version: int = 0) -> None:
        encoded = name.encode()
        self._emit(RECORD.pack(kind, len(encoded), version, len(head) + len(data)) + encoded + head)
        if len(data):
            self._emit(data)
        self._records += 1

    def _emit(self, data: Buffer) -> None:
        if len(data) <= _JOIN:
            self._tail += data
        else:
            self._seal()
            # While the device runs it would write into what has been counted in the digest.
            self._append(data if self._finishing else bytes(data))
        self._queued += len(data)

    def _keep(self) -> None:
        """A copy of what waits, which was counted in the digest: memories may change now."""
        self._seal()
        if self._queue:
            self._queue = deque((memoryview(b"".join(self._queue)),))

    def _seal(self) -> None:
        """Nothing more is put together with the tail."""
        if self._tail:
            self._append(self._tail)
            self._tail = bytearray()

    def _append(self, data: Buffer) -> None:
        self._hash.update(data)
        self._queue.append(memoryview(data))
