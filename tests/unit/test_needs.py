# SPDX-License-Identifier: BSD-3-Clause
"""What is missing on the machine fails in CI, and is told in words that help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import needs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_compiler_nothing_is_skipped_in_ci(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(outcome, match="no gcc: make lab, or apt-get install gcc libc6-dev"):
        needs.compile_stub(tmp_path / "stub.so")


def test_nobody_skips_but_by_the_same_function() -> None:
    """`pytest.skip` elsewhere: for a library that is chosen by hand, which CI does not do."""
    found = {path.name for path in (ROOT / "tests").rglob("*.py") if "pytest.skip(" in path.read_text()}
    assert found - {Path(__file__).name} == {
        "needs.py",
        "test_libvfio_client.py",
        "test_libvfio_own_tests.py",
    }


@pytest.mark.parametrize(
    ("said", "compiler", "text"),
    [
        ("v1 /a b/lib.so", True, "v1: /a b/lib.so; v2: no library, a stand-in (tests/unit/libvfio/stub.c)"),
        ("v2 /l.so", True, "v1: not run; v2: /l.so, and a stand-in (tests/unit/libvfio/stub.c)"),
        ("there is none", False, "v1: not found (there is none); v2: no library, no stand-in without gcc"),
    ],
)
def test_the_report_names_library_and_editions(said: str, compiler: bool, text: str) -> None:
    assert needs.describe(said, compiler=compiler) == text


SKIPPED = """
import pytest

@pytest.mark.skipif(True, reason="there is no such thing")
def test_skipped():
    pass

@pytest.mark.xfail(reason="known")
def test_known():
    assert False
"""


@pytest.mark.parametrize(("ci", "outcomes"), [("true", "1 xfailed, 1 error"), ("", "1 skipped, 1 xfailed")])
def test_what_is_skipped_by_a_mark_fails_in_ci_too(tmp_path: Path, ci: str, outcomes: str) -> None:
    test = tmp_path / "test_skipped.py"
    test.write_text(SKIPPED)
    (tmp_path / "conftest.py").symlink_to(ROOT / "tests" / "conftest.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcomes in done.stdout
    assert ("nothing may be skipped: Skipped: there is no such thing" in done.stdout) == bool(ci)


def test_the_header_of_a_run_says_which_library_and_which_editions(tmp_path: Path) -> None:
    stub = needs.compile_stub(tmp_path / "stub.so")
    for chosen, text in ((stub, f"v1: not run; v2: {stub}, and"), (tmp_path / "no", "v1: not found (")):
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", __file__]
        environment = os.environ | {"VFIO_USER_LIBVFIO_USER": str(chosen)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert f"\nlibvfio-user: {text}" in done.stdout
