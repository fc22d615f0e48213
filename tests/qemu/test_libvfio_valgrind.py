# SPDX-License-Identifier: BSD-3-Clause
"""The libvfio-user engine under valgrind: no access to memory that is not there, none freed twice, none lost.

The suppressions are in libvfio-user.supp, with a reason for each.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from conformance import moving, patience, wire
from conformance.dirtying import START, dirty_pages, dirty_v1, dirty_v2, logging_start
from conformance.driving import PAGE, enable_bus_master, finished, map_private, start_copy
from conformance.limits import edition_of_library
from conformance.moving import (
    V1_PRE_COPY,
    V1_RESUMING,
    V1_RUNNING,
    V1_SAVING,
    V1_STOP,
    S,
    iterate,
    read_stream,
    resume_v1,
    set_state,
    set_v1,
    write_stream,
)
from conformance.raw import RawClient, connect
from needs import missing
from vfio_user.client.memory import GuestRam, RamRange
from vfio_user.client.qemu.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SUPPRESSIONS = Path(__file__).parent / "libvfio-user.supp"
FOUND = 99
PROGRAM = "from vfio_user.cli.main import main; main()"
DONE = 2
SIZE = 16 * PAGE


@pytest.fixture
def valgrind() -> str:
    return shutil.which("valgrind") or missing("valgrind is missing: make lab, or apt-get install valgrind")


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def start(valgrind: str, path: Path, log: Path) -> subprocess.Popen[bytes]:
    """A server under valgrind; malloc is the C library's, so that it sees each piece of memory."""
    words = [
        valgrind,
        "--quiet",
        "--leak-check=full",
        "--show-leak-kinds=definite",
        "--errors-for-leak-kinds=definite",
        "--num-callers=40",
        f"--error-exitcode={FOUND}",
        f"--suppressions={SUPPRESSIONS}",
        sys.executable,
        *("-c", PROGRAM, "serve", "scratch", "--engine", "libvfio-user", "--socket-path", str(path)),
    ]
    with log.open("wb") as output:
        environment = os.environ | {"PYTHONMALLOC": "malloc"}
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)


async def test_nothing_is_found(
    libvfio_lab: Lab, valgrind: str, eventfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "seconds", 60.0)
    monkeypatch.setattr(moving, "exact_replies", False)
    path, log = tmp_path / "s", tmp_path / "log"
    popen = start(valgrind, path, log)
    try:
        with trio.fail_after(120):
            while b"listening on" not in log.read_bytes():  # nobody tells
                assert popen.poll() is None, log.read_text()
                await trio.sleep(0.1)
        with closing(GuestRam()) as ram:
            memory = ram.add(0, SIZE)
            for _ in range(3):
                async with connect(path) as raw:
                    await use(raw, ram, memory, eventfd)
        popen.send_signal(signal.SIGTERM)
        with trio.fail_after(60):
            await trio.to_thread.run_sync(popen.wait, abandon_on_cancel=True)
    finally:
        popen.kill()
        popen.wait()
    said = log.read_text()
    assert popen.returncode == 0, said
    assert said == f"listening on {path}\n"


async def use(raw: RawClient, ram: GuestRam, memory: RamRange, eventfd: int) -> None:
    """Everything that the library has callbacks and buffers for, and a few requests that it refuses."""
    for command, body in wire.VALID.items():
        if command != wire.WRITE_MULTI:
            assert (await raw.call(command, body)).ok is not None
    assert memory.fd is not None
    assert (await raw.call(wire.DMA_MAP, wire.dma_map(0, SIZE), fds=[memory.fd])).ok == b""
    await enable_bus_master(raw)
    body = wire.set_irqs(wire.INTX, wire.DATA_EVENTFD | wire.TRIGGER, 0, 1)
    assert (await raw.call(wire.SET_IRQS, body, fds=[eventfd])).ok == b""
    if edition_of_library() == "v1":
        assert (await dirty_pages(raw, START)).ok == b""
    else:
        assert (await logging_start(raw)).ok
    ram.write(100, b"hello" * 100)
    await start_copy(raw, 100, 2 * PAGE, 500)
    assert await finished(raw) == DONE
    assert ram.read(2 * PAGE, 500) == b"hello" * 100
    assert os.eventfd_read(eventfd)
    await (migrate_v1(raw) if edition_of_library() == "v1" else migrate_v2(raw))
    assert (await raw.call(wire.RESET)).ok == b""
    assert (await raw.call(wire.DMA_UNMAP, wire.dma_unmap(0, SIZE))).ok
    await map_private(raw, 0, PAGE)
    for command in (99, wire.REGION_READ, wire.DMA_MAP, wire.SET_IRQS):
        assert (await raw.call(command, b"\xff" * 40)).flags == wire.REPLY | wire.ERROR


async def migrate_v1(raw: RawClient) -> None:
    """Report what was written, save the device, and restore it into itself."""
    assert await dirty_v1(raw, 0, SIZE) == {2}
    await set_v1(raw, V1_PRE_COPY)
    parts = await iterate(raw)
    await set_v1(raw, V1_SAVING)
    parts += await iterate(raw)
    await set_v1(raw, V1_STOP, V1_RUNNING, V1_RESUMING)
    await resume_v1(raw, parts)
    await set_v1(raw, V1_RUNNING)


async def migrate_v2(raw: RawClient) -> None:
    """The same."""
    assert await dirty_v2(raw, 0, SIZE) == {2}
    assert (await set_state(raw, S.PRE_COPY)).ok
    data = await read_stream(raw)
    assert (await set_state(raw, S.STOP_COPY)).ok
    data += await read_stream(raw)
    assert (await set_state(raw, S.RUNNING, S.RESUMING)).ok
    await write_stream(raw, data)
    assert (await set_state(raw, S.RUNNING)).ok
