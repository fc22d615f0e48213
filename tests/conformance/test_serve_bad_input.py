# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user serve` with what cannot be used: one line that says what and what to do, exit status 2."""

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from conformance.holdings import holdings
from conformance.limits import require_library
from vfio_user.cli.engines import ENGINES
from vfio_user.cli.main import main
from vfio_user.server.engines.libvfio_user_library import VARIABLE
from vfio_user.transport.listener import SUN_PATH_SIZE, Listener

Refused = Callable[..., str]


@pytest.fixture
def refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Refused]:
    """Runs `vfio-user serve ARGUMENTS` in this process, and gives the one line of its complaint.

    No descriptor stays open, and no file is made.
    """
    monkeypatch.chdir(tmp_path)
    before_files = {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)

    def run(*arguments: str | Path) -> str:
        before_files.update(_tree(tmp_path))
        before = holdings(os.getpid())
        with pytest.raises(SystemExit) as end:
            main(["serve", *map(str, arguments)], prog_name="vfio-user")
        assert end.value.code == 2
        assert holdings(os.getpid()) == before
        assert _tree(tmp_path) == before_files
        output = capfd.readouterr()
        assert output.out == ""
        assert output.err.startswith("vfio-user: ")
        assert output.err.count("\n") == 1, output.err
        assert "Traceback" not in output.err
        return output.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def _tree(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_ino for path in folder.rglob("*")}


# Options

OPTIONS = {
    "no model": ([], "MODEL"),
    "unknown model": (["nope"], "there are e1000, faulty, scratch"),
    "model module": (["no.such.module:Class"], "no.such.module"),
    "model class": (["vfio_user.device_models.scratch:Nope"], "no class Nope"),
    "model no device": (["vfio_user.device_models.scratch:Register"], "not a subclass"),
    "unknown option": (["scratch", "--nope"], "--nope"),
    "option without value": (["scratch", "--engine"], "--engine"),
    "no number": (["scratch", "--spin", "soon"], "soon"),
    "number out of range": (["scratch", "--max-dma-maps", "0"], "1<=x<=65535"),
    "engine": (["scratch", "--engine", "steam"], "steam"),
    "two models": (["scratch", "faulty"], "faulty"),
    "unknown setting": (["scratch", "--set", "colour=red"], "its options are memory"),
    "setting without value": (["faulty", "--set", "fail"], "NAME=VALUE"),
    "setting out of range": (["faulty", "--set", "fail=nicely"], "constructor"),
    "backend": (["e1000", "--net", "carrier-pigeon"], "there are: echo"),
    "backend option": (["e1000", "--net", "echo,speed=9"], "speed"),
    "backend of a device without network": (["scratch", "--net", "none"], "no network device"),
    "backend not there": (["e1000", "--net", "stream:{tmp}/passt.sock"], "passt.sock"),
    "capture folder": (["e1000", "--net", "echo,pcap={tmp}/none/file.pcap"], "file.pcap"),
    "fails when made": (["faulty", "--set", "fail=constructor"], "constructor fails on demand"),
    "fails when reset": (["faulty", "--set", "fail=reset"], "reset fails on demand"),
}


@pytest.mark.parametrize(("arguments", "text"), OPTIONS.values(), ids=OPTIONS.keys())
def test_an_option_that_cannot_be_used(
    refused: Refused, arguments: list[str], text: str, tmp_path: Path
) -> None:
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert text in refused(*given, "--socket-path", tmp_path / "nic.sock")


def test_neither_path_nor_descriptor(refused: Refused) -> None:
    assert "--socket-path PATH or --fd N" in refused("scratch")


def test_both_path_and_descriptor(refused: Refused, tmp_path: Path) -> None:
    assert "--socket-path PATH or --fd N" in refused("scratch", "--socket-path", tmp_path / "x", "--fd", "0")


@pytest.mark.parametrize("arguments", [["nope"], ["--nope"], ["list", "--nope"], ["serve"]])
def test_other_command_lines_that_cannot_be(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments, prog_name="vfio-user")
    assert end.value.code == 2
    complaint = capfd.readouterr().err
    assert complaint.startswith("vfio-user: ")
    assert complaint.count("\n") == 1
    assert "--help" in complaint


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["serve", "--help"], ["list"]])
def test_what_is_asked_for_is_told_with_status_0(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments, prog_name="vfio-user")
    assert not end.value.code
    assert "vfio-user" in capfd.readouterr().out or arguments == ["list"]


# The engine


def test_a_library_that_is_none(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("scratch", "--engine", "libvfio-user", "--socket-path", tmp_path / "nic.sock")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.so"))
    assert "make lab" in refused(*arguments)
    monkeypatch.setenv(VARIABLE, "libc.so.6")
    assert "libc.so.6 is no libvfio-user" in refused(*arguments)


def test_no_library_at_all(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("VFIO_USER_LAB", str(tmp_path))
    monkeypatch.setattr("vfio_user.server.engines.libvfio_user_library.SONAME", "libvfio-user-none.so.0")
    complaint = refused("scratch", "--engine", "libvfio-user", "--socket-path", tmp_path / "nic.sock")
    assert f"build it with `make lab` or `vfio-user lab`, or name one with {VARIABLE}=PATH" in complaint


def test_a_descriptor_that_the_engine_does_not_take(refused: Refused) -> None:
    require_library()
    assert "give --socket-path" in refused("scratch", "--engine", "libvfio-user", "--fd", "0")


@pytest.mark.parametrize("name", ["x" * SUN_PATH_SIZE, "none/nic.sock", "file", "file/nic.sock"])
def test_a_path_that_the_engines_library_cannot_have(refused: Refused, tmp_path: Path, name: str) -> None:
    require_library()
    (tmp_path / "file").touch()
    complaint = refused("scratch", "--engine", "libvfio-user", "--socket-path", tmp_path / name)
    assert "choose" in complaint or "make its folder" in complaint


# The path


def test_the_devices_path_for_controllers(refused: Refused) -> None:
    said = refused("scratch", "--socket-path", "nic.sock", "--control", Path.cwd() / "nic.sock")
    assert "the device's own socket; give it another path" in said


def test_the_log_of_a_process_that_has_one_is_left_alone(refused: Refused, tmp_path: Path) -> None:
    """As pytest's: who comes next would miss what is beyond the limit of ours."""
    before = [list(handler.filters) for handler in logging.getLogger().handlers]
    refused("scratch", "--socket-path", tmp_path / "not there" / "s")
    assert [handler.filters for handler in logging.getLogger().handlers] == before != []


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is meant to be read: not in one line."""
    with pytest.raises(SystemExit) as end:
        main([], prog_name="vfio-user")
    assert end.value.code == 2
    assert "\n  serve " in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_a_path_that_is_served(refused: Refused, tmp_path: Path, engine: str) -> None:
    if engine == "libvfio-user":
        require_library()
    with closing(Listener.bind(tmp_path / "nic.sock")):
        arguments = ("scratch", "--engine", engine, "--socket-path", tmp_path / "nic.sock")
        assert "another process" in refused(*arguments)


def test_a_path_that_is_served_by_somebody_too_busy_to_answer(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(os.fspath(path))
        server.listen(0)
        first.connect(os.fspath(path))
        assert "another process" in refused("scratch", "--socket-path", path)


def test_a_path_that_is_no_socket(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "folder", "link"):
        assert "not a socket" in refused("scratch", "--socket-path", tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_path_of_another_kind_of_socket(refused: Refused, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(os.fspath(tmp_path / "log"))
        assert "choose another path" in refused("scratch", "--socket-path", tmp_path / "log")


def test_a_path_that_is_too_long(refused: Refused, tmp_path: Path) -> None:
    name = "x" * (SUN_PATH_SIZE - len(os.fsencode(tmp_path)))
    assert "shorter" in refused("scratch", "--socket-path", tmp_path / name)


def test_a_path_in_a_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "make its folder" in refused("scratch", "--socket-path", tmp_path / "none" / "nic.sock")
    assert "folder" in refused("scratch", "--socket-path", tmp_path / "file" / "nic.sock")


def test_an_empty_path(refused: Refused) -> None:
    assert "'--socket-path': it is empty: give the path" in refused("scratch", "--socket-path", "")


@pytest.mark.parametrize("stale", [False, True], ids=["new", "stale"])
def test_a_path_without_permission(tmp_path: Path, stale: bool) -> None:
    """As nobody, where the tests run as root."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    path = folder / "nic.sock"
    if stale:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.fspath(path))
        path.chmod(0o777)
    folder.chmod(0o555)
    for parent in folder.parents:
        if parent.is_relative_to("/tmp") and parent != Path("/tmp") and parent.owner() == folder.owner():
            parent.chmod(0o755)
    program = (
        "from vfio_user.cli.main import main; import os, sys\n"
        "import vfio_user.cli.serve, vfio_user.device_models.scratch\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "main(sys.argv[1:], prog_name='vfio-user')"
    )
    arguments = [sys.executable, "-c", program, "serve", "scratch", "--socket-path", str(path)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Permission denied: choose a folder that you may write to" in result.stderr
    assert path.exists() == stale


IMPORTS = """import os, sys
import vfio_user.cli.serve, vfio_user.server.net.factory, vfio_user.device_models.e1000.device
from vfio_user.cli.main import main
from vfio_user.server.net.tap import open_tap
"""
NOBODY = "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
MAIN = "main(sys.argv[1:], prog_name='vfio-user')"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and TAP devices")


def complaint_in_namespace(program: str, *arguments: str | Path) -> str:
    """What `program` says when it serves an e1000 in a network namespace of its own: one line, status 2, and
    at the end the namespace has no interface but `lo`."""
    script = '"$@"; echo "status $?"; cut -s -d: -f1 /proc/net/dev'
    command = [sys.executable, "-c", IMPORTS + program, "serve", "e1000", *map(str, arguments)]
    result = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert result.stdout.split() == ["status", "2", "lo"], result.stderr
    assert result.stderr.startswith("vfio-user: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("net", ["tap:t0", "tap:t0,pcap=/nowhere/file", "tap:t0,colour=red"])
def test_a_tap_that_was_made_goes_again(net: str, tmp_path: Path) -> None:
    complaint_in_namespace(MAIN, "--net", net, "--socket-path", tmp_path / "none" / "nic.sock")


@pytest.mark.root
@needs_root
@pytest.mark.parametrize(
    ("before", "text"),
    [
        ("held = open_tap('t0')\n", "tap:t0: another program is using it; stop that, or choose another name"),
        (NOBODY, "tap:t0: no permission to "),
    ],
    ids=["in use", "without privileges"],
)
def test_a_tap_that_cannot_be_had(before: str, text: str, tmp_path: Path) -> None:
    told = complaint_in_namespace(before + MAIN, "--net", "tap:t0", "--socket-path", tmp_path / "nic.sock")
    assert text in told
    assert "choose another name" in told or "run as root" in told
    assert not (tmp_path / "nic.sock").exists()


# The descriptor


def test_a_descriptor_that_is_closed(refused: Refused) -> None:
    assert "not a socket" in refused("scratch", "--fd", "987")


def test_a_descriptor_that_is_no_socket(refused: Refused, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert "not a socket" in refused("scratch", "--fd", str(file.fileno()))
        file.write("it is still open")


@pytest.mark.parametrize(
    ("family", "kind"),
    [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)],
    ids=["TCP", "datagrams"],
)
def test_a_descriptor_of_another_kind_of_socket(
    refused: Refused, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    with socket.socket(family, kind) as sock:
        assert "UNIX stream socket" in refused("scratch", "--fd", str(sock.fileno()))
        assert sock.getsockname() is not None, "it is still open"


def test_a_descriptor_that_neither_listens_nor_is_connected(refused: Refused) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert "neither listens nor is connected" in refused("scratch", "--fd", str(sock.fileno()))
        assert sock.getsockname() == ""


def test_a_negative_descriptor(refused: Refused) -> None:
    assert "-1" in refused("scratch", "--fd", "-1")
