# SPDX-License-Identifier: BSD-3-Clause
"""The table of what the libvfio-user engine cannot do, and the tests that show it, belong together."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.engines import ENGINES
from conformance.limits import ELSEWHERE, EXPECTED, Fails, ModuleFails, limit_of
from vfio_user.cli.engines import ENGINES as NAMES
from vfio_user.server.engines.libvfio_user_limits import LIMITS

HERE = Path(__file__).parent


def test_every_engine_of_the_command_line_has_a_row() -> None:
    assert [engine.name for engine in ENGINES] == list(NAMES)


def test_every_row_is_shown_by_a_test() -> None:
    names = [limit.name for limit in LIMITS]
    assert len(set(names)) == len(names)
    assert set(names) == set(EXPECTED) | set(ELSEWHERE)
    assert not set(EXPECTED) & set(ELSEWHERE)
    assert all((HERE.parents[1] / path).exists() for path in ELSEWHERE.values())


def test_every_test_that_is_expected_to_fail_exists() -> None:
    functions = {
        node.name
        for path in HERE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AsyncFunctionDef)
    }
    rows = [fails for row in EXPECTED.values() for fails in row]
    named = {fails.test.rpartition("::")[2] for fails in rows if isinstance(fails, Fails)}
    modules = [fails for fails in rows if isinstance(fails, ModuleFails)]
    assert named.union(*(fails.good for fails in modules)) <= functions
    assert all((HERE / f"{fails.module}.py").exists() for fails in modules)


@pytest.mark.parametrize("test", ["test_that_does_not_exist", "test_a_handler_that_raises"])
def test_other_tests_are_not_expected_to_fail(test: str) -> None:
    assert limit_of("test_conformance_faults", test, "") is None


CONFTEST = """
from pathlib import Path
from conformance import conftest, limits
from conformance.conftest import *
from conformance.conftest import _known_to_fail
from vfio_user.server.engines.libvfio_user_abi import Abi
from vfio_user.server.engines.libvfio_user_library import Library

NAMES = ("fails", "passes", "finds_no_server", "leaves_a_leak", "may_leak", "begins_badly", "ends_badly")
ROWS = [limits.Fails(f"test_that_{name}", spoils=name == "may_leak") for name in NAMES]
limits.EXPECTED = {"framing": (*ROWS, limits.Fails("test_that_has_other_cases", ("gone",)))}
limits.library = lambda: Library(Path("none"), Abi.V1, {})
"""
MODULE = """
import pytest
from conformance.conftest import engine
from conformance.holdings import Spoiled

@pytest.fixture
async def leak(engine):
    yield
    if engine.apart:
        raise Spoiled("leaked")

@pytest.fixture
def bad_start(engine):
    assert not engine.apart

@pytest.fixture
def bad_end(engine):
    yield
    assert not engine.apart

def test_that_fails(engine):
    assert not engine.apart

def test_that_passes(engine):
    pass

def test_that_finds_no_server(engine):
    if engine.apart:
        raise Spoiled("it cannot start")

async def test_that_leaves_a_leak(engine, leak):
    pass

async def test_that_may_leak(engine, leak):
    pass

def test_that_begins_badly(engine, bad_start):
    assert not engine.apart

def test_that_ends_badly(engine, bad_end):
    assert not engine.apart

def test_that_has_other_cases(engine):
    assert not engine.apart
"""
OUTCOMES = {
    "fails": "XFAIL",
    "passes": "FAILED",
    "finds_no_server": "FAILED",
    "leaves_a_leak": "FAILED",
    "may_leak": "XFAIL",
    "begins_badly": "ERROR",
    "ends_badly": "XFAIL ERROR",
    "has_other_cases": "ERROR",
}
"""Of the library; all others pass. What is no limit is a failure, in whatever phase it shows."""


def test_only_what_fails_in_a_test_itself_is_a_limit(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    (tmp_path / "test_known.py").write_text(MODULE)
    words = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = re.findall(r"^(\w+) test_known.py::test_that_(\w+)\[libvfio-user\]", done.stdout, re.MULTILINE)
    found = {name: " ".join(what for what, other in lines if other == name) for name in OUTCOMES}
    assert found == OUTCOMES, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == len(OUTCOMES)
    assert "cases that test_that_has_other_cases does not have: ['gone']" in done.stdout
