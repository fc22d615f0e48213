# SPDX-License-Identifier: BSD-3-Clause
"""The specification's "Backend Program Conventions", as a management layer would rely on them."""

import json
import os
import socket
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfio_user.device_models.catalog import MODELS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cli" / "backends").glob("*.json"))
PROGRAM = Path(sys.executable).parent / "vfio-user"


def words(file: Path) -> list[str]:
    """The command that a backend's file describes, with the program of this environment."""
    described = json.loads(file.read_text())
    assert Path(described["binary"]).name == PROGRAM.name
    return [str(PROGRAM), *described["arguments"]]


@contextmanager
def served(command: list[str], pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, pass_fds=pass_fds, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline().startswith("listening on ")
            yield child
        finally:
            child.kill()


def ends_well(child: subprocess.Popen[str]) -> None:
    child.terminate()
    assert child.communicate(timeout=10) == ("", "")
    assert child.returncode == 0


def connect(path: Path) -> tuple[socket.socket, int]:
    """A client of the server at `path`, and the process that answered."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(os.fspath(path))
    pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return client, pid


def test_the_files_are_installed_and_name_models_that_exist() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    (pattern,) = settings["share/vfio-user"]
    assert sorted(ROOT.glob(pattern)) == FILES != []
    for file in FILES:
        described = json.loads(file.read_text())
        verb, model = described["arguments"]
        assert (verb, model in MODELS) == ("serve", True)
        assert file.name == f"50-vfio-user-{model}.json"
        assert described.keys() == {"description", "type", "binary", "arguments", "tags"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_serves_in_the_foreground_and_honours_sigterm(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with served([*words(file), f"--socket-path={path}"]) as child:
        client, pid = connect(path)
        client.close()
        assert pid == child.pid
        ends_well(child)
    assert not path.exists()


def test_it_takes_a_listening_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(path))
        listening.listen()
        fd = listening.fileno()
        with served([*words(FILES[0]), f"--fd={fd}"], (fd,)) as child:
            connect(path)[0].close()
            ends_well(child)
    assert path.exists()  # it was not the server's


def test_a_connected_descriptor_is_served_until_its_client_leaves() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, served([*words(FILES[0]), f"--fd={theirs.fileno()}"], (theirs.fileno(),)) as child:
        ours.close()
        theirs.close()
        assert child.communicate(timeout=10) == ("", "")
        assert child.returncode == 0


@pytest.mark.parametrize("extra", [[], ["--fd=0", "--socket-path=/nowhere/s"]], ids=["neither", "both"])
def test_exactly_one_of_path_and_descriptor(extra: list[str]) -> None:
    done = subprocess.run([*words(FILES[0]), *extra], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert done.stderr == "vfio-user: give either --socket-path PATH or --fd N\n"
