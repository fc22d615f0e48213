# SPDX-License-Identifier: BSD-3-Clause
"""libvfio-user's sample `client`, unmodified: its whole session against either engine, migration included.

The client moves the device itself. It starts the destination as `server`, from the folder that it was
started from, and after the fork it is the parent that becomes that server. So we put a script of that name
beside a copy of the client; and what tells that the client has ended is the end of its output, not the exit
status of the process that we have started.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from conformance.limits import edition_of_library
from vfio_user.client.qemu.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

MODELS = Path(__file__).resolve().parents[1] / "migration"
ATTEMPTS = 10
QUIETLY = ("chrt", "--batch", "0")
"""A thread of the client that is woken does not take the CPU from the one that woke it."""

# The client looks for the socket's file without a pause and connects at once: the file must not be there
# before somebody listens. The client's own output is not the server's to keep open.
SERVER = f"""#!{sys.executable}
import os, sys, time
path = sys.argv[-1]
log = os.open(path + ".log", os.O_CREAT | os.O_RDWR | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
os.chdir({str(MODELS)!r})
words = ["serve", "sample_server:SampleServer", "--stats", "-vv", "--engine", "ENGINE"]
words += ["--socket-path", path + ".new"]
if os.fork():
    os.execv(sys.executable, [sys.executable, "-c", "from vfio_user.cli.main import main; main()", *words])
while b"listening on" not in os.pread(log, 10000, 0):
    time.sleep(0.01)
os.rename(path + ".new", path)
"""


@contextlib.contextmanager
def started(words: Sequence[str | Path], output: int) -> Iterator[None]:
    """A program with all that it starts; its group is ended after, and killed if it does not end."""
    popen = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield
    finally:
        os.killpg(popen.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()


async def read_all(fd: int) -> str:
    """Until nobody has the other end any more."""
    data = b""
    async with trio.lowlevel.FdStream(fd) as stream:
        async for piece in stream:
            data += piece
    return data.decode()


async def run_client(folder: Path) -> str:
    """A session with two servers of ours: what the client wrote."""
    source = folder / "socket"
    with started([folder / "server", source], subprocess.DEVNULL):
        with trio.fail_after(60):
            while not source.exists():  # noqa: ASYNC110
                await trio.sleep(0.01)
        ours, theirs = os.pipe()
        with started([*QUIETLY, "stdbuf", "-oL", folder / "client", source], theirs):
            os.close(theirs)
            with trio.fail_after(120):
                return await read_all(ours)


def figures(log: Path) -> dict[str, str]:
    """The server's counters at its end."""
    lines = log.read_text().splitlines()
    begin = lines.index("# counters: the end") + 1
    return dict(line.split(" ", 1) for line in lines[begin : lines.index("", begin)])


@pytest.mark.parametrize("engine", ["native", "libvfio-user"])
async def test_its_client_completes_its_session(libvfio_lab: Lab, socket_folder: Path, engine: str) -> None:
    """It waits for an interrupt after a second, and for the one that it set 10 seconds before the move."""
    if engine == "libvfio-user" and edition_of_library() != "v1":
        pytest.skip("the lab's client speaks v1")
    for attempt in range(ATTEMPTS):
        folder = socket_folder / str(attempt)
        folder.mkdir()
        shutil.copy(libvfio_lab.sample("client"), folder / "client")
        (folder / "server").write_text(SERVER.replace("ENGINE", engine))
        (folder / "server").chmod(0o755)
        said = await run_client(folder)
        source = figures(folder / "socket.log")
        # Its thread writes BAR1 until it is stopped. It compares BAR1 with a checksum of *all* that it wrote,
        # which is right only if it came to write once; with libvfio-user's own server too.
        if "CRC mismatch" not in said or source["bar1_writes"] == "1":
            break
    print(said)
    # What it says as it gives up: err(3), assert(3), and its comparison of BAR1. One request is to fail.
    trouble = re.findall(r".*(?:failed|ssertion|mismatch|unsupported|expected|invalid|bad ).*", said)
    assert trouble == ["client: failed to read from region -559038737 0-0x3: Invalid argument"]
    assert said.count("client: INTx triggered!") == 2
    assert "client: migration region" in said
    assert said.count("client: writing migration device data 0x1000-") == 2
    # It has answered the device's DMA on both sides; then it unmaps all, and is done.
    destination = figures(folder / "socket_migrated.log")
    regions = int(source["regions"])
    # It has asked for the dirty pages of each; what it writes itself, by message, is not among them.
    asked = re.findall(r"get_dirty_bitmap: (0x[0-9a-f]+|0)-0x[0-9a-f]+\t(\S+)$", said, re.MULTILINE)
    assert [(int(address, 16), bits) for address, bits in asked] == [(n * 4096, "0") for n in range(regions)]
    assert int(destination["regions"]) == regions // 2
    left = regions // 2 if engine == "native" else 0  # the library unmaps all before it tells of the end
    assert (source["regions_left"], destination["regions_left"]) == (str(left), "0")
    # The region 0xdeadbeef, which it tries; the library refuses it without a line.
    tried = engine == "native"
    for log, count in (("socket.log", int(tried)), ("socket_migrated.log", 0)):
        assert (folder / log).read_text().count(" refused: ") == count
