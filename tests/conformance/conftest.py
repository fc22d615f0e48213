# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the conformance tests: a server of each engine in turn, clients, and the check for leaks."""

import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conformance import moving, patience
from conformance import raw as raw_module
from conformance.engines import ENGINES, Engine, Place, Serve, Served, Wanted
from conformance.holdings import expect_holdings, holdings
from conformance.limits import limit_of, require_library
from conformance.nursery import Zygote
from conformance.raw import RawClient, connect
from vfio_user.client.background import background
from vfio_user.client.client import Client, open_client
from vfio_user.device_models.device import Device
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the library cannot do is expected to fail; strictly, so that a library that can is noticed."""
    for item in items:
        if (case := _library_case(item)) is not None:
            assert isinstance(item, pytest.Function)
            if (reason := limit_of(item.path.stem, item.originalname, case)) is not None:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _library_case(item: pytest.Item) -> str | None:
    """The id of a test's case without its engine, if that is the library."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or getattr(callspec.params.get("engine"), "name", "") != "libvfio-user":
        return None
    found: str = callspec.id.removeprefix("libvfio-user").removeprefix("-")
    return found


@pytest.fixture(autouse=True)
def _known_to_fail(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for what will not come, and let pass what has a row and a test of its own."""
    if _library_case(request.node) is None:
        return
    if request.node.get_closest_marker("xfail"):
        monkeypatch.setattr(patience, "seconds", patience.SHORT)
    monkeypatch.setattr(raw_module, "bare_errors", False)
    monkeypatch.setattr(moving, "exact_replies", False)


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.param
    return found


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that servers apart are forked from."""
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
async def serve(engine: Engine, zygote: Zygote, tmp_path: Path) -> AsyncIterator[Serve]:
    """Serves models, each at a path of its own: `serve(Model, "option=value", max_dma_maps=…)`.

    When the test's clients have gone, a server must hold what it held before they came; when the servers
    have ended, this process must.
    """
    if engine.apart:
        require_library()
    before_all = holdings(os.getpid())
    before: dict[int, Counter[str]] = {}
    with ExitStack() as stack:
        async with background() as nursery:

            def start(model: type[Device], *assignments: str, **options: Any) -> Served:
                path = tmp_path / f"device{len(before)}.sock"
                wanted = Wanted(model, path, assignments, **options)
                served = engine.start(wanted, Place(nursery, stack, zygote))
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
