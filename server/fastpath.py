# SPDX-License-Identifier: BSD-3-Clause
"""The hot loop: runs of small REGION_READ and REGION_WRITE messages and INTx unmasks, served in the buffer.

Everything else, and everything irregular, is left to the session, which knows the reasons for an error.
One long function on purpose: a call, an object or a checkpoint per message would double the cost of it
(docs/performance.md). The messages are those of `protocol.codec`, which Hypothesis compares with the
declared layouts.
"""

import errno
import logging
from collections.abc import Callable, Mapping

from vfio_user.device_models.regions import Buffer, Region
from vfio_user.protocol.codec import ACCESS_SIZE, HEADER, REGION_ACCESS, pack_error
from vfio_user.protocol.codec_bodies import IRQ_SET_BODY
from vfio_user.protocol.constants import (
    FLAG_NO_REPLY,
    HEADER_SIZE,
    IRQ_SET_SIZE,
    TYPE_COMMAND,
    TYPE_REPLY,
    Command,
    IrqSetFlags,
    PciIrq,
)

logger = logging.getLogger(__name__)

SMALL = 4096
"""Bytes of data up to which replies are joined; larger ones are sent without a copy by the session."""

_UNMASK = (
    HEADER.pack(0, 0, HEADER_SIZE + IRQ_SET_SIZE, TYPE_COMMAND, 0)
    + IRQ_SET_BODY.pack(IRQ_SET_SIZE, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK, PciIrq.INTX, 0, 1)
)[4:]
UNMASK_SIZE = HEADER_SIZE + IRQ_SET_SIZE

ReadRow = tuple[int, Callable[[int, int], bytes]]
WriteRow = tuple[int, Callable[[int, Buffer], None]]


class HotTables:
    """What the loop calls. By index: (size, access function) of the regions that can be read, and of those
    that can be written; and what unmasks INTx, for a device that has it."""

    def __init__(self, regions: Mapping[int, Region], unmask_intx: Callable[[], None] | None) -> None:
        self.unmask_intx = unmask_intx
        self.readable: dict[int, ReadRow] = {i: (r.size, r.read) for i, r in regions.items() if r.readable}
        self.writable: dict[int, WriteRow] = {i: (r.size, r.write) for i, r in regions.items() if r.writable}


def serve_run(tables: HotTables, buffer: bytearray, start: int, end: int, out: list[bytes]) -> int:
    """Serve the messages at `start`, append the replies to `out`, return where the rest begins.

    Stops at the first message that is incomplete, of another command, or not in order in any way.
    """
    unpack, pack, append = REGION_ACCESS.unpack_from, REGION_ACCESS.pack, out.append
    readable, writable = tables.readable, tables.writable
    read_command, write_command = int(Command.REGION_READ), int(Command.REGION_WRITE)
    irqs_command, unmask_intx = int(Command.DEVICE_SET_IRQS), tables.unmask_intx
    message_id = command = flags = 0
    try:
        while end - start >= ACCESS_SIZE:
            message_id, command, size, flags, _, offset, index, count = unpack(buffer, start)
            if command == read_command:
                row = readable.get(index)
                if row is None or flags or size != ACCESS_SIZE or count > SMALL or offset + count > row[0]:
                    break
                start += ACCESS_SIZE
                data = row[1](offset, count)
                if len(data) != count:
                    raise ValueError(f"region {index} gave {len(data)} bytes at {offset:#x}, not {count}")
                size += count
                append(pack(message_id, read_command, size, TYPE_REPLY, 0, offset, index, count) + data)
            elif command == write_command:
                write_row = writable.get(index)
                if (
                    write_row is None
                    or flags & ~FLAG_NO_REPLY != TYPE_COMMAND
                    or count > SMALL
                    or size != ACCESS_SIZE + count
                    or end - start < size
                    or offset + count > write_row[0]
                ):
                    break
                written = buffer[start + ACCESS_SIZE : start + size]
                start += size
                write_row[1](offset, written)
                if not flags:
                    append(pack(message_id, write_command, ACCESS_SIZE, TYPE_REPLY, 0, offset, index, count))
            elif command == irqs_command and unmask_intx is not None:
                # Without KVM every INTx that fired is followed by this one message.
                if flags or buffer[start + 4 : start + UNMASK_SIZE] != _UNMASK or end - start < UNMASK_SIZE:
                    break
                start += UNMASK_SIZE
                unmask_intx()
                append(HEADER.pack(message_id, irqs_command, HEADER_SIZE, TYPE_REPLY, 0))
            else:
                break
    except Exception:
        # `start` has passed the message already: the access is not tried a second time.
        logger.exception("the device failed in %s", Command(command).name)
        if not flags & FLAG_NO_REPLY:
            append(pack_error(message_id, command, errno.EIO))
    return start
