# SPDX-License-Identifier: BSD-3-Clause
"""The tutorial as something that can be run: its fenced blocks, in order, with what they are.

A block's kind stands behind its language: `file=NAME` (write it), `append=NAME`, a diff with `file=NAME`
(lines with `+` come, with `-` go; `@@` separates hunks), `run`, `fails`, `serve`, `qemu`, `guest` (shell
commands), `output` (lines that the command before it prints).
"""

import os
import re
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from needs import describe_libraries, in_ci

# On a machine that is busy an example may take any time; what hangs is ended by pytest's timeout.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(\w+) ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Step = tuple[str, str, str]
"""Language, kind, text."""


def _steps() -> list[Step]:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    return [(found[1], found[2], found[3]) for found in _BLOCK.finditer(text)]


def _patched(text: str, diff: str) -> str:
    """`text` after a diff whose hunks have no line numbers; each must fit exactly one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if text.count(old) != 1:
            raise ValueError(f"this hunk fits {text.count(old)} places:\n{hunk}")
        text = text.replace(old, new)
    return text


def _write(folder: Path, step: Step) -> None:
    language, kind, text = step
    verb, _, name = kind.partition("=")
    path = folder / name
    if verb == "append":
        text = path.read_text() + text
    elif language == "diff":
        text = _patched(path.read_text(), text)
    path.write_text(text)


def pytest_report_header() -> str:
    return f"libvfio-user: {describe_libraries()}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skips itself, by whatever way, fails in CI."""
    report = yield
    if report.skipped and in_ci() and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"with CI=true nothing may be skipped: {reason}"
    return report


@pytest.fixture(scope="session")
def tutorial() -> list[Step]:
    """The blocks of docs/tutorial.md that are files or commands."""
    return _steps()


@pytest.fixture(scope="session")
def write_step() -> Callable[[Path, Step], None]:
    """Does in a folder what a block with a file says."""
    return _write


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is for the soak alone is left out of other runs, not skipped: nothing is missing there."""
    if os.environ.get("VFIO_USER_SOAK"):
        return
    left_out = [item for item in items if item.get_closest_marker("soak")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
