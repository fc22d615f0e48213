# SPDX-License-Identifier: BSD-3-Clause
"""A move as QEMU alone makes it, and a comparison of two guests' memory."""

import contextlib
import mmap
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.moving import Side
from vfio_user.client.qemu_migration.qmp import Qmp, open_qmp

PAGE = 4096
BANDWIDTH = 4 << 30
"""Bytes a second that QEMU may send: its default is 128 MiB."""


async def set_bandwidth(side: Side, bandwidth: int = BANDWIDTH) -> None:
    async with open_qmp(str(side.qmp)) as qmp:
        await qmp.execute("migrate-set-parameters", **{"max-bandwidth": bandwidth})


@contextlib.asynccontextmanager
async def held_before_switchover(source: Side, destination: Side) -> AsyncIterator[tuple[Qmp, Qmp]]:
    """Inside the block the guest's CPUs stand still and QEMU has all but its last round to send. After it
    the guest has been moved, and is paused."""
    uri = f"unix:{destination.folder / 'stream'}"
    async with open_qmp(str(source.qmp)) as here, open_qmp(str(destination.qmp)) as there:
        capabilities = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]
        for qmp in (here, there):
            await qmp.execute("migrate-set-capabilities", capabilities=capabilities)
        await here.execute("migrate-set-parameters", **{"max-bandwidth": BANDWIDTH})
        await there.execute("migrate-incoming", uri=uri)
        with here.listen("MIGRATION") as sent, there.listen("MIGRATION") as taken, trio.fail_after(180):
            await here.execute("migrate", uri=uri)
            while (await sent.next()).data["status"] != "pre-switchover":
                pass
            yield here, there
            await here.execute("migrate-continue", state="pre-switchover")
            for events in (sent, taken):
                while (await events.next()).data["status"] != "completed":
                    pass


@contextlib.contextmanager
def memory_of(machine: Machine) -> Iterator[mmap.mmap]:
    """The RAM of a guest whose memory is mapped."""
    folder = Path(f"/proc/{machine.pid}/fd")
    path = next(path for path in folder.iterdir() if re.match(r"/memfd:memory", os.readlink(path)))
    fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            yield memory
    finally:
        os.close(fd)


def different_pages(first: Machine, second: Machine) -> list[int]:
    """The addresses of the pages that are not the same (in guests with less than 2 GiB)."""
    with memory_of(first) as one, memory_of(second) as other:
        assert len(one) == len(other)
        places = range(0, len(one), PAGE)
        return [place for place in places if one[place : place + PAGE] != other[place : place + PAGE]]
