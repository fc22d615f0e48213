# SPDX-License-Identifier: BSD-3-Clause
"""A device at both sides of a move: real servers with control sockets, and QEMUs without a guest."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from guest_moves.fake_qemu import FakeQemu, fake_pair
from migration.control_bed import SMALL_RAM, Served, opened
from vfio_user.client.control import ControlClient
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.qemu_migration.request import DeviceRequest, Limits, Request, Writes


@dataclass(frozen=True)
class Pair:
    """Each of the source and of the destination; the device's id is `dev`."""

    servers: tuple[Served, Served]
    controls: tuple[ControlClient, ControlClient]
    vmms: tuple[FakeVmm, FakeVmm]
    qemus: tuple[FakeQemu, FakeQemu]


@asynccontextmanager
async def opened_pair(folder: Path) -> AsyncIterator[Pair]:
    async with (
        opened(folder, name="a", options=SMALL_RAM) as (source, here, vmm),
        opened(folder, name="b", options=SMALL_RAM) as (destination, there, other),
        fake_pair(folder, {"dev": vmm}, {"dev": other}) as qemus,
    ):
        yield Pair((source, destination), (here, there), (vmm, other), qemus)


def move_request(
    qemus: tuple[FakeQemu, FakeQemu], controls: tuple[Path, Path], limits: Limits, writes: Writes
) -> Request:
    """To move the device; `controls` are the paths of its control sockets."""
    ends = str(qemus[0].path), str(qemus[1].path)
    return Request(*ends, (DeviceRequest("dev", *controls),), "tcp:127.0.0.1:4444", limits, writes)
