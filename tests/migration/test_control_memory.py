# SPDX-License-Identifier: BSD-3-Clause
"""A state of 256 MiB from server to server by their control sockets: nobody on the way has it in memory, and
the one who loads it has it once, until all of it has been checked."""

import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from migration.control_bed import SMALL_RAM
from vfio_user.client.background import background
from vfio_user.client.control import open_control
from vfio_user.client.control_streams import inline_load, open_inline_save
from vfio_user.client.fake_vmm import open_vmm
from vfio_user.client.server_process import serving

SIZE, PIECE = 256 << 20, 1 << 20
ROOM = 24 << 20
"""What buffers, and the interpreter, may take besides."""


def private(pid: int) -> int:
    """Bytes of a process that nothing else backs; memory of the device is in a file that is shared."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


class Growth:
    """The most that each of some processes had of its own, above what it had at first."""

    def __init__(self, *pids: int) -> None:
        self._first = {pid: private(pid) for pid in pids}
        self.most = dict.fromkeys(pids, 0)

    def look(self) -> None:
        for pid, first in self._first.items():
            self.most[pid] = max(self.most[pid], private(pid) - first)

    async def watch(self) -> None:
        while True:
            self.look()
            await trio.sleep(0.005)


@contextlib.asynccontextmanager
async def grown(*pids: int) -> AsyncIterator[Growth]:
    growth = Growth(*pids)
    async with background() as nursery:
        nursery.start_soon(growth.watch)
        yield growth
        growth.look()


async def test_a_large_state_is_nowhere_in_memory_twice(tmp_path: Path) -> None:
    here, there = tmp_path / "a.control", tmp_path / "b.control"
    words = ["--set", f"memory={SIZE}", "--control"]
    async with (
        serving("scratch", tmp_path / "a", [*words, str(here)]) as source,
        serving("scratch", tmp_path / "b", [*words, str(there)]) as target,
    ):
        async with open_vmm(source.path, SMALL_RAM) as vmm:
            for offset in range(0, SIZE, PIECE):
                await vmm.client.region_write(2, offset, os.urandom(4096) * (PIECE // 4096))
            async with grown(source.pid, target.pid, os.getpid()) as growth, open_inline_save(here) as save:
                await inline_load(there, save)
            assert save.bytes > SIZE
            assert growth.most[source.pid] < ROOM
            assert growth.most[os.getpid()] < ROOM
            assert SIZE // 2 < growth.most[target.pid] < SIZE + ROOM  # what is there can be seen so
            async with grown(source.pid) as growth, open_control(here) as control:
                with Path("/dev/null").open("wb") as nowhere:  # noqa: ASYNC230
                    assert (await control.call("save", fd=nowhere.fileno()))["bytes"] > SIZE
            assert growth.most[source.pid] < ROOM
        async with open_vmm(target.path, SMALL_RAM, start=False) as vmm:
            data = await vmm.client.region_read(2, SIZE - 8192, 8192)
            assert data[:4096] == data[4096:] != bytes(4096)
