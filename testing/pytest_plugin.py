# SPDX-License-Identifier: BSD-3-Clause
"""The pytest plugin: the fixture `vfio_migration`, and its options; tests that use it may be coroutines.

pytest loads this module in every project of an environment that has the package: so it imports nothing but
pytest, and all else when a test asks for the fixture. docs/migration.md says how to use it.
"""

import inspect
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vfio_user.testing.migration import MigrationTester

MOVES = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    """See `pytest --help`, "vfio-user"."""
    group = parser.getgroup("vfio-user", "vfio-user: devices that are moved (the fixture vfio_migration)")
    group.addoption(
        "--vfio-user-seed",
        type=int,
        metavar="N",
        help="Repeat the random choices of a test that failed; it has said which.",
    )
    group.addoption(
        "--vfio-user-moves",
        type=_count,
        default=MOVES,
        metavar="N",
        help=f"Moves of a test that does not say how many ({MOVES}).",
    )
    group.addoption(
        "--vfio-user-apart",
        action="store_true",
        help="Each server in a process of its own, as in earnest: slower, but nothing can be shared.",
    )


def _count(text: str) -> int:
    from argparse import ArgumentTypeError  # as everything here, only where it is needed

    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no number of moves: give 1 or more")
    return int(text)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine that uses the fixture under trio, unless another plugin (pytest-trio) does so: what
    it runs is no coroutine here any more. Without one, pytest would fail it, or before 8.4 pass it over."""
    if "vfio_migration" not in pyfuncitem.fixturenames or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from vfio_user.testing.migration import run_test

    names = inspect.signature(pyfuncitem.obj).parameters
    run_test(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.fixture
def vfio_migration(request: pytest.FixtureRequest) -> "MigrationTester":
    """Moves a device model from server to server, with a guest that uses it: see `MigrationTester`."""
    from vfio_user.testing.migration import MigrationTester

    option = request.config.getoption
    return MigrationTester(
        seed=option("--vfio-user-seed"),
        moves=option("--vfio-user-moves"),
        apart=option("--vfio-user-apart"),
    )
