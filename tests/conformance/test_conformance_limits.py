# SPDX-License-Identifier: BSD-3-Clause
"""The table of what the libvfio-user engine cannot do, and the tests that show it, belong together."""

import ast
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
