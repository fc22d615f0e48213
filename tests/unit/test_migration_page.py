# SPDX-License-Identifier: BSD-3-Clause
"""The tests that docs/migration.md shows, run in a folder of their own as a reader does."""

import re
import tempfile
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
_BLOCK = re.compile(r"^```python file=(\w+)\.py\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("without", [(), ("-p", "no:trio")], ids=["with pytest-trio", "without"])
def test_the_tests_of_the_page_pass(pytester: pytest.Pytester, without: tuple[str, ...]) -> None:
    """With nothing set, as in a project that has never heard of trio."""
    files = dict(_BLOCK.findall(PAGE.read_text()))
    assert files.keys() == {"test_client", "test_scratch", "test_by_hand"}
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(**files)
    # A short path: the tests have UNIX sockets in theirs, and those end at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="page-", dir="/tmp") as short:
        words = ("-q", "-p", "no:cacheprovider", *without, f"--basetemp={short}/base")
        pytester.runpytest_subprocess(*words).assert_outcomes(passed=4)


def test_the_page_has_the_number_of_moves_of_the_plugin() -> None:
    from vfio_user.testing.pytest_plugin import MOVES

    assert f"how many ({MOVES})" in PAGE.read_text()


def test_every_block_of_python_is_run() -> None:
    text = PAGE.read_text()
    assert text.count("```python") == len(_BLOCK.findall(text))
