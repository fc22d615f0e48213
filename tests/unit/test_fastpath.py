# SPDX-License-Identifier: BSD-3-Clause
"""The hot loop: what it takes, and what it leaves to the session."""

import errno

import pytest

from vfio_user.device_models.regions import RamRegion, Region
from vfio_user.protocol import codec
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import Command, IrqSetFlags, Role
from vfio_user.server.fastpath import SMALL, HotTables, serve_run

UNMASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK


class Broken(Region):
    """Raises on writes, and gives too little on reads."""

    def read(self, offset: int, count: int) -> bytes:
        return bytes(count - 1)

    def write(self, offset: int, data: object) -> None:
        raise RuntimeError("broken")


def serve(data: bytes, regions: dict[int, Region] | None = None) -> tuple[int, list[bytes], int]:
    """Bytes taken, replies, and how often INTx was unmasked."""
    unmasked: list[None] = []
    tables = HotTables(regions or {0: RamRegion(0x2000)}, lambda: unmasked.append(None))
    out: list[bytes] = []
    taken = serve_run(tables, bytearray(data), 0, len(data), out)
    return taken, out, len(unmasked)


def set_irqs(flags: int, index: int = 0, start: int = 0, count: int = 1) -> bytes:
    client = Connection(Role.CLIENT)
    client.request(m.VersionRequest(0, 0))
    client.feed(codec.pack_header(0, Command.VERSION, 20, 1) + bytes(4))
    _, outgoing = client.request(m.DeviceSetIrqsRequest(flags, index, start, count))
    return b"".join(outgoing.buffers)


def test_a_run_of_writes_reads_and_posted_writes() -> None:
    run = (
        codec.pack_region_write(1, 8, 0, b"abcd")
        + codec.pack_region_write(2, 12, 0, b"efgh", no_reply=True)
        + codec.pack_region_read(3, 8, 0, 8)
    )
    taken, out, _ = serve(run)
    assert taken == len(run)
    assert out == [
        codec.pack_region_write_reply(1, 8, 0, 4),
        codec.pack_region_read_reply(3, 8, 0, b"abcdefgh"),
    ]


def test_intx_unmask_is_answered_and_done() -> None:
    message = set_irqs(UNMASK)
    taken, out, unmasked = serve(message)
    assert (taken, unmasked) == (len(message), 1)
    assert out == [codec.pack_header(1, Command.DEVICE_SET_IRQS, 16, 1)]


@pytest.mark.parametrize(
    "message",
    [
        set_irqs(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK),
        set_irqs(UNMASK, index=1),
        set_irqs(UNMASK, start=1),
        set_irqs(UNMASK, count=2),
        set_irqs(UNMASK)[:35],
        codec.pack_region_read(1, 0x1FFF, 0, 2),
        codec.pack_region_read(1, 0, 0, SMALL + 1),
        codec.pack_region_read(1, 0, 5, 4),
        codec.pack_region_write(1, 0, 0, b"abcd")[:-1],
        codec.pack_region_write(1, 0x1FFF, 0, b"ab"),
        codec.pack_header(1, Command.DEVICE_RESET, 16) + bytes(16),
    ],
)
def test_whatever_is_irregular_or_incomplete_is_left_to_the_session(message: bytes) -> None:
    before = codec.pack_region_read(9, 0, 0, 4)
    taken, out, unmasked = serve(before + message)
    assert (taken, len(out), unmasked) == (len(before), 1, 0)


def test_a_device_that_fails_is_asked_once_and_the_run_goes_on_later() -> None:
    broken = Broken(0x1000)
    for message in (codec.pack_region_read(1, 0, 0, 4), codec.pack_region_write(1, 0, 0, b"abcd")):
        taken, out, _ = serve(message + codec.pack_region_read(2, 0, 1, 4), {0: broken, 1: RamRegion(16)})
        command = codec.unpack_header(message)[1]
        assert (taken, out) == (len(message), [codec.pack_error(1, command, errno.EIO)])
    posted = codec.pack_region_write(1, 0, 0, b"abcd", no_reply=True)
    assert serve(posted, {0: broken})[:2] == (len(posted), [])
