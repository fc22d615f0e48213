# SPDX-License-Identifier: BSD-3-Clause
"""The libvfio-user engine under valgrind: no access to memory that is not there, none freed twice, none lost,
and no decision by what was never written.

Each model is used twice. With malloc for every Python object valgrind sees the bounds of each, but then
CPython's looks at the first digit of an int that is 0, and has none, are uninitialised values all over it. So
those are minded with Python's own allocator, where only the objects of C are seen one by one.
Nothing is suppressed but what libvfio-user.supp has, with a reason.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
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
from conformance.raw import RawClient, connect, connect_next
from guest_moves.counts import SOAK
from needs import missing
from vfio_user.client.drivers.e1000 import open_e1000
from vfio_user.client.drivers.e1000_traffic import Traffic
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions, open_vmm
from vfio_user.client.memory import GuestRam, RamRange
from vfio_user.client.migration.choose import open_driver
from vfio_user.client.migration.pages import PageSet
from vfio_user.client.qemu.lab import Lab
from vfio_user.protocol.constants import MigrationState

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

SUPPRESSIONS = Path(__file__).parent / "libvfio-user.supp"
FOUND = 99
PROGRAM = "from vfio_user.cli.main import main; main()"
DONE = 2
SIZE = 16 * PAGE
PATIENCE = 60.0
MEMORY = ((0, 0x10000), (0x100000, 4 << 20))


@pytest.fixture
def valgrind() -> str:
    return shutil.which("valgrind") or missing("valgrind is missing: make lab, or apt-get install valgrind")


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


Checks = tuple[str, str]
CHECKS: Mapping[str, Checks] = {
    "bounds": ("malloc", "--undef-value-errors=no"),
    "uninitialised": ("pymalloc", "--undef-value-errors=yes"),
}
"""What is looked for: the allocator (PYTHONMALLOC), and valgrind's option."""


def start(valgrind: str, checks: Checks, model: str, path: Path, log: Path) -> subprocess.Popen[bytes]:
    """A server under valgrind."""
    allocator, option = checks
    words = [
        valgrind,
        "-v",
        f"--log-file={found_in(log)}",
        option,
        "--leak-check=full",
        "--show-leak-kinds=definite",
        "--errors-for-leak-kinds=definite",
        "--num-callers=40",
        f"--error-exitcode={FOUND}",
        f"--suppressions={SUPPRESSIONS}",
        sys.executable,
        *("-c", PROGRAM, "serve", model, "--engine", "libvfio-user", "--socket-path", str(path)),
    ]
    with log.open("wb") as output:
        environment = os.environ | {"PYTHONMALLOC": allocator}
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)


def found_in(log: Path) -> Path:
    """Where valgrind writes what it finds, and which suppressions it has used."""
    return log.with_suffix(".valgrind")


def used_suppressions(log: Path) -> set[str]:
    return set(re.findall(r"used_suppression: +\d+ (.+) \S+libvfio-user\.supp:", found_in(log).read_text()))


def known_suppressions() -> set[str]:
    return set(re.findall(r"^{\n +(.+)$", SUPPRESSIONS.read_text(), re.MULTILINE))


@contextlib.asynccontextmanager
async def nothing_found(valgrind: str, checks: Checks, model: str, folder: Path) -> AsyncIterator[Path]:
    """A server; once it was used, it ends at SIGTERM, and has said nothing, nor has valgrind."""
    path, log = folder / "s", folder / "log"
    popen = start(valgrind, checks, model, path, log)
    try:
        with trio.fail_after(300):
            while b"listening on" not in log.read_bytes():  # nobody tells
                assert popen.poll() is None, log.read_text()
                await trio.sleep(0.1)
        yield path
        popen.send_signal(signal.SIGTERM)
        with trio.fail_after(60):
            await trio.to_thread.run_sync(popen.wait, abandon_on_cancel=True)
    finally:
        popen.kill()
        popen.wait()
    said = log.read_text()
    assert popen.returncode == 0, said + found_in(log).read_text()
    assert said == f"listening on {path}\n"
    assert "ERROR SUMMARY: 0 errors from 0 contexts" in found_in(log).read_text()


@pytest.fixture(params=CHECKS)
def checks(request: pytest.FixtureRequest) -> Checks:
    return CHECKS[request.param]


async def test_nothing_is_found(
    libvfio_lab: Lab,
    valgrind: str,
    checks: Checks,
    eventfd: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "seconds", PATIENCE)
    monkeypatch.setattr(moving, "exact_replies", False)
    async with nothing_found(valgrind, checks, "scratch", tmp_path) as path:
        with closing(GuestRam()) as ram:
            memory = ram.add(0, SIZE)
            for _ in range(3):
                async with connect(path) as raw:
                    await use(raw, ram, memory, eventfd)
        for leave in LEAVE[edition_of_library()]:  # the next client gets a new context
            async with connect_next(path) as raw:
                await leave(raw)
        async with connect_next(path) as raw:
            await raw.expect_alive()
    if edition_of_library() == "v1":  # a v2 since April 2026 needs none
        assert used_suppressions(tmp_path / "log") == known_suppressions(), "one is not needed any more"


@pytest.mark.parametrize("checks", CHECKS if SOAK else ["bounds"], indirect=True)
async def test_nothing_is_found_while_a_driver_uses_the_e1000(
    libvfio_lab: Lab, valgrind: str, checks: Checks, tmp_path: Path
) -> None:
    """Frames of all sizes both ways, segmentation, the dirty log, and the state saved and restored."""
    options = VmmOptions(MEMORY, timeout=PATIENCE)
    async with nothing_found(valgrind, checks, "e1000", tmp_path) as path:
        for frames in (100, 10):
            async with (
                open_vmm(path, options) as vmm,
                open_e1000(vmm, ring=64, link_patience=PATIENCE) as nic,
            ):
                traffic = Traffic(nic, patience=PATIENCE)
                await traffic.resolve()
                await drive(vmm, traffic, frames)
                await traffic.check_statistics()


async def drive(vmm: FakeVmm, traffic: Traffic, frames: int) -> None:
    """Let frames come and go, before and after the device's state has been read and written."""
    driver, dirty = await open_driver(vmm), PageSet(vmm.ram.ranges)
    await driver.start_log(vmm.ram.ranges)
    await traffic.bulk(frames, window=32, batch=16)
    await traffic.segments(size=20_000)
    await driver.read_log(dirty)
    assert len(dirty)
    await driver.stop_log()
    state = b""
    for saving in (MigrationState.PRE_COPY, MigrationState.STOP_COPY):
        await driver.enter(saving)
        while (piece := await driver.read_state()) is not None:
            state += piece
    await driver.enter(MigrationState.RUNNING)
    await driver.enter(MigrationState.RESUMING)
    await driver.write_state(state)
    await driver.load()
    await driver.enter(MigrationState.RUNNING)
    driver.close()
    await traffic.bulk(frames, window=32, batch=16)


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


async def leave_saving_v1(raw: RawClient) -> None:
    await set_v1(raw, V1_SAVING)
    assert await moving.read_field(raw, moving.PENDING)
    assert await moving.read_field(raw, moving.SIZE)


async def leave_resuming_v1(raw: RawClient) -> None:
    await set_v1(raw, V1_SAVING)
    parts = await iterate(raw)
    await set_v1(raw, V1_RUNNING, V1_RESUMING)
    await resume_v1(raw, [parts[0][:-1]])


async def leave_saving_v2(raw: RawClient) -> None:
    assert (await set_state(raw, S.STOP_COPY)).ok
    assert (await moving.data_read(raw, 100)).ok


async def leave_resuming_v2(raw: RawClient) -> None:
    assert (await set_state(raw, S.STOP_COPY)).ok
    data = await read_stream(raw)
    assert (await set_state(raw, S.RUNNING, S.RESUMING)).ok
    await write_stream(raw, data[:-1])


LEAVE: Mapping[str, Sequence[Callable[[RawClient], Awaitable[None]]]] = {
    "v1": (leave_saving_v1, leave_resuming_v1),
    "v2": (leave_saving_v2, leave_resuming_v2),
}
"""Clients that leave in the middle of a migration."""
