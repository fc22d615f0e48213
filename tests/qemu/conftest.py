# SPDX-License-Identifier: BSD-3-Clause
"""What tests with a real QEMU stand on: the lab, a network namespace, guests.

With CI=true whatever is missing is a failure: the lab is built, and a part that cannot be built or a lack of
root fails the test. Elsewhere only the tests that need the missing thing are skipped, and the reason says
how to get it.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from guest_moves.guest_programs import compiled
from needs import in_ci, missing
from vfio_user.client.qemu.command import MachineOptions
from vfio_user.client.qemu.lab import Lab, build_lab, find_qemu
from vfio_user.client.qemu.machine import Machine, open_machine
from vfio_user.client.qemu.moving import Model
from vfio_user.client.qemu.namespace import Namespace, open_namespace
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError
from vfio_user.client.qemu.ssh_programs import SSH
from vfio_user.client.server_process import ServerProcess, serving

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]
_NUMBERS = itertools.count()
COMBINATIONS = (
    ("q35", True, "native"),
    ("q35", False, "native"),
    ("i440fx", True, "native"),
    ("i440fx", False, "native"),
    ("q35", True, "libvfio-user"),
)
"""Chipset, whether guest memory is mapped, engine."""


def pytest_report_header() -> str:
    """Which QEMU boots the guests."""
    search = find_qemu()
    return f"QEMU: {search.qemu or f'not found ({search.reason})'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("combinations"):
        metafunc.parametrize(("chipset", "mapped", "engine"), COMBINATIONS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests that have passed have noted: printed lines that begin with `note: `."""
    for report in terminalreporter.getreports("passed"):
        for line in report.capstdout.splitlines():
            if line.startswith("note: "):
                terminalreporter.write_line(f"{report.nodeid}: {line.removeprefix('note: ')}")


def _root() -> Path:
    root = lab_root()
    if in_ci():
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


@pytest.fixture(scope="session")
def ssh_lab(lab: Lab) -> Lab:
    """The lab with OpenSSH too."""
    try:
        lab.ssh(SSH)
    except LabError as error:
        missing(str(error))
    return lab


def _program(name: str, package: str) -> str:
    """Where a program is; missing without it."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return path or missing(f"{name} is missing: make lab, or apt-get install {package}")


@pytest.fixture
def lspci_program() -> str:
    return _program("lspci", "pciutils")


@pytest.fixture
def passt_program() -> str:
    return _program("passt", "passt")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace of our own with `lo` up; deleted afterwards."""
    if os.geteuid() != 0:
        missing("network namespaces need root")
    _program("ip", "iproute2")
    with open_namespace(f"vfio-user-{os.getpid()}-{next(_NUMBERS)}") as opened:
        yield opened


@pytest.fixture
def netns(namespace: Namespace) -> str:
    """The name of a network namespace of our own."""
    return namespace.name


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a short path (a UNIX socket's has at most 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="vfio-user-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def serve(socket_folder: Path) -> Serve:
    """`async with serve("e1000", "--net", "tap:t0", netns=..., name=...) as server:`

    When the block is left, the server must end at SIGTERM with exit status 0 and without its socket file,
    and must have had nothing to complain of.
    """

    @contextlib.asynccontextmanager
    async def start(
        model: str, *words: str, netns: str = "", name: str = "server"
    ) -> AsyncIterator[ServerProcess]:
        path = socket_folder / f"{name}.socket"
        async with serving(model, path, [*words, "--verbose"], netns=netns) as server:
            try:
                yield server
            except BaseException:
                print(f"{name} wrote:\n{server.log()[-4000:]}")
                raise
            await server.stop()
            assert server.trouble() == []

    return start


@pytest.fixture
def guest_machine(lab: Lab) -> GuestMachine:
    """`async with guest_machine(options) as guest:` gives a booted guest, gone when the block is left."""

    @contextlib.asynccontextmanager
    async def start(options: MachineOptions) -> AsyncIterator[Machine]:
        async with open_machine(lab, options) as guest:
            await guest.wait_boot()
            yield guest

    return start


@pytest.fixture(scope="session")
def scribble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's program of tests/guest_moves/scribble.c."""
    return _guest_program("scribble", tmp_path_factory)


@pytest.fixture(scope="session")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's program of tests/guest_moves/hold.c."""
    return _guest_program("hold", tmp_path_factory)


def _guest_program(name: str, factory: pytest.TempPathFactory) -> Path:
    return compiled(name, factory.mktemp("programs"))


TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def scribbler() -> Model:
    """The device of tests/guest_moves/scribbler.py."""
    return Model(
        "guest_moves.scribbler:Scribbler", "scribbler", environment=os.environ | {"PYTHONPATH": TESTS}
    )
