# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user serve` as a process: what it prints and when, signals, inherited sockets, what it leaves."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from conformance import wire
from conformance.driving import PAGE
from conformance.holdings import expect_holdings, holdings
from conformance.limits import require_library
from conformance.raw import connect
from vfio_user.cli.engines import ENGINES

PROGRAM = "from vfio_user.cli.main import main; main(prog_name='vfio-user')"
TESTS = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def serving(*arguments: str | Path, pass_fds: Sequence[int] = ()) -> Iterator["subprocess.Popen[str]"]:
    """`vfio-user serve ARGUMENTS`, once it has said that it listens; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    with process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("listening on "), line + process.communicate(timeout=10)[1]
            yield process
        finally:
            process.kill()


def exit_of(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit status and all of standard error."""
    _, complaint = process.communicate(timeout=20)
    return process.returncode, complaint


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "libvfio-user":
        require_library()
    return name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_status_0_and_removes_the_socket(
    tmp_path: Path, number: signal.Signals, engine: str
) -> None:
    path = tmp_path / "nic.sock"
    with serving("scratch", "--socket-path", path, "--engine", engine) as process:
        async with connect(path) as raw:  # it can be connected to as soon as it has said so
            await raw.expect_alive()
            process.send_signal(number)
            assert exit_of(process) == (0, "")
            await raw.expect_closed()
    assert not path.exists()


async def opened(process: "subprocess.Popen[str]", alone: Counter[str]) -> None:
    """It has taken a client, and sleeps."""
    with trio.fail_after(20):
        while holdings(process.pid) == alone or _state(process.pid) != "S":  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.005)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


async def test_a_client_that_says_nothing_does_not_keep_it_from_ending(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "nic.sock"
    with serving("scratch", "--socket-path", path, "--engine", engine) as process:
        alone = holdings(process.pid)
        async with connect(path, negotiated=False) as raw:
            await opened(process, alone)
            process.terminate()
            status, complaint = exit_of(process)
            await raw.expect_closed()
    assert (status, complaint[len(TIME) :]) == (0, REFUSED[engine])
    assert not path.exists()


TIME = "2026-11-30 12:00:00,000"
REFUSED = {
    "native": "",
    "libvfio-user": " WARNING vfio_user.server.engines.libvfio_user: a client has been refused: "
    "vfu_attach_ctx: Interrupted system call\n",
}
"""What is said of a client that had said nothing when a signal came: the library gives it up."""


async def test_a_client_that_says_nothing_while_counters_are_asked_for(tmp_path: Path, engine: str) -> None:
    """It is not given up without a word, and the next one is served."""
    path = tmp_path / "nic.sock"
    with serving("scratch", "--stats", "--socket-path", path, "--engine", engine) as process:
        alone = holdings(process.pid)
        async with connect(path, negotiated=False) as raw:
            await opened(process, alone)
            process.send_signal(signal.SIGUSR1)
            assert process.stdout is not None
            assert await trio.to_thread.run_sync(process.stdout.readline) == "# counters: SIGUSR1\n"
            if REFUSED[engine]:
                await raw.expect_closed()
            else:
                await raw.negotiate()
        async with connect(path) as raw:
            await raw.expect_alive()
        process.terminate()
        status, complaint = exit_of(process)
    assert (status, complaint[len(TIME) :]) == (0, REFUSED[engine])


async def test_a_stale_socket_is_replaced(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "nic.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(path))
    with serving("scratch", "--socket-path", path, "--engine", engine) as process:
        async with connect(path) as raw:
            await raw.expect_alive()
        process.terminate()
        assert exit_of(process) == (0, "")
    assert not path.exists()


def test_a_socket_that_somebody_else_has_put_there_stays(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "nic.sock"
    with serving("scratch", "--socket-path", path, "--engine", engine) as process:
        path.rename(tmp_path / "moved")
        path.touch()
        process.terminate()
        assert exit_of(process) == (0, "")
    assert path.exists()


def test_a_signal_before_it_listens_leaves_nothing_behind(tmp_path: Path) -> None:
    """The model sends it from its constructor."""
    path = tmp_path / "nic.sock"
    for name in ("SIGTERM", "SIGINT"):
        arguments = ["serve", f"conformance.models:Ends{name}", "--socket-path", str(path)]
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert not path.exists()


def test_a_signal_while_a_socket_gets_its_name_leaves_nothing_behind(tmp_path: Path, engine: str) -> None:
    """Of the device or of the controllers: it has no owner yet that would remove it."""
    program = (
        "import os, signal, sys\n"
        "link, left = os.link, [int(sys.argv.pop(1))]\n"
        "def signalled(*words, **options):\n"
        "    link(*words, **options)\n"
        "    left[0] -= 1\n"
        "    if not left[0]:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        f"os.link = signalled\n{PROGRAM}"
    )
    for number in ("1", "2"):
        words = ["serve", "scratch", "--engine", engine, "--socket-path", "nic.sock", "--control", "control"]
        result = subprocess.run(
            [sys.executable, "-c", program, number, *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            cwd=tmp_path,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert list(tmp_path.iterdir()) == []


async def test_a_listening_socket_may_be_inherited(tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        number = listener.fileno()
        with serving("scratch", "--fd", str(number), pass_fds=[number]) as process:
            for _ in range(2):
                async with connect(path) as raw:
                    await raw.expect_alive()
            process.terminate()
            assert exit_of(process) == (0, "")
    assert path.exists(), "the file is its maker's"


def test_a_connected_socket_may_be_inherited() -> None:
    """It ends, with status 0, when that client leaves."""
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    with ours, theirs, serving("scratch", "--fd", str(number), pass_fds=[number]) as process:
        theirs.close()
        ours.settimeout(10)
        ours.sendall(wire.message(wire.VERSION, wire.version({})))
        assert wire.HEADER.unpack(ours.recv(16))[1:4:2] == (wire.VERSION, wire.REPLY)
        ours.close()
        assert exit_of(process) == (0, "")


async def test_a_client_that_is_killed_is_forgotten(tmp_path: Path, engine: str) -> None:
    """Its memory, its eventfds and its socket go; the next one is welcome."""
    path = tmp_path / "nic.sock"
    client = (
        "import os, signal, trio\n"
        "from vfio_user.client.fake_vmm import open_vmm\n"
        "async def run():\n"
        f"    async with open_vmm({str(path)!r}) as vmm:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "trio.run(run)\n"
    )
    with serving("scratch", "--socket-path", path, "--engine", engine) as process:
        before = holdings(process.pid)
        for _ in range(2):
            killed = await trio.run_process([sys.executable, "-c", client], check=False)
            assert killed.returncode == -signal.SIGKILL
            await expect_holdings(process.pid, before)
        async with connect(path) as raw:
            await raw.expect_alive()
        process.terminate()
        assert exit_of(process) == (0, "")


async def test_a_truncated_file_does_not_kill_it(tmp_path: Path) -> None:
    """SIGBUS would: here in a process of its own."""
    path = tmp_path / "nic.sock"
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4 * PAGE)
        with serving("scratch", "--socket-path", path) as process:
            async with connect(path) as raw:
                assert (await raw.call(wire.DMA_MAP, wire.dma_map(0, 4 * PAGE), fds=[fd])).ok == b""
                os.ftruncate(fd, 0)
                body = wire.region_write(wire.CONFIG, wire.COMMAND_REGISTER, wire.BUS_MASTER)
                assert (await raw.call(wire.REGION_WRITE, body)).ok
                await raw.call(wire.REGION_WRITE, wire.region_write(0, 0xFF0, b"\x08"))
                await raw.call(wire.REGION_WRITE, wire.region_write(0, 0xFF8, bytes(4)))
                status = (await raw.call(wire.REGION_READ, wire.region_read(0, 0xFFC, 4))).ok[16]
                assert status == 4, "failed"
            process.terminate()
            assert exit_of(process) == (0, "")
    finally:
        os.close(fd)


def test_counters_that_fail_do_not_spoil_the_end(tmp_path: Path) -> None:
    with serving("faulty", "--set", "fail=counters", "--stats", "--socket-path", tmp_path / "s") as process:
        process.terminate()
        status, complaint = exit_of(process)
    assert status == 0
    assert "counters fails on demand" in complaint


async def test_a_client_that_reconnects_with_nonsense_does_not_fill_the_log(tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    with serving("scratch", "--socket-path", path) as process:
        for _ in range(200):
            async with connect(path, negotiated=False) as raw:
                await raw.send(b"\xff" * 16)
                await raw.expect_closed()
        process.terminate()
        status, log = exit_of(process)
    assert status == 0
    assert 40 <= len(log.splitlines()) <= 60


async def test_dma_regions_leave_open_files_for_others(tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving("scratch", "--socket-path", path) as process:
        _, most = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        async with connect(path, negotiated=False) as raw:
            answer = await raw.negotiate(
                {"max_dma_maps": 65535, "max_data_xfer_size": 1 << 20, "pgsizes": 4096}
            )
            allowed = json.loads(answer.ok[4:-1])["capabilities"].get("max_dma_maps", 65535)
    assert allowed == min(65535, most - min(4096, most // 2))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
