# SPDX-License-Identifier: BSD-3-Clause
"""Guest memory over regions of all three kinds, against plain bytes; a client that answers as told."""

import fcntl
import os
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.device_models.device import DmaError
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.tasks import Completion, Gate, TaskRunner
from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.dirty import DirtyLog
from vfio_user.server.dma_region import Access, DmaRegion
from vfio_user.server.dma_table import DmaTable
from vfio_user.server.guest_memory import GuestMemory
from vfio_user.server.message_dma import WINDOW, MessageDma
from vfio_user.transport.fds import OwnedFd

PAGE = 4096
T = TypeVar("T")


@dataclass
class FakeClient:
    """The other end of DMA messages: memory at any address, answers held back until the test wants them."""

    memory: bytearray = field(default_factory=lambda: bytearray(1 << 20))
    held: list[Callable[[], None]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    automatic: bool = True
    refuses: bool = False

    def _answer(self, action: Callable[[], None]) -> None:
        if self.automatic:
            action()
        else:
            self.held.append(action)

    def send_dma_read(self, address: int, count: int, completion: Completion[Buffer]) -> None:
        if self.refuses:
            raise VfioUserError("the client has gone")
        self.log.append(f"read {address:#x} {count}")
        self._answer(lambda: completion.finish(bytes(self.memory[address : address + count])))

    def send_dma_write(self, address: int, data: Buffer, completion: Completion[int]) -> None:
        if self.refuses:
            raise VfioUserError("the client has gone")
        self.log.append(f"write {address:#x} {len(data)}")
        self.memory[address : address + len(data)] = data
        self._answer(lambda: completion.finish(len(data)))


def memfd(size: int, seals: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


class Guest:
    """A table with regions of every kind next to each other: pages 0-3 mapped, 4-7 file, 8-11 message."""

    def __init__(self) -> None:
        self.client = FakeClient()
        self.table = DmaTable()
        self.gate = Gate()
        self.dma = GuestMemory(self.table, MessageDma(self.client, 3000, self.gate), self.gate)
        self.dma.enabled = True
        self.mapped = self.table.map(0, 4 * PAGE, memfd(4 * PAGE, fcntl.F_SEAL_SHRINK))
        self.file_fd = memfd(4 * PAGE, 0)
        self.file = self.table.map(4 * PAGE, 4 * PAGE, self.file_fd.duplicate())
        self.message = self.table.map(8 * PAGE, 4 * PAGE)

    def close(self) -> None:
        self.table.unmap_all()
        self.file_fd.close()


@pytest.fixture
def guest(caplog: pytest.LogCaptureFixture) -> Iterator[Guest]:
    before = len(os.listdir("/proc/self/fd"))
    guest = Guest()
    yield guest
    caplog.clear()
    guest.close()
    assert not caplog.text, "a view was left behind"
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that must not suspend."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError(f"it suspended on {waits_for}")


class Waiting:
    """A coroutine that is driven as a device's task; `result` once it has ended."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.result: Any = None
        self.runner = TaskRunner(self._failed)
        self.runner.start("task", lambda: self._run(coroutine))
        self.run()

    async def _run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.result = ("done", await coroutine)

    def _failed(self, _key: object, error: Exception) -> None:
        self.result = ("failed", error)

    def run(self) -> Any:
        while self.runner.ready:
            self.runner.run_ready()
        return self.result


def dma_error(coroutine: Coroutine[Any, Any, Any]) -> DmaError:
    with pytest.raises(DmaError) as caught:
        at_once(coroutine)
    return caught.value


def content(region: DmaRegion, offset: int, length: int) -> bytes:
    return bytes(region.load(offset, length))


def test_mapped_memory_is_a_view_and_never_waits(guest: Guest) -> None:
    at_once(guest.dma.write(100, b"hello"))
    data = at_once(guest.dma.read(100, 5))
    assert isinstance(data, memoryview)
    assert data.readonly
    assert bytes(data) == b"hello"
    assert guest.mapped.access is Access.MAPPED


def test_file_memory_never_waits(guest: Guest) -> None:
    at_once(guest.dma.write(4 * PAGE + 7, b"hello"))
    assert at_once(guest.dma.read(4 * PAGE + 7, 5)) == b"hello"
    assert os.pread(guest.file_fd.fileno(), 5, 7) == b"hello"


def test_message_memory(guest: Guest) -> None:
    at_once(guest.dma.write(8 * PAGE, b"hello"))
    assert guest.client.memory[8 * PAGE :][:5] == b"hello"
    assert at_once(guest.dma.read(8 * PAGE, 5)) == b"hello"
    assert guest.client.log == ["write 0x8000 5", "read 0x8000 5"]


def test_a_range_across_all_kinds(guest: Guest) -> None:
    data = os.urandom(12 * PAGE)
    at_once(guest.dma.write(0, data))
    assert at_once(guest.dma.read(0, len(data))) == data
    assert content(guest.mapped, 0, 4 * PAGE) == data[: 4 * PAGE]
    assert content(guest.file, 0, 4 * PAGE) == data[4 * PAGE : 8 * PAGE]
    assert guest.client.memory[8 * PAGE : 12 * PAGE] == data[8 * PAGE :]


def test_many_segments(guest: Guest) -> None:
    segments = [(10, b"a"), (PAGE, b"bb"), (4 * PAGE - 1, b"cc"), (9 * PAGE, b"dddd"), (10, b""), (12, b"e")]
    at_once(guest.dma.write_many(segments))
    pieces = at_once(guest.dma.read_many([(address, len(data)) for address, data in segments]))
    assert pieces == [data for _, data in segments]
    pieces.clear()
    at_once(guest.dma.write_many([(10, b"x"), (20, b"y")]))
    assert [bytes(p) for p in at_once(guest.dma.read_many([(10, 1), (20, 1)]))] == [b"x", b"y"]


@pytest.mark.parametrize("address", [12 * PAGE, 12 * PAGE - 1, 2**64 - 1, 1 << 70, -1])
def test_holes(guest: Guest, address: int) -> None:
    assert "nothing is mapped" in dma_error(guest.dma.read(address, 2)).reason
    assert "nothing is mapped" in dma_error(guest.dma.write(address, b"xx")).reason
    assert "nothing is mapped" in dma_error(guest.dma.read_many([(0, 1), (address, 2)])).reason
    assert "nothing is mapped" in dma_error(guest.dma.write_many([(0, b"x"), (address, b"xx")])).reason


def test_a_negative_length(guest: Guest) -> None:
    dma_error(guest.dma.read(0, -1))
    dma_error(guest.dma.read_many([(0, 1), (0, -1)]))


def test_bus_master_off(guest: Guest) -> None:
    at_once(guest.dma.read(0, 4))
    guest.dma.enabled = False
    assert "bus master" in dma_error(guest.dma.read(0, 4)).reason
    assert "bus master" in dma_error(guest.dma.write(0, b"x")).reason
    assert "bus master" in dma_error(guest.dma.read_many([(0, 4)])).reason
    assert "bus master" in dma_error(guest.dma.write_many([(0, b"x")])).reason
    assert content(guest.mapped, 0, 1) == b"\0"


def test_read_only_and_write_only_regions(guest: Guest) -> None:
    for page, fd in ((20, memfd(PAGE, fcntl.F_SEAL_SHRINK)), (22, memfd(PAGE, 0)), (24, None)):
        guest.table.map(page * PAGE, PAGE, fd and fd.duplicate(), writable=False)
        guest.table.map((page + 1) * PAGE, PAGE, fd, readable=False)
        at_once(guest.dma.read(page * PAGE, 4))
        assert "read-only" in dma_error(guest.dma.write(page * PAGE, b"x")).reason
        at_once(guest.dma.write((page + 1) * PAGE, b"x"))
        assert "not readable" in dma_error(guest.dma.read((page + 1) * PAGE, 4)).reason


def test_an_unmapped_region_is_forgotten(guest: Guest) -> None:
    at_once(guest.dma.read(0, 4))  # the region of the last access
    guest.table.unmap(0, 4 * PAGE)
    dma_error(guest.dma.read(0, 4))
    dma_error(guest.dma.write(0, b"x"))
    dma_error(guest.dma.read_many([(0, 4)]))
    guest.table.map(0, PAGE)
    assert at_once(guest.dma.read(0, 4)) == bytes(4)
    assert guest.client.log == ["read 0x0 4"]


def test_a_truncated_file_is_an_error_and_no_signal(guest: Guest) -> None:
    os.ftruncate(guest.file_fd.fileno(), PAGE)
    assert "truncated" in dma_error(guest.dma.read(5 * PAGE - 2, 4)).reason
    assert "truncated" in dma_error(guest.dma.write(5 * PAGE - 2, b"xxxx")).reason
    assert os.fstat(guest.file_fd.fileno()).st_size == PAGE
    at_once(guest.dma.read(5 * PAGE - 4, 4))


def test_counters_tell_the_way(guest: Guest) -> None:
    at_once(guest.dma.write(4 * PAGE - 10, bytes(4 * PAGE + 20)))
    at_once(guest.dma.read_many([(0, 1), (1, 2)]))
    at_once(guest.dma.read(8 * PAGE, 5000))
    at_once(guest.dma.read(5 * PAGE, 7))
    counted = {name: value for name, value in guest.dma.counters.as_dict().items() if value}
    assert counted == {
        "mapped_writes": 1,
        "mapped_write_bytes": 10,
        "file_writes": 1,
        "file_write_bytes": 4 * PAGE,
        "message_writes": 1,
        "message_write_bytes": 10,
        "mapped_reads": 2,
        "mapped_read_bytes": 3,
        "message_reads": 1,
        "message_read_bytes": 5000,
        "file_reads": 1,
        "file_read_bytes": 7,
    }


def test_every_write_but_a_message_marks_the_dirty_log(guest: Guest) -> None:
    for region in guest.table:
        region.dirty = DirtyLog(region.size)
    at_once(guest.dma.write(PAGE - 1, b"xx"))
    at_once(guest.dma.write_many([(3 * PAGE, b"x"), (3 * PAGE + 8, b"x")]))
    at_once(guest.dma.write(5 * PAGE, b"x"))
    at_once(guest.dma.write(9 * PAGE, b"x"))
    at_once(guest.dma.read(2 * PAGE, 100))
    assert [region.dirty.bits[0] for region in guest.table if region.dirty] == [0x0B, 0x02, 0]


# By message


def test_splits_by_max_data_xfer_size(guest: Guest) -> None:
    at_once(guest.dma.read(8 * PAGE, 7000))
    assert guest.client.log == ["read 0x8000 3000", "read 0x8bb8 3000", "read 0x9770 1000"]


def test_segments_are_under_way_together_and_answered_in_any_order(guest: Guest) -> None:
    guest.client.automatic = False
    guest.client.memory[8 * PAGE :] = os.urandom(len(guest.client.memory) - 8 * PAGE)
    task = Waiting(guest.dma.read_many([(8 * PAGE, 3500), (9 * PAGE, 10), (0, 3), (10 * PAGE, 1)]))
    assert len(guest.client.held) == 4
    assert task.result is None
    for answer in reversed(guest.client.held):
        answer()
        task.run()
    memory = guest.client.memory
    expected = [memory[8 * PAGE :][:3500], memory[9 * PAGE :][:10], bytes(3), memory[10 * PAGE :][:1]]
    assert task.result == ("done", expected)


def test_the_window_bounds_what_is_under_way(guest: Guest) -> None:
    guest.client.automatic = False
    guest.dma.messages = MessageDma(guest.client, 10, guest.gate)
    for work in (guest.dma.read(8 * PAGE, 1000), guest.dma.write(8 * PAGE, bytes(1000))):
        task = Waiting(work)
        answered = 0
        while task.result is None:
            assert len(guest.client.held) <= WINDOW
            guest.client.held.pop(0)()
            answered += 1
            task.run()
        assert answered == 100
        assert task.result[0] == "done"


def test_the_order_of_writes_holds_across_kinds(guest: Guest) -> None:
    """A mapped write that follows a message waits until that has arrived."""
    guest.client.automatic = False
    task = Waiting(guest.dma.write_many([(0, b"1"), (8 * PAGE, b"2"), (9 * PAGE, b"3"), (1, b"4")]))
    assert len(guest.client.held) == 2
    assert content(guest.mapped, 0, 2) == b"1\0"
    guest.client.held.pop(0)()
    task.run()
    assert content(guest.mapped, 0, 2) == b"1\0"
    guest.client.held.pop(0)()
    assert task.run() == ("done", None)
    assert content(guest.mapped, 0, 2) == b"14"


def test_what_is_unmapped_while_a_write_waits_is_not_written(guest: Guest) -> None:
    guest.client.automatic = False
    task = Waiting(guest.dma.write_many([(8 * PAGE, b"2"), (0, b"x")]))
    guest.table.unmap(0, 4 * PAGE)
    guest.client.held.pop(0)()
    kind, error = task.run()
    assert kind == "failed"
    assert "nothing is mapped" in str(error)


def test_what_is_unmapped_while_a_read_waits_was_copied_before(guest: Guest) -> None:
    at_once(guest.dma.write(0, b"early"))
    guest.client.automatic = False
    task = Waiting(guest.dma.read_many([(0, 5), (8 * PAGE, 1)]))
    guest.table.unmap(0, 4 * PAGE)
    guest.client.held.pop(0)()
    assert task.run() == ("done", [b"early", b"\0"])


@pytest.mark.parametrize("wrong", [b"", b"xxx", b"xxxxx"])
def test_a_reply_of_the_wrong_length(guest: Guest, wrong: bytes) -> None:
    def answer(_address: int, _count: int, completion: Completion[Buffer]) -> None:
        completion.finish(wrong)

    guest.client.send_dma_read = answer  # type: ignore[method-assign,assignment]
    assert f"{len(wrong)} bytes" in dma_error(guest.dma.read(8 * PAGE, 4)).reason


def test_a_write_reply_of_the_wrong_count(guest: Guest) -> None:
    def answer(_address: int, _data: Buffer, completion: Completion[int]) -> None:
        completion.finish(3)

    guest.client.send_dma_write = answer  # type: ignore[method-assign,assignment]
    assert "3 bytes" in dma_error(guest.dma.write(8 * PAGE, b"four")).reason


def test_an_error_reply(guest: Guest) -> None:
    def answer(_address: int, _count: int, completion: Completion[Buffer]) -> None:
        completion.fail(VfioUserError("No such device", 19))

    guest.client.send_dma_read = answer  # type: ignore[method-assign,assignment]
    error = dma_error(guest.dma.read(8 * PAGE + 5, 4))
    assert (error.address, error.length, error.reason) == (8 * PAGE + 5, 4, "No such device")


def test_a_client_that_has_gone(guest: Guest) -> None:
    guest.client.refuses = True
    assert "gone" in dma_error(guest.dma.read(8 * PAGE, 4)).reason
    assert "gone" in dma_error(guest.dma.write(8 * PAGE, b"x")).reason
    guest.dma.messages = None
    assert "no client" in dma_error(guest.dma.read(8 * PAGE, 4)).reason
    assert "no client" in dma_error(guest.dma.write(8 * PAGE, b"x")).reason


def test_a_task_that_is_cut_while_it_waits(guest: Guest) -> None:
    guest.client.automatic = False
    task = Waiting(guest.dma.read(8 * PAGE, 4))
    task.runner.cancel_all()
    guest.client.held.pop(0)()  # the late reply harms nobody
    assert task.run() is None


SIZE = 12 * PAGE
WRITES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(max_size=3 * PAGE)), max_size=6)
READS = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 6 * PAGE)), max_size=6)


@given(WRITES, READS)
def test_against_plain_bytes(writes: list[tuple[int, bytes]], reads: list[tuple[int, int]]) -> None:
    guest = Guest()
    try:
        plain = bytearray(SIZE)
        writes = [(address, data[: SIZE - address]) for address, data in writes]
        for address, data in writes:
            plain[address : address + len(data)] = data
        at_once(guest.dma.write_many(writes))
        reads = [(address, min(length, SIZE - address)) for address, length in reads]
        expected = [bytes(plain[address : address + length]) for address, length in reads]
        assert at_once(guest.dma.read_many(reads)) == expected
        for (address, length), data in zip(reads, expected, strict=True):
            assert at_once(guest.dma.read(address, length)) == data
    finally:
        guest.close()


def queue(*segments: tuple[int, bytes]) -> deque[tuple[int, Buffer]]:
    return deque(segments)


def test_what_was_written_leaves_the_queue_at_once_where_memory_is_at_hand(guest: Guest) -> None:
    for address in (0, 4 * PAGE):
        segments = queue((address, b"one"), (address + 10, b"two"))
        at_once(guest.dma.write_each(segments))
        assert not segments
        assert content(guest.table.find(address), 0, 13) == b"one" + bytes(7) + b"two"  # type: ignore[arg-type]


def test_what_was_written_by_message_leaves_the_queue_with_its_answer(guest: Guest) -> None:
    guest.client.automatic = False
    segments = queue((0, b"m"), (8 * PAGE, b"a" * 7000), (9 * PAGE, b"b"), (1, b"n"), (10 * PAGE, b"c"))
    task = Waiting(guest.dma.write_each(segments))
    left = []
    while task.result is None:
        left.append("".join(chr(data[0]) for _, data in segments))
        guest.client.held.pop(0)()
        task.run()
    assert left == ["abnc", "abnc", "abnc", "bnc", "c"]
    assert task.result == ("done", None)
    assert not segments


def test_what_could_not_be_written_stays_in_the_queue(guest: Guest) -> None:
    segments = queue((0, b"x"), (8 * PAGE, b"y"), (20 * PAGE, b"z"), (1, b"w"))
    dma_error(guest.dma.write_each(segments))
    assert (20 * PAGE, b"z") in segments
    assert (0, b"x") not in segments


def shut(guest: Guest) -> None:
    guest.gate.close()
    guest.dma.take_no_short_way()


ACCESSES: dict[str, Callable[[GuestMemory, int], Coroutine[Any, Any, Any]]] = {
    "read": lambda dma, address: dma.read(address, 4),
    "write": lambda dma, address: dma.write(address, b"data"),
    "read_many": lambda dma, address: dma.read_many([(address, 4), (address + 100, 4)]),
    "write_many": lambda dma, address: dma.write_many([(address, b"data"), (address + 100, b"data")]),
    "write_each": lambda dma, address: dma.write_each(queue((address, b"data"), (address + 100, b"data"))),
}


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("address", [0, 4 * PAGE, 8 * PAGE], ids=["mapped", "file", "message"])
def test_nothing_passes_while_the_gate_is_closed(guest: Guest, access: str, address: int) -> None:
    at_once(guest.dma.read(0, 1))  # the short way is known
    shut(guest)
    task = Waiting(ACCESSES[access](guest.dma, address))
    assert (task.result, guest.client.log) == (None, [])
    assert content(guest.mapped, 0, 4) == bytes(4)
    guest.gate.open()
    shut(guest)  # before the task has run again
    assert (task.run(), guest.client.log) == (None, [])
    guest.gate.open()
    assert task.run()[0] == "done"
    task.result = None  # it may hold views
    assert access.startswith("read") or content(guest.mapped, 0, 4) == (bytes(4) if address else b"data")


def test_a_gate_that_closes_while_messages_are_under_way_lets_no_more_through(guest: Guest) -> None:
    guest.client.automatic = False
    guest.dma.messages = MessageDma(guest.client, 10, guest.gate)
    for work in (guest.dma.read(8 * PAGE, 1000), guest.dma.write(8 * PAGE, bytes(1000))):
        guest.client.log.clear()
        task = Waiting(work)
        shut(guest)
        while guest.client.held:
            guest.client.held.pop(0)()
            task.run()
        assert (len(guest.client.log), task.result) == (WINDOW, None)
        guest.gate.open()
        task.run()
        while guest.client.held:
            guest.client.held.pop(0)()
            task.run()
        assert (len(guest.client.log), task.result[0]) == (100, "done")
