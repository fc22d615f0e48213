# SPDX-License-Identifier: BSD-3-Clause
"""What tests need of the machine. With CI=true nothing is skipped: what is missing fails the test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

COMPILER = "gcc"
"""As for what `make lab` builds: it installs one on Debian."""
STUB = Path(__file__).parent / "unit" / "libvfio" / "stub.c"
"""A stand-in for a library of v2."""
_IDENTIFY = """
from conformance.limits import library
found = library()
print(found if isinstance(found, str) else f"{found.abi.name[:2].lower()} {found.path}")
"""


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


def missing(reason: str) -> NoReturn:
    """Fails the test in CI and skips it elsewhere; the reason says how to get it."""
    if in_ci():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def compile_c(source: Path, target: Path, *flags: str) -> Path:
    """`target`, made of a file in C; CalledProcessError when it does not compile."""
    if shutil.which(COMPILER) is None:
        missing(f"there is no {COMPILER}: make lab, or apt-get install gcc libc6-dev")
    subprocess.run([COMPILER, "-Wall", "-Werror", *flags, "-o", target, source], check=True)
    return target


def compile_stub(target: Path, *flags: str) -> Path:
    """A stand-in for a library of v2."""
    return compile_c(STUB, target, "-O1", "-shared", "-fPIC", *flags)


def describe_libraries() -> str:
    """Which libvfio-user, of which edition, the tests use. Found in a process of its own: once loaded, a
    library would be found by its soname too."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    words = [sys.executable, "-c", _IDENTIFY]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]
    return describe(said, compiler=shutil.which(COMPILER) is not None)


def describe(said: str, *, compiler: bool) -> str:
    """Of v1 and of v2 what runs; `said` is edition and path of the library, or why there is none."""
    edition, _, path = said.partition(" ")
    stub = "a stand-in (tests/unit/libvfio/stub.c)" if compiler else f"no stand-in without {COMPILER}"
    if edition == "v1":
        return f"v1: {path}; v2: no library, {stub}"
    if edition == "v2":
        return f"v1: not run; v2: {path}, and {stub}"
    return f"v1: not found ({said}); v2: no library, {stub}"
