# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user migrate` is killed in the middle of a move: nothing of it stays on in the source's server, the
destination does not start, and what the docs say to do by hand gives the guest back."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from guest_moves.killed import give_back, killed_at
from guest_moves.pair import Pair, move_request, opened_pair
from migration.control_bed import until
from vfio_user.client.qemu_migration.report import Step
from vfio_user.client.qemu_migration.request import Limits, Writes


class Bed:
    def __init__(self, pair: Pair) -> None:
        self.here = pair.controls[0]
        self.source, self.destination = pair.qemus
        here, there = pair.servers
        paths = here.control_path, there.control_path
        self.request = move_request(pair.qemus, paths, Limits(), Writes.WRITE_THROUGH)


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with opened_pair(tmp_path) as pair:
        yield Bed(pair)


@pytest.mark.parametrize(
    ("step", "runs", "found"),
    [
        (Step.PRECOPY, True, "running"),
        (Step.HAND_OVER, False, "finish-migrate"),
        (Step.RESTORE, False, "postmigrate"),
    ],
    ids=lambda value: value.name if isinstance(value, Step) else None,
)
async def test_killed_at(bed: Bed, step: Step, runs: bool, found: str) -> None:
    if step is Step.PRECOPY:
        bed.source.may_switch = trio.Event()
    await killed_at(step, bed.request)
    state = await until(bed.here, lambda state: state["dirty_log"]["owner"] is None)
    assert (state["write_through"], state["blank"], state["transfer"]) == (False, False, None)
    assert state["running"] is runs
    assert bed.destination.ran == []
    with trio.fail_after(10):
        assert await give_back(bed.request) == found
    assert bed.source.running
    assert (await bed.here.call("state"))["running"] is True
    assert bed.destination.ran == []
