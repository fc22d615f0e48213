# SPDX-License-Identifier: BSD-3-Clause
"""What a controller switches on with `lease=true` ends with its connection, however that ends."""

from pathlib import Path
from typing import Any

import pytest

from migration.control_bed import SMALL_RAM, copy, listen, opened, until
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.fake_vmm import open_vmm
from vfio_user.server.control_methods import METHODS

LEASED = {"log-start": {}, "write-through": {"on": True}, "blank": {"on": True}}
ENDED = {"log-start": None, "write-through": False, "blank": False}


async def look(controller: ControlClient) -> dict[str, Any]:
    """By the method that switches it on."""
    return figures(await controller.call("state"))


def figures(state: Any) -> dict[str, Any]:
    return {
        "log-start": state["dirty_log"]["owner"],
        "write-through": state["write_through"],
        "blank": state["blank"],
    }


def test_what_can_be_leased() -> None:
    assert {name for name, row in METHODS.items() if row.end is not None} == LEASED.keys()
    for row in METHODS.values():
        assert ("lease" in {param.name for param in row.params}) == (row.end is not None)


async def test_a_lease_ends_with_its_connection(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await controller.call("stop")
        async with open_control(served.control_path) as leaving:
            for method, params in LEASED.items():
                await leaving.call(method, **params, lease=True)
            assert await look(controller) == {"log-start": "controller", "write-through": True, "blank": True}
        await until(controller, lambda state: figures(state) == ENDED)
        assert (await controller.call("state"))["running"] is False  # a stop stays: it has no lease
        await controller.call("resume")
        told = listen(vmm)
        await copy(vmm, 0, 0x1000, 64)
        assert told == []


async def test_without_a_lease_it_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, _):
        await controller.call("stop")
        async with open_control(served.control_path) as leaving:
            for method, params in LEASED.items():
                await leaving.call(method, **params)
        async with open_control(served.control_path) as another:  # accepted after the end of the other one
            assert await look(another) == {"log-start": "controller", "write-through": True, "blank": True}


@pytest.mark.parametrize("method", LEASED)
async def test_the_last_request_decides(tmp_path: Path, method: str) -> None:
    params = LEASED[method]
    async with opened(tmp_path) as (served, controller, _):
        await controller.call("stop")
        async with open_control(served.control_path) as first, open_control(served.control_path) as second:
            await first.call(method, **params, lease=True)
            await second.call(method, **params)
        async with open_control(served.control_path) as third:
            assert (await look(third))[method] not in (None, False)
            await third.call(method, **params, lease=True)
        await until(controller, lambda state: figures(state)[method] == ENDED[method])


async def test_a_lease_that_is_over_ends_nothing_of_others(tmp_path: Path) -> None:
    """The VMM left, and with it what was leased; what the next one has is its own."""
    async with opened(tmp_path) as (served, controller, vmm):
        async with open_control(served.control_path) as leaving:
            await leaving.call("log-start", lease=True)
            await leaving.call("log-stop")
            await vmm.client.dirty_pages_start()
        async with open_control(served.control_path) as another:
            assert (await look(another))["log-start"] == "client"
        vmm.client.close()
        await until(controller, lambda state: not state["client"]["attached"])
        async with open_control(served.control_path) as leaving, open_vmm(served.path, SMALL_RAM):
            await leaving.call("write-through", on=True, lease=True)
        state = await until(controller, lambda state: not state["client"]["attached"])
        assert state["write_through"] is False
