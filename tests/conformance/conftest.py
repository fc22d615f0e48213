# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the conformance tests: a server of each engine in turn, clients, and the check for leaks."""

import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conformance.engines import ENGINES, Engine, Serve, Served, Wanted
from conformance.holdings import expect_holdings, holdings
from conformance.raw import RawClient, connect
from vfio_user.client.background import background
from vfio_user.client.client import Client, open_client
from vfio_user.device_models.device import Device
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.param
    return found


@pytest.fixture
async def serve(engine: Engine, tmp_path: Path) -> AsyncIterator[Serve]:
    """Serves models, each at a path of its own: `serve(Model, "option=value", max_dma_maps=…)`.

    When the test's clients have gone, a server must hold what it held before they came; when the servers
    have ended, this process must.
    """
    before_all = holdings(os.getpid())
    before: dict[int, Counter[str]] = {}
    with ExitStack() as stack:
        async with background() as nursery:

            def start(model: type[Device], *assignments: str, **options: Any) -> Served:
                path = tmp_path / f"device{len(list(tmp_path.iterdir()))}.sock"
                served = engine.start(Wanted(model, path, assignments, **options), nursery, stack)
                before[served.pid] = holdings(served.pid)
                return served

            yield start
            for pid, held in before.items():
                await expect_holdings(pid, held)
    assert holdings(os.getpid()) == before_all


@pytest.fixture
def scratch(serve: Serve) -> Served:
    return serve(Scratch)


@pytest.fixture
def faulty(serve: Serve) -> Served:
    return serve(Faulty)


@pytest.fixture
async def raw(scratch: Served) -> AsyncIterator[RawClient]:
    """A raw client of `scratch`, negotiated."""
    async with connect(scratch.path) as client:
        yield client


@pytest.fixture
async def client(scratch: Served) -> AsyncIterator[Client]:
    """A typed client of `scratch`."""
    async with open_client(scratch.path) as client:
        yield client
