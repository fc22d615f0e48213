# SPDX-License-Identifier: BSD-3-Clause
"""The libvfio-user engine on a stand-in for a library of v2 (`libvfio/stub.c`): each callback and each call.

A client of the stand-in sends orders, and the stand-in does what the library does for a request. The real
v2 library is used by the conformance tests and by tests/migration when VFIO_USER_LIBVFIO_USER names one.
"""

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from conformance import wire
from conformance.moving import MIG_STATE, SET, S
from golden import streams
from needs import compile_stub
from vfio_user.device_models.backends import NoneBackend
from vfio_user.device_models.catalog import make_device
from vfio_user.device_models.device import Device, Host
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Area, Doorbell, RamRegion
from vfio_user.device_models.scratch import Scratch
from vfio_user.server.engines import libvfio_user_context
from vfio_user.server.engines.engine import Settings
from vfio_user.server.engines.libvfio_user import LibvfioUserServer
from vfio_user.server.engines.libvfio_user_abi import MigrationState, Reset
from vfio_user.server.engines.libvfio_user_library import Library, load
from vfio_user.server.engines.native import NativeServer
from vfio_user.transport.listener import Listener, ListenError

PAGE = 4096
ORDER, RESULT = struct.Struct("=IIQQII"), struct.Struct("=qiI")
(
    ACCESS,
    MAP,
    UNMAP,
    PEEK,
    POKE,
    RESET,
    TRANSITION,
    READ_DATA,
    WRITE_DATA,
    IRQ_STATE,
    FIRED,
    DIRTY,
    QUIESCE,
) = range(1, 14)
FACT, EVENTFDS, SGL_ERROR = 14, 15, 16
LIMIT, IOEVENTFDS, SHADOW_OFFSETS, SGL_FLAGS, REALIZED, SIZE, FLAGS, AREAS, HAS_FD, IRQS = range(10)
CONFIG, INTX, MSIX = 7, 0, 2
SOURCE_AT, DOORBELL, STATUS = 0xFE0, 0xFF8, 0xFFC
BUSY, DONE, FAILED = 1, 2, 4
UNMAPPED = 4
"""A flag of MAP: the library has not mapped the region."""


@pytest.fixture(scope="module", params=[(), ("-DNO_LIMIT",)], ids=["2026", "2023"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return load(str(compile_stub(tmp_path_factory.mktemp("stub") / "stub.so", *request.param)))


class Bench:
    """A server that is turned by hand, and the client that gives orders."""

    def __init__(self, server: LibvfioUserServer, path: Path) -> None:
        self.server = server
        self.path = path
        self.connect()

    def connect(self) -> None:
        self.client = socket.socket(socket.AF_UNIX)
        self.client.connect(str(self.path))
        self.client.settimeout(5)
        self.turn()

    def leave(self) -> None:
        self.client.close()
        self.turn()

    def turn(self) -> None:
        for _ in range(10):
            self.server.turn()

    def order(
        self, what: int, index: int = 0, first: int = 0, second: int = 0, flags: int = 0, data: bytes = b""
    ) -> tuple[int, int, bytes]:
        """Value, errno and data of the result."""
        self.client.sendall(ORDER.pack(what, index, first, second, flags, len(data)) + data)
        self.turn()
        value, error, length = RESULT.unpack(self.client.recv(RESULT.size, socket.MSG_WAITALL))
        return value, error, self.client.recv(length, socket.MSG_WAITALL) if length else b""

    def read(self, offset: int, count: int, region: int = 0) -> bytes:
        value, error, data = self.order(ACCESS, region, offset, count)
        assert (value, error) == (count, 0)
        return data

    def write(self, offset: int, data: bytes, region: int = 0) -> None:
        assert self.order(ACCESS, region, offset, len(data), 1, data) == (len(data), 0, b"")

    def map(self, slot: int, address: int, size: int, flags: int = 3) -> None:
        assert self.order(MAP, slot, address, size, flags)[0] == 0

    def poke(self, slot: int, offset: int, data: bytes) -> None:
        self.order(POKE, slot, offset, flags=0, data=data)

    def peek(self, slot: int, offset: int, count: int) -> bytes:
        return self.order(PEEK, slot, offset, count)[2]

    def dirty(self, slot: int) -> set[int]:
        return {page for page, mark in enumerate(self.order(DIRTY, slot)[2]) if mark}

    def fact(self, which: int, of: int = 0) -> int:
        return self.order(FACT, which, of)[0]

    def copy(self, source: int, destination: int, count: int, *, answered: bool = True) -> int:
        """By the scratch device; its status (0 where nobody is there to ask for it)."""
        self.write(4, b"\6\0", CONFIG)
        self.write(SOURCE_AT, struct.pack("<QQI", source, destination, count))
        self.write(DOORBELL, bytes(4))
        return self.read(STATUS, 4)[0] if answered else 0


@pytest.fixture
def model() -> Callable[[Host], Device]:
    return Scratch


@pytest.fixture
def bench(library: Library, model: Callable[[Host], Device], tmp_path: Path) -> Iterator[Bench]:
    with LibvfioUserServer(library, Settings(spin_us=0, max_dma_maps=1234)) as server:
        server.install(model)
        server.listen_at(tmp_path / "s")
        bench = Bench(server, tmp_path / "s")
        yield bench
        bench.client.close()
        bench.turn()
    assert not (tmp_path / "s").exists()


class Many(PciDevice):
    """A region of which two pages can be mapped and that has doorbells, and many vectors."""

    model = "many"
    identity = Identity(vendor_id=0x1234, device_id=1, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        self.ram = RamRegion(4 * PAGE, host.allocate_memory(4 * PAGE))
        self.ram.mmap_areas = (Area(PAGE, PAGE), Area(3 * PAGE, PAGE))
        self.ram.doorbells = tuple(Doorbell(8 * i, 4, i) for i in range(20))
        super().__init__(host, {0: Bar(self.ram)}, msi_vectors=4, msix_vectors=8)

    def reset_state(self) -> None:
        pass


@pytest.mark.parametrize("model", [Many])
def test_what_the_library_is_told_of_the_device(bench: Bench, library: Library) -> None:
    assert bench.fact(LIMIT) == (1234 if library.abi.name == "V2_LIMIT" else 0)
    assert (bench.fact(IOEVENTFDS), bench.fact(SHADOW_OFFSETS)) == (16, 0)
    assert [bench.fact(SIZE, index) for index in range(9)] == [4 * PAGE, PAGE, 0, 0, 0, 0, 0, 256, 0]
    assert [bench.fact(FLAGS, index) for index in (0, 1, CONFIG)] == [7, 7, 11]
    assert (bench.fact(AREAS), bench.fact(HAS_FD), bench.fact(HAS_FD, 1)) == (2, 1, 0)
    assert [bench.fact(IRQS, index) for index in range(5)] == [1, 4, 8, 0, 0]
    assert bench.fact(REALIZED) == 1


def test_regions_are_read_and_written(bench: Bench) -> None:
    bench.write(16, b"some words")
    assert bench.read(16, 10) == b"some words"
    assert bench.read(0, 4, CONFIG) == struct.pack("<HH", 0x1234, 0x5C7A)


@pytest.mark.parametrize("model", [Faulty])
def test_a_model_that_raises_is_eio_and_a_traceback_and_the_next_request_works(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    assert bench.order(ACCESS, 0, 4, 4) == (-1, errno.EIO, b"")
    assert bench.order(ACCESS, 0, 4, 4, 1, bytes(4)) == (-1, errno.EIO, b"")
    assert bench.read(0, 4) == bytes(4)
    assert caplog.text.count("Traceback") == 2
    assert "a register read fails on demand" in caplog.text


def test_mapped_memory_is_copied_and_marked_through_the_library(bench: Bench) -> None:
    bench.map(0, 0x10000, 16 * PAGE)
    bench.map(1, 0x100000, 16 * PAGE)
    data = bytes(range(256)) * 20
    bench.poke(0, 100, data)
    assert bench.copy(0x10000 + 100, 0x100000 + 3 * PAGE - 5, len(data)) == DONE
    assert bench.peek(1, 3 * PAGE - 5, len(data)) == data
    assert bench.dirty(0) == set()
    assert bench.dirty(1) == {2, 3, 4}
    counters = bench.server.counters()
    assert counters["dma_mapped_write_bytes"] == counters["dma_mapped_read_bytes"] == len(data)


def test_memory_that_is_not_mapped_is_read_and_written_by_the_library(bench: Bench) -> None:
    bench.map(0, 0x10000, 4 * PAGE, 3 | UNMAPPED)
    data = bytes(range(256)) * 20
    bench.poke(0, 10, data)
    assert bench.copy(0x10000 + 10, 0x10000 + 2 * PAGE + 3, len(data)) == DONE
    assert bench.peek(0, 2 * PAGE + 3, len(data)) == data
    assert bench.dirty(0) == set(), "the client makes these writes, and knows"
    assert bench.fact(SGL_FLAGS) == 1 << 1, "by file, where the client allows it"


@pytest.mark.parametrize("error", [errno.EPROTO, errno.EINTR], ids=errno.errorcode.get)
@pytest.mark.parametrize("source", [0x10000, 0x20000], ids=["read", "write"])
def test_a_client_whose_stream_is_lost_is_dropped_and_the_next_one_is_served(
    bench: Bench, caplog: pytest.LogCaptureFixture, source: int, error: int
) -> None:
    """Another message was taken for the reply to a DMA, or a signal ended the wait for it."""
    bench.map(0, 0x10000, PAGE, 3 | UNMAPPED)
    bench.map(1, 0x20000, PAGE)
    bench.order(SGL_ERROR, error)
    assert bench.copy(source, source ^ 0x30000, 8, answered=False) == 0
    assert bench.client.recv(1) == b""
    assert f"client 1 dropped: {os.strerror(error)}" in caplog.text
    assert (bench.server.attached, len(bench.server.host.table)) == (False, 0)
    bench.client.close()
    bench.connect()
    bench.write(STATUS, struct.pack("<I", FAILED | DONE))
    bench.map(0, 0x10000, PAGE, 3 | UNMAPPED)
    assert bench.copy(0x10000, 0x10000 + 64, 8) == DONE
    assert caplog.text.count("dropped") == 1


def test_a_dma_by_message_that_fails_costs_nobody_the_connection(bench: Bench) -> None:
    bench.map(0, 0x10000, PAGE, 3 | UNMAPPED)
    bench.order(SGL_ERROR, errno.EFAULT)
    assert bench.copy(0x10000, 0x10000 + 64, 8) & FAILED
    bench.write(STATUS, struct.pack("<I", FAILED | DONE))
    assert bench.copy(0x10000, 0x10000 + 64, 8) == DONE


@pytest.mark.parametrize(
    ("address", "size", "access"),
    [(0x10001, PAGE, 3), ((1 << 64) - PAGE, 2 * PAGE, 3), (0x10000, PAGE, 0)],
    ids=["not aligned", "wraps", "no access"],
)
def test_a_range_that_the_device_cannot_use_is_said_to_be_none(
    bench: Bench, caplog: pytest.LogCaptureFixture, address: int, size: int, access: int
) -> None:
    """The library has told the client already that it is mapped."""
    bench.map(0, address, size, access)
    assert "the device cannot use guest memory that has been mapped" in caplog.text
    assert len(bench.server.host.table) == 0
    bench.order(UNMAP, 0, address)
    bench.map(1, 0x20000, PAGE)
    assert bench.copy(0x20000, 0x20000 + 64, 8) == DONE


@pytest.mark.parametrize("flags", [1, 1 | UNMAPPED])
def test_read_only_memory_is_not_written(bench: Bench, flags: int) -> None:
    bench.map(0, 0x10000, PAGE, flags)
    bench.map(1, 0x20000, PAGE)
    assert bench.copy(0x10000, 0x20000, 8) == DONE
    assert bench.copy(0x20000, 0x10000, 8) & FAILED


def test_a_region_that_went_is_not_touched_any_more(bench: Bench) -> None:
    bench.map(0, 0x10000, 4 * PAGE)
    assert bench.copy(0x10000, 0x10000 + PAGE, 8) == DONE
    assert bench.order(UNMAP, 0, 0x10000)[0] == 0
    assert bench.copy(0x10000, 0x10000 + PAGE, 8) & FAILED
    bench.map(2, 0x10000, PAGE)
    assert bench.copy(0x10000, 0x10000 + 64, 8) & DONE


def test_a_view_that_is_kept_is_named(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.map(0, 0x10000, 4 * PAGE)
    region = next(iter(bench.server.host.table))
    kept = region.load(0, 10)
    assert bench.order(UNMAP, 0, 0x10000)[0] == 0
    assert "the device still holds a view of guest memory 0x10000" in caplog.text
    del kept


def test_the_same_region_may_be_told_of_twice(bench: Bench) -> None:
    bench.map(0, 0x10000, 4 * PAGE)
    bench.map(0, 0x10000, 4 * PAGE)
    assert len(bench.server.host.table) == 1


def test_vectors_fire_when_there_are_eventfds_and_are_owed_until_then(bench: Bench) -> None:
    bench.map(0, 0x10000, PAGE)
    assert bench.copy(0x10000, 0x10000 + 64, 8) == DONE
    assert bench.order(FIRED)[0] == 0
    bench.order(EVENTFDS, flags=1)
    assert bench.order(FIRED)[0] == 1, "INTx: the level is still high"
    assert bench.order(IRQ_STATE, INTX, 0, 1, 1)[0] == 0
    bench.write(STATUS, struct.pack("<I", DONE))
    assert bench.copy(0x10000, 0x10000 + 64, 8) == DONE
    assert bench.order(FIRED)[0] == 1, "masked"
    assert bench.order(IRQ_STATE, INTX, 0, 1, 0)[0] == 0
    assert bench.order(FIRED)[0] == 2
    assert bench.server.counters()["irqs_intx"] == 2


def test_a_start_and_count_beyond_all_vectors_do_no_harm(bench: Bench) -> None:
    for masked in (1, 0):
        assert bench.order(IRQ_STATE, MSIX, 0, 0xFFFFFFFF, masked)[0] == 0
        assert bench.order(IRQ_STATE, MSIX, 0xFFFFFFFF, 1, masked)[0] == 0


@pytest.mark.parametrize("why", [Reset.DEVICE, Reset.PCI_FLR])
def test_reset_brings_the_device_back(bench: Bench, why: Reset) -> None:
    bench.write(0, b"gone")
    assert bench.order(RESET, why)[0] == 0
    assert bench.read(0, 4) == bytes(4)


def test_the_device_keeps_its_state_when_a_client_leaves(bench: Bench) -> None:
    left: list[str] = []
    bench.server.client_left = lambda: left.append("left")
    bench.write(0, b"kept")
    bench.map(0, 0x10000, PAGE)
    bench.leave()
    assert left == ["left"]
    assert (len(bench.server.host.table), bench.server.host.running) == (0, False)
    bench.connect()
    assert bench.server.clients_served == 2
    assert bench.read(0, 4) == b"kept"


def test_quiesce_is_granted_at_once(bench: Bench) -> None:
    assert bench.order(QUIESCE) == (0, 0, b"")


class Fails(Scratch):
    """Raises wherever the library calls it, once `after` has counted down."""

    after = 0

    def fail(self) -> None:
        self.after -= 1
        if self.after == 0:
            raise RuntimeError("on demand")

    def reset_state(self) -> None:
        self.fail()
        super().reset_state()

    @property
    def precise_dirty(self) -> bool:  # type: ignore[override]  # what a model must not do
        self.fail()
        return True


@pytest.mark.parametrize("what", [RESET, QUIESCE])
@pytest.mark.parametrize("model", [Fails])
def test_a_callback_that_raises_is_eio_and_a_traceback_and_works_the_next_time(
    bench: Bench, what: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = bench.server.device
    assert isinstance(device, Fails)
    device.after = 1
    assert bench.order(what) == (-1, errno.EIO, b"")
    assert caplog.text.count("Traceback") == 1
    assert "on demand" in caplog.text
    assert bench.order(what) == (0, 0, b"")


def test_a_stream_whose_reading_and_writing_raise(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise RuntimeError("on demand")

    for state, method, what in (
        (MigrationState.STOP_AND_COPY, "read", READ_DATA),
        (MigrationState.RESUME, "write", WRITE_DATA),
    ):
        stream = save(bench, 1 << 20)
        assert bench.order(TRANSITION, state)[0] == 0
        with monkeypatch.context() as patch:
            patch.setattr(bench.server.host.migration, method, fail)
            assert bench.order(what, 0, 0, 100, data=b"some") == (-1, errno.EIO, b"")
        if method == "write":
            assert bench.order(WRITE_DATA, data=stream)[0] == len(stream)
        else:
            assert bench.order(READ_DATA, 0, 0, 1 << 20)[2] == stream
        assert bench.order(TRANSITION, MigrationState.STOP)[0] == 0
        assert bench.order(TRANSITION, MigrationState.RUNNING)[0] == 0
    assert caplog.text.count("Traceback") == 2


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_what_interrupts_a_callback_of_a_request_ends_the_server(bench: Bench) -> None:
    """Ctrl-C comes wherever Python runs."""
    bench.server.client_left = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.leave()


def test_what_interrupts_a_callback_of_the_end_is_raised(bench: Bench) -> None:
    bench.server.client_left = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.server.close()


def test_what_interrupts_a_callback_while_a_client_is_taken_ends_the_server(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)  # the library logs then
    with LibvfioUserServer(library, Settings(spin_us=0)) as server, socket.socket(socket.AF_UNIX) as client:
        server.install(Scratch)
        server.listen_at(tmp_path / "s")
        client.connect(str(tmp_path / "s"))
        monkeypatch.setattr(libvfio_user_context.logger, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.turn()
        monkeypatch.undo()


def test_a_context_that_cannot_be_completed_leaves_nothing_behind(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(libvfio_user_context.Context, "_let_clients_wait", fail)
    with LibvfioUserServer(library, Settings(spin_us=0)) as server:
        server.install(Scratch)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ListenError, match="Too many open files"):
            server.listen_at(tmp_path / "s")
        assert len(os.listdir("/proc/self/fd")) == before
    assert not os.listdir(tmp_path)


class Blind(Scratch):
    """Cannot tell what it wrote."""

    precise_dirty = False


@pytest.mark.parametrize("model", [Blind])
def test_of_a_device_that_cannot_tell_everything_is_dirty(bench: Bench) -> None:
    bench.map(0, 0x10000, 3 * PAGE)
    bench.map(1, 0x20000, 3 * PAGE, 1)
    bench.order(QUIESCE)
    assert (bench.dirty(0), bench.dirty(1)) == ({0, 1, 2}, set())


# Migration


def save(bench: Bench, piece: int) -> bytes:
    assert bench.order(TRANSITION, MigrationState.STOP)[:2] == (0, 0)
    assert bench.order(TRANSITION, MigrationState.STOP_AND_COPY)[:2] == (0, 0)
    parts = []
    while data := bench.order(READ_DATA, 0, 0, piece)[2]:
        parts.append(data)
    assert bench.order(TRANSITION, MigrationState.STOP)[:2] == (0, 0)
    assert bench.order(TRANSITION, MigrationState.RUNNING)[:2] == (0, 0)
    return b"".join(parts)


@pytest.mark.parametrize("piece", [1 << 20, 100, 7])
def test_the_state_goes_through_the_callbacks(bench: Bench, piece: int) -> None:
    bench.write(0, b"moved")
    stream = save(bench, piece)
    bench.write(0, b"other")
    assert bench.order(TRANSITION, MigrationState.RESUME)[:2] == (0, 0)
    for place in range(0, len(stream), piece):
        part = stream[place : place + piece]
        assert bench.order(WRITE_DATA, data=part)[:2] == (len(part), 0)
    assert bench.order(TRANSITION, MigrationState.STOP)[:2] == (0, 0)
    assert bench.order(TRANSITION, MigrationState.RUNNING)[:2] == (0, 0)
    assert bench.read(0, 5) == b"moved"


def test_the_device_works_in_pre_copy_and_stands_still_after(bench: Bench) -> None:
    bench.map(0, 0x10000, PAGE)
    assert bench.order(TRANSITION, MigrationState.PRE_COPY)[:2] == (0, 0)
    assert bench.copy(0x10000, 0x10000 + 64, 8) == DONE
    assert bench.order(TRANSITION, MigrationState.STOP_AND_COPY)[:2] == (0, 0)
    assert not bench.server.host.running
    assert bench.copy(0x10000, 0x10000 + 64, 8) & BUSY, "remembered, not done"
    assert bench.order(TRANSITION, MigrationState.STOP)[:2] == (0, 0)
    assert bench.order(TRANSITION, MigrationState.RUNNING)[:2] == (0, 0)
    assert bench.read(STATUS, 4)[0] == DONE


def test_a_bad_stream_and_a_wrong_order_are_errors(bench: Bench) -> None:
    assert bench.order(READ_DATA, 0, 0, 100)[:2] == (-1, errno.EINVAL)
    assert bench.order(WRITE_DATA, data=b"x")[:2] == (-1, errno.EINVAL)
    assert bench.order(TRANSITION, 99)[:2] == (-1, errno.EIO)
    bench.write(0, b"as it was")
    assert bench.order(TRANSITION, MigrationState.RESUME)[:2] == (0, 0)
    assert bench.order(WRITE_DATA, data=b"no stream of ours")[:2] == (-1, errno.EINVAL)
    assert bench.order(RESET)[0] == 0
    assert bench.read(0, 4) == bytes(4)


def test_a_client_that_leaves_while_it_saves(bench: Bench) -> None:
    assert bench.order(TRANSITION, MigrationState.PRE_COPY)[:2] == (0, 0)
    bench.leave()
    bench.connect()
    assert bench.order(READ_DATA, 0, 0, 100)[:2] == (-1, errno.EINVAL)
    assert bench.read(0, 4) == bytes(4)


# To and from the native engine


def card(host: Host) -> Device:
    return make_device(E1000, host, NoneBackend(), {})


class Native:
    """The native engine with a card, turned by hand, and a client of v2."""

    def __init__(self, server: NativeServer, client: socket.socket) -> None:
        self.server = server
        self.client = client
        assert self.call(wire.VERSION, wire.version({}))

    def call(self, command: int, body: bytes) -> bytes:
        self.client.sendall(wire.message(command, body))
        for _ in range(10):
            self.server.turn()
        header = self.client.recv(wire.HEADER.size, socket.MSG_WAITALL)
        _, _, size, flags, error = wire.HEADER.unpack(header)
        assert (flags, error) == (wire.REPLY, 0)
        return self.client.recv(size - wire.HEADER.size, socket.MSG_WAITALL)

    def enter(self, state: S) -> None:
        body = struct.pack("=IIII", 16, SET | MIG_STATE, state, 0)
        assert self.call(wire.DEVICE_FEATURE, body) == body

    def restore(self, stream: bytes) -> None:
        self.enter(S.RESUMING)
        self.call(wire.MIG_DATA_WRITE, struct.pack("=II", 8 + len(stream), len(stream)) + stream)
        self.enter(S.STOP)

    def save(self) -> bytes:
        self.enter(S.STOP_COPY)
        stream = self.call(wire.MIG_DATA_READ, struct.pack("=II", 1 << 20, 1 << 19))[8:]
        self.enter(S.STOP)
        return stream


@pytest.fixture
def native(tmp_path: Path) -> Iterator[Native]:
    path = tmp_path / "native"
    with NativeServer(Settings(spin_us=0)) as server, socket.socket(socket.AF_UNIX) as client:
        server.install(card)
        with closing(Listener.bind(path)) as listener:
            server.listen(listener)
            client.connect(str(path))
            client.settimeout(5)
            yield Native(server, client)


def restore(bench: Bench, stream: bytes) -> None:
    """The card stands still after it: time does not change it then."""
    assert bench.order(TRANSITION, MigrationState.RESUME)[:2] == (0, 0)
    for place in range(0, len(stream), 1000):
        part = stream[place : place + 1000]
        assert bench.order(WRITE_DATA, data=part)[:2] == (len(part), 0)
    assert bench.order(TRANSITION, MigrationState.STOP)[:2] == (0, 0)


def save_stopped(bench: Bench) -> bytes:
    assert bench.order(TRANSITION, MigrationState.STOP_AND_COPY)[:2] == (0, 0)
    parts = []
    while data := bench.order(READ_DATA, 0, 0, 1000)[2]:
        parts.append(data)
    assert bench.order(TRANSITION, MigrationState.STOP)[:2] == (0, 0)
    return b"".join(parts)


@pytest.mark.parametrize("model", [card])
def test_a_card_moves_to_and_from_the_native_engine(bench: Bench, native: Native) -> None:
    """With something in every part of it: each hands on what it was given."""
    fresh = native.save()
    golden = streams.files("e1000")[-1].read_bytes()
    native.restore(golden)
    first = native.save()
    restore(bench, first)
    second = save_stopped(bench)
    native.restore(second)
    device = native.server.device
    assert device is not None
    expected = streams.parsed(device, golden)
    assert streams.parsed(device, fresh) != expected
    for stream in (first, second, native.save()):
        assert streams.parsed(device, stream) == expected
