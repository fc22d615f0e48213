# SPDX-License-Identifier: BSD-3-Clause
"""What tests with a real QEMU stand on: the lab, a network namespace, guests.

With CI=true whatever is missing is a failure: the lab is built, and a part that cannot be built or a lack of
root fails the test. Elsewhere only the tests that need the missing thing are skipped, and the reason says
how to get it.
"""

import contextlib
import itertools
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NoReturn

import pytest

from vfio_user.client.qemu.command import MachineOptions
from vfio_user.client.qemu.lab import Lab, build_lab
from vfio_user.client.qemu.machine import Machine, open_machine
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
_NUMBERS = itertools.count()


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


def missing(reason: str) -> NoReturn:
    """Fails the test in CI and skips it elsewhere."""
    if _in_ci():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _root() -> Path:
    root = lab_root()
    if _in_ci():
        build_lab(root, print)
    return root


@pytest.fixture(scope="session")
def any_lab() -> Lab:
    """The lab as it is: each part is asked for by the fixture of its name."""
    return Lab(_root())


@pytest.fixture(scope="session")
def lab(any_lab: Lab) -> Lab:
    """The lab with a QEMU that runs and a guest."""
    try:
        assert any_lab.qemu.program.is_file()
        assert any_lab.kernel.is_file()
    except LabError as error:
        missing(str(error))
    return any_lab


@pytest.fixture(scope="session")
def libvfio_lab(any_lab: Lab) -> Lab:
    """The lab with libvfio-user and its samples; a QEMU may be missing."""
    try:
        assert any_lab.libvfio_library.is_file()
    except LabError as error:
        missing(str(error))
    return any_lab


@pytest.fixture
def netns() -> Iterator[str]:
    """The name of a network namespace of our own with `lo` up; deleted afterwards."""
    if os.geteuid() != 0:
        missing("network namespaces need root")
    name = f"vfio-user-{os.getpid()}-{next(_NUMBERS)}"
    _ip("netns", "add", name)
    try:
        _ip("-netns", name, "link", "set", "lo", "up")
        yield name
    finally:
        _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def guest_machine(lab: Lab) -> GuestMachine:
    """`async with guest_machine(options) as guest:` gives a booted guest, gone when the block is left."""

    @contextlib.asynccontextmanager
    async def start(options: MachineOptions) -> AsyncIterator[Machine]:
        async with open_machine(lab, options) as guest:
            await guest.wait_boot()
            yield guest

    return start
