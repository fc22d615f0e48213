# SPDX-License-Identifier: BSD-3-Clause
"""A move that is killed (SIGKILL) as soon as a step begins, and what its user then does by hand.

As a program: STEP, both QMP addresses, the URI, how to let QEMU know of writes, and ID=SOURCE,DESTINATION for
each device.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import trio

from vfio_user.client.control import open_control
from vfio_user.client.qemu_migration.migrate import migrate_guest
from vfio_user.client.qemu_migration.qmp import QmpLost, open_qmp
from vfio_user.client.qemu_migration.report import Progress, Step
from vfio_user.client.qemu_migration.request import Request, Writes, parse_device


async def killed_at(step: Step, request: Request) -> None:
    """Run it to the step, in a process of its own."""
    words = [step.name, request.source_qmp, request.destination_qmp, request.uri, request.writes.value]
    words += [f"{one.id}={one.source},{one.destination}" for one in request.devices]
    with trio.fail_after(30):
        done = await trio.run_process([sys.executable, __file__, *words], check=False, capture_stderr=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


async def give_back(request: Request) -> str:
    """What docs/qemu-migration.md says; the run state in which the source's QEMU was found. The destination
    must not run, nor have run."""
    async with open_qmp(request.destination_qmp) as qmp:
        assert (await qmp.execute("query-status"))["status"] in ("inmigrate", "paused")
        with contextlib.suppress(QmpLost):
            await qmp.execute("quit")
        await qmp.lost.wait()
    await resume(device.source for device in request.devices)
    async with open_qmp(request.source_qmp) as qmp:
        found = str((await qmp.execute("query-status"))["status"])
        await qmp.execute("cont" if found == "postmigrate" else "migrate_cancel")
        while not (await qmp.execute("query-status"))["running"]:  # noqa: ASYNC110
            await trio.sleep(0.02)
        kept = {"pause-before-switchover": False, "events": False}
        rows = [{"capability": name, "state": state} for name, state in kept.items()]
        await qmp.execute("migrate-set-capabilities", capabilities=rows)
    return found


async def resume(controls: Iterable[Path]) -> None:
    for path in controls:
        async with open_control(path) as control:
            await control.call("resume")


def _main(step: str, source: str, destination: str, uri: str, writes: str, *devices: str) -> None:
    def tell(progress: Progress) -> None:
        if progress.step is Step[step]:
            os.kill(os.getpid(), signal.SIGKILL)

    request = Request(source, destination, tuple(map(parse_device, devices)), uri, writes=Writes(writes))
    trio.run(migrate_guest, request, tell)


if __name__ == "__main__":
    _main(*sys.argv[1:])
