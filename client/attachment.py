# SPDX-License-Identifier: BSD-3-Clause
"""VMMs that come and go in any order, as they do when a guest is moved from one to the next.

here = await attach(nursery, path)
there = await attach(nursery, other_path, incoming=True)
await migrate(here.vmm, there.vmm)
await here.close()
"""

import os
import socket

import trio

from vfio_user.client.fake_vmm import DEFAULT_OPTIONS, FakeVmm, VmmOptions, open_vmm
from vfio_user.client.memory import GuestRam


class Attachment:
    """An attached VMM. Make it with `attach`."""

    def __init__(self, vmm: FakeVmm) -> None:
        self.vmm = vmm
        self._leave = trio.Event()
        self._gone = trio.Event()

    async def close(self) -> None:
        """End the connection; memory that was made with it is gone then."""
        self._leave.set()
        await self._gone.wait()

    async def _stay(self) -> None:
        await self._leave.wait()


async def attach(
    nursery: trio.Nursery,
    server: str | os.PathLike[str] | socket.socket,
    options: VmmOptions = DEFAULT_OPTIONS,
    *,
    ram: GuestRam | None = None,
    incoming: bool = False,
) -> Attachment:
    """A started VMM, as `open_vmm` gives it; with `incoming` one that waits for a guest from elsewhere.

    It lives until it is closed, or the nursery is cancelled.
    """
    found: list[Attachment] = []
    await nursery.start(_hold, server, options, ram, incoming, found)
    return found[0]


async def _hold(
    server: str | os.PathLike[str] | socket.socket,
    options: VmmOptions,
    ram: GuestRam | None,
    incoming: bool,
    found: list[Attachment],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    attachment: Attachment | None = None
    try:
        async with open_vmm(server, options, ram=ram, start=not incoming) as vmm:
            if incoming:
                await vmm.start_incoming()
            attachment = Attachment(vmm)
            found.append(attachment)
            task_status.started()
            await attachment._stay()
    finally:
        if attachment is not None:
            attachment._gone.set()
