# SPDX-License-Identifier: BSD-3-Clause
"""libvfio-user's own Python tests pass on the very library that our engine loads: its build is sound."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.limits import library
from vfio_user.client.qemu.lab import Lab
from vfio_user.server.engines.libvfio_user_library import VARIABLE, Library

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


def test_they_pass(libvfio_lab: Lab, tmp_path: Path) -> None:
    found = library()
    assert isinstance(found, Library), found
    if os.environ.get(VARIABLE):
        pytest.skip("the tests belong to the lab's library")
    assert found.path == libvfio_lab.libvfio_library.resolve()
    tests = libvfio_lab.libvfio_source / "test" / "py"
    quietly = ["-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:trio", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, *quietly, "--rootdir", str(tests), f"--basetemp={tmp_path / 'run'}", str(tests)],
        env=os.environ | {"LIBVFIO_SO_DIR": str(found.path.parent)},
        cwd=tests,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 196, "as many as the revision of 2022 has that Debian builds QEMU with"
