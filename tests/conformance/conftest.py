# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the conformance tests: a server of each engine in turn, clients, and the check for leaks."""

import os
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from conformance import moving, patience
from conformance import raw as raw_module
from conformance.engines import ENGINES, Engine, Place, Serve, Served, Wanted
from conformance.holdings import Spoiled, expect_unspoiled, holdings
from conformance.limits import Expected, ids_of, limit_of, require_library
from conformance.nursery import Zygote
from conformance.raw import RawClient, connect
from vfio_user.client.background import background
from vfio_user.client.client import Client, open_client
from vfio_user.device_models.device import Device
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch

EXPECTED, STALE = pytest.StashKey[Expected](), pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What the library cannot do is expected to fail; strictly, so that a library that can is noticed."""
    cases: dict[tuple[str, str], dict[str, pytest.Item]] = defaultdict(dict)
    for item in items:
        if (case := _library_case(item)) is not None:
            assert isinstance(item, pytest.Function)
            cases[item.path.stem, item.originalname][case] = item
    for (module, test), found in cases.items():
        _expect(module, test, found)
        if not any("::" in word for word in config.args):  # else there may be other cases that nobody chose
            _compare(module, test, found)


def _expect(module: str, test: str, cases: Mapping[str, pytest.Item]) -> None:
    for case, item in cases.items():
        if (expected := limit_of(module, test, case)) is not None:
            item.stash[EXPECTED] = expected
            item.add_marker(pytest.mark.xfail(reason=expected.reason, strict=True))


def _compare(module: str, test: str, cases: Mapping[str, pytest.Item]) -> None:
    """A case that is listed and does not exist would be a limit that nobody looks at."""
    if stale := ids_of(module, test) - cases.keys():
        for item in cases.values():
            item.stash[STALE] = f"conformance/limits.py has cases that {test} does not have: {sorted(stale)}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A known limit shows in the test itself. Anything else that goes wrong is a failure."""
    report = yield
    if hasattr(report, "wasxfail") and report.skipped and not _is_the_limit(item, call):
        report.outcome = "failed"
        del report.wasxfail
    return report


def _is_the_limit(item: pytest.Item, call: pytest.CallInfo[None]) -> bool:
    """Asynchronous fixtures run within the test's call: so the phase alone does not tell."""
    assert call.excinfo is not None
    expected = item.stash.get(EXPECTED, None)
    return call.when == "call" and (
        expected is None or expected.spoils or not _has_spoiled(call.excinfo.value)
    )


def _has_spoiled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_has_spoiled, error.exceptions))
    return isinstance(error, Spoiled)


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
    if stale := request.node.stash.get(STALE, ""):
        pytest.fail(stale, pytrace=False)
    if EXPECTED in request.node.stash:
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
async def serve(
    request: pytest.FixtureRequest, engine: Engine, zygote: Zygote, tmp_path: Path
) -> AsyncIterator[Serve]:
    """Serves models, each at a path of its own: `serve(Model, "option=value", max_dma_maps=…)`.

    When the test's clients have gone, a server must hold what it held before they came; when the servers
    have ended, this process must.
    """
    if engine.apart:
        require_library()
    expected = request.node.stash.get(EXPECTED, None)
    before_all = holdings(os.getpid())
    before: dict[int, Counter[str]] = {}
    with ExitStack() as stack:
        async with background() as nursery:

            def start(model: type[Device], *assignments: str, **options: Any) -> Served:
                path = tmp_path / f"device{len(before)}.sock"
                wanted = Wanted(model, path, assignments, **options)
                began = trio.current_time()
                served = engine.start(wanted, Place(nursery, stack, zygote))
                if expected is not None:
                    patience.seconds = patience.short(trio.current_time() - began)
                before[served.pid] = holdings(served.pid)
                return served

            yield start
            if expected is None or not expected.spoils:
                patience.seconds = patience.LONG
            for pid, held in before.items():
                await expect_unspoiled(pid, held)
    if holdings(os.getpid()) != before_all:
        raise Spoiled(f"this process holds {holdings(os.getpid())}, and before {before_all}")


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
