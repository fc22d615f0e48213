# SPDX-License-Identifier: BSD-3-Clause
"""Messages as bytes, packed by hand from the specification's tables: an oracle beside the protocol package.

`body` functions give what follows the header; `message` puts a header before it.
"""

import json
import struct
from collections.abc import Sequence
from typing import Any

HEADER = struct.Struct("=HHIII")
VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO, SET_IRQS = range(
    1, 9
)
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET, DIRTY_PAGES, WRITE_MULTI = range(9, 16)
DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE = range(16, 19)
REPLY, NO_REPLY, ERROR = 0x1, 0x10, 0x20

READABLE, WRITABLE = 1, 2
UNMAP_BITMAP, UNMAP_ALL = 1, 2
DATA_NONE, DATA_BOOL, DATA_EVENTFD, MASK, UNMASK, TRIGGER = (1 << bit for bit in range(6))
INTX, MSI, MSIX, ERR, REQ = range(5)
CONFIG = 7
COMMAND_REGISTER, BUS_MASTER = 4, struct.pack("<H", 0x0006)


def message(command: int, body: bytes = b"", *, flags: int = 0, message_id: int = 0x1234) -> bytes:
    return HEADER.pack(message_id, command, HEADER.size + len(body), flags, 0) + body


def version(capabilities: dict[str, Any] | None = None, *, major: int = 0, minor: int = 1) -> bytes:
    """With the JSON text that QEMU would send, but for `capabilities`; None: no version data at all."""
    if capabilities is None:
        return version_text(b"", major=major, minor=minor)
    text = json.dumps({"capabilities": {"max_msg_fds": 16} | capabilities}).encode() + b"\0"
    return version_text(text.replace(b"{", b"{" + b" " * 100, 1), major=major, minor=minor)


def version_text(text: bytes, *, major: int = 0, minor: int = 1) -> bytes:
    return struct.pack("=HH", major, minor) + text


def dma_map(
    address: int, size: int, offset: int = 0, flags: int = READABLE | WRITABLE, argsz: int = 32
) -> bytes:
    return struct.pack("=IIQQQ", argsz, flags, offset, address, size)


def dma_unmap(address: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
    return struct.pack("=IIQQ", argsz, flags, address, size)


def get_info(argsz: int = 16) -> bytes:
    return struct.pack("=IIII", argsz, 0, 0, 0)


def get_region_info(index: int, argsz: int = 32) -> bytes:
    return struct.pack("=IIIIQQ", argsz, 0, index, 0, 0, 0)


def get_region_io_fds(index: int, argsz: int = 16, flags: int = 0, count: int = 0) -> bytes:
    return struct.pack("=IIII", argsz, flags, index, count)


def get_irq_info(index: int, argsz: int = 16) -> bytes:
    return struct.pack("=IIII", argsz, 0, index, 0)


def set_irqs(index: int, flags: int, start: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("=IIIII", 20 + len(data), flags, index, start, count) + data


def region_read(region: int, offset: int, count: int) -> bytes:
    return struct.pack("=QII", offset, region, count)


def region_write(region: int, offset: int, data: bytes) -> bytes:
    return struct.pack("=QII", offset, region, len(data)) + data


def write_multi(writes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Writes are (region, offset, data)."""
    entries = (struct.pack("=QII8s", offset, region, len(data), data) for region, offset, data in writes)
    return struct.pack("=Q", len(writes)) + b"".join(entries)


def dma_read_reply(address: int, data: bytes) -> bytes:
    return struct.pack("=QQ", address, len(data)) + data


def dma_write_reply(address: int, count: int) -> bytes:
    return struct.pack("=QQ", address, count)


VALID = {
    DMA_MAP: dma_map(0x10000, 0x1000),
    DMA_UNMAP: dma_unmap(0x10000, 0x1000),
    GET_INFO: get_info(),
    GET_REGION_INFO: get_region_info(0),
    GET_REGION_IO_FDS: get_region_io_fds(0),
    GET_IRQ_INFO: get_irq_info(0),
    SET_IRQS: set_irqs(INTX, DATA_NONE | TRIGGER, 0, 0),
    REGION_READ: region_read(0, 0, 4),
    REGION_WRITE: region_write(0, 0, b"word"),
    RESET: b"",
    WRITE_MULTI: write_multi([(0, 0, b"word"), (0, 4, b"and more")]),
}
"""A body that works for each command which every server has to know, in an order in which they work."""

MIGRATION = {
    DIRTY_PAGES: struct.pack("=II", 8, 1),
    DEVICE_FEATURE: struct.pack("=II", 16, 1 << 16 | 1),
    MIG_DATA_READ: struct.pack("=II", 4096, 4088),
    MIG_DATA_WRITE: struct.pack("=II", 8, 0),
}
"""Commands of migration, well formed; whether they are refused follows from the device and its state."""
