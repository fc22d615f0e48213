# SPDX-License-Identifier: BSD-3-Clause
"""Anything may fail at any time, on either side, while a guest works; it must not notice, or the report must
say why it does not go on.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random

import pytest

from migration.chaos import attempt, make_plan
from migration.fault_scene import OPTIONS, Scene, open_scene
from migration.moving import SOAK, seeded
from migration.nic_scene import open_nic_scene
from vfio_user.client.fake_vmm import VmmOptions

Open = Callable[[Path, Random, VmmOptions], AbstractAsyncContextManager[Scene]]


@pytest.mark.timeout(0 if SOAK else 400)
@pytest.mark.parametrize(
    ("name", "open_one"), [("scratch", open_scene), ("e1000", open_nic_scene)], ids=["scratch", "e1000"]
)
async def test_anything_may_fail_at_any_time(tmp_path: Path, name: str, open_one: Open) -> None:
    with seeded(f"chaos {name}") as chance:
        left = 500 if SOAK else 20
        while left > 0:
            folder = tmp_path / str(left)
            folder.mkdir()
            async with open_one(folder, chance, OPTIONS) as scene:
                alive = True
                while left > 0 and alive:
                    alive = await attempt(scene, make_plan(chance))
                    left -= 1
                if alive:
                    await scene.finish()
