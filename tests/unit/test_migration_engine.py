# SPDX-License-Identifier: BSD-3-Clause
"""The migration engine: what each state does to the device, and what is left when a step fails."""

import errno
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest

from vfio_user.device_models.fake_host import FakeHost, FakeMemory
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import StreamedMemory
from vfio_user.device_models.registers import Register, RegisterFile
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import Apply, Fields, Reader, Section
from vfio_user.device_models.state_memory import Ranges, StateMemory
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.migration.engine import MigrationEngine
from vfio_user.server.migration.reader import StreamReader
from vfio_user.server.migration.staging import StagedMemory

S = MigrationState
STATES = [state for state in S if state is not S.ERROR]
SIZE = 1 << 20
DOORBELL, STATUS = 0xFF8, 0xFFC
BUSY, DONE = 1, 2


class Fragile(PciDevice):
    """Raises where it is told to, so many times: save, load, apply, take, adopt, restored."""

    model = "fragile"
    summary = "fails while it is moved"
    identity = Identity(vendor_id=0x1234, device_id=0x0006, class_code=0xFF0000)
    state_version = 1

    def __init__(self, host: FakeHost) -> None:
        self.failures: dict[str, int] = {}
        self.registers = RegisterFile(4096, (Register("WORD", 0, writable=0xFFFFFFFF),))
        self.memory = _FragileMemory(SIZE, self._fail_at)
        super().__init__(host, {0: Bar(self.registers), 2: Bar(self.memory)})

    def _fail_at(self, place: str) -> None:
        if self.failures.get(place, 0):
            self.failures[place] -= 1
            raise RuntimeError(f"{place} fails on demand")

    def state_sections(self) -> Sequence[Section]:
        return (*super().state_sections(), Section("fragile", 1, self._save, self._load))

    def _save(self) -> Fields:
        self._fail_at("save")
        return {}

    def _load(self, reader: Reader) -> Apply:
        self._fail_at("load")
        return lambda: self._fail_at("apply")

    def restored(self) -> None:
        super().restored()
        self._fail_at("restored")


class _FragileMemory(StreamedMemory):
    def __init__(self, size: int, fail_at: Callable[[str], None]) -> None:
        super().__init__(FakeMemory(size))
        self._fail_at = fail_at

    def take(self, limit: int) -> tuple[int, int] | None:
        self._fail_at("take")
        return super().take(limit)

    def adopt(self, memory: memoryview, used: Ranges | None = None) -> memoryview:
        self._fail_at("adopt")
        return super().adopt(memory, used)


class Bench:
    """A device with its engine. It runs, as if a client had used it."""

    def __init__(self, make: Callable[[FakeHost], PciDevice] = Scratch) -> None:
        self.host = FakeHost()
        self.device = make(self.host)
        self.device.reset()
        self.engine = MigrationEngine(self.device, self.host)
        self.device.regions[7].write(4, b"\x06")  # memory, bus master

    def write(self, offset: int, data: bytes, region: int = 0) -> None:
        self.device.regions[region].write(offset, data)

    def read(self, offset: int, count: int = 4, region: int = 0) -> bytes:
        return self.device.regions[region].read(offset, count)

    def status(self) -> int:
        return self.read(STATUS)[0]

    def save(self, size: int = 4096) -> bytes:
        """All that can be read in this state."""
        data = b""
        while pieces := self.engine.read(size):
            data += b"".join(map(bytes, pieces))
        return data

    def go(self, *states: MigrationState) -> "Bench":
        for state in states:
            self.engine.set_state(state)
        return self


def saved(make: Callable[[FakeHost], PciDevice] = Scratch, word: bytes = b"moved") -> bytes:
    source = Bench(make)
    source.write(0, word[:4])
    return source.go(S.STOP_COPY).save()


def fragile(host: FakeHost) -> Fragile:
    return Fragile(host)


def broken(place: str, times: int = 1) -> Bench:
    """A fragile device that holds `kept` and fails at a place."""
    bench = Bench(fragile)
    bench.write(0, b"kept")
    bench.write(4096, b"kept", region=2)
    assert isinstance(bench.device, Fragile)
    bench.device.failures[place] = times
    return bench


def expect_kept(bench: Bench) -> None:
    assert bench.read(0) == b"kept"
    assert bench.read(4096, region=2) == b"kept"


# Specification: "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE": what the device does in each state


@pytest.mark.parametrize("state", STATES)
def test_the_device_works_in_running_and_pre_copy_only(state: MigrationState) -> None:
    bench = Bench().go(state)
    assert bench.engine.state is state
    assert bench.host.running == bench.engine.may_run == (state in (S.RUNNING, S.PRE_COPY))


@pytest.mark.parametrize("state", STATES)
def test_a_doorbell_is_taken_in_every_state_and_answered_when_the_device_goes_on(
    state: MigrationState,
) -> None:
    bench = Bench().go(state)
    bench.write(DOORBELL, bytes(4))
    bench.host.run()
    if not bench.engine.may_run:
        assert bench.status() == BUSY
        assert bench.read(DOORBELL)
    if state is not S.RESUMING:  # which can only be left with a state
        bench.go(S.RUNNING)
        bench.host.run()
        assert bench.status() == DONE


def test_p2p_states_start_nothing_but_take_what_others_ask() -> None:
    """linux/vfio.h: "must prevent the device from initiating any new P2P DMA transactions"."""
    for around, inside in ((S.RUNNING, S.RUNNING_P2P), (S.PRE_COPY, S.PRE_COPY_P2P)):
        bench = Bench().go(around, inside)
        bench.write(0xFE0, (0x1000).to_bytes(8, "little") + (0x2000).to_bytes(8, "little"))
        bench.write(0xFF0, (64).to_bytes(4, "little"))
        bench.host.dma.memory[0x1000:0x1004] = b"data"
        bench.write(DOORBELL, bytes(4))
        bench.host.run()
        assert bench.host.dma.memory[0x2000:0x2004] == bytes(4)
        bench.go(around)
        bench.host.run()
        assert bench.host.dma.memory[0x2000:0x2004] == b"data"


def test_a_doorbell_of_a_p2p_state_is_saved() -> None:
    source, other = Bench().go(S.RUNNING_P2P), Bench()
    source.write(DOORBELL, bytes(4))
    data = source.go(S.STOP_COPY).save()
    other.go(S.RESUMING).engine.write(data)
    other.go(S.RUNNING)
    other.host.run()
    assert other.status() == DONE


def test_device_time_stands_still_while_the_device_does() -> None:
    bench = Bench().go(S.STOP)
    before = bench.host.clock()
    bench.host.advance(5_000)
    assert bench.host.clock() == before
    bench.go(S.RUNNING)
    bench.host.advance(7)
    assert bench.host.clock() == before + 7


def test_work_that_waits_for_the_vmm_does_not_hold_up_a_stop() -> None:
    bench = Bench()
    bench.host.dma.mapped = False
    bench.write(0xFF0, (64).to_bytes(4, "little"))
    bench.write(DOORBELL, bytes(4))
    bench.host.run()
    assert len(bench.host.dma.waiting) == 1
    bench.go(S.STOP_COPY)
    assert bench.save()
    bench.go(S.RUNNING)
    bench.host.answer()
    assert bench.status() == DONE


def test_a_reply_that_has_come_is_taken_note_of_before_the_stop() -> None:
    bench = Bench()
    bench.host.dma.mapped = False
    bench.write(0xFF0, (64).to_bytes(4, "little"))
    bench.write(DOORBELL, bytes(4))
    bench.host.answer(1)
    bench.host.dma.waiting.popleft()()  # the write; the task has not run since
    bench.go(S.STOP)
    assert bench.read(0xFF4) == (64).to_bytes(4, "little"), "bytes copied"


def test_running_in_so_many_words_starts_a_device_that_nobody_has_used() -> None:
    bench = Bench()
    bench.host.stop()
    bench.go(S.RUNNING)
    assert bench.host.running


def test_pre_copy_does_not_start_a_device_that_nobody_has_used() -> None:
    bench = Bench()
    bench.host.stop()
    bench.go(S.PRE_COPY)
    assert not bench.host.running


# Data transfer


def test_a_device_arrives() -> None:
    other = Bench().go(S.RESUMING)
    other.engine.write(saved())
    assert other.read(0) == bytes(4), "nothing is applied before RESUMING is left"
    other.go(S.STOP)
    assert other.read(0) == b"move"
    assert not other.host.running
    other.go(S.RUNNING)
    assert other.host.running


def test_what_was_under_way_at_the_destination_is_forgotten() -> None:
    other = Bench()
    other.write(DOORBELL, bytes(4))
    other.go(S.RESUMING).engine.write(saved())
    other.go(S.RUNNING)
    other.host.run()
    assert other.status() == 0


@pytest.mark.parametrize("state", [s for s in STATES if s not in (S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY)])
def test_nothing_can_be_read_outside_of_the_saving_group(state: MigrationState) -> None:
    bench = Bench().go(state)
    for read in (lambda: bench.engine.read(1), lambda: bench.engine.pending_bytes):
        with pytest.raises(DeviceError, match=state.name) as caught:
            read()
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("state", [s for s in STATES if s is not S.RESUMING])
def test_nothing_can_be_written_outside_of_resuming(state: MigrationState) -> None:
    bench = Bench().go(state)
    with pytest.raises(DeviceError, match=state.name) as caught:
        bench.engine.write(b"vfiouser")
    assert caught.value.errno == errno.EINVAL
    assert bench.engine.state is state


def test_pre_copy_to_stop_copy_is_one_session() -> None:
    source, other = Bench(fragile), Bench(fragile)
    source.write(4096, b"early", region=2)
    source.go(S.PRE_COPY)
    data = source.save()
    assert source.engine.pending_bytes == 0
    source.write(8192, b"later", region=2)
    assert source.engine.pending_bytes == 4096
    source.go(S.PRE_COPY_P2P)
    data += source.save()
    source.write(12288, b"at last", region=2)
    data += source.go(S.STOP_COPY).save()
    other.go(S.RESUMING).engine.write(data)
    other.go(S.STOP)
    assert other.read(0, SIZE, region=2) == source.read(0, SIZE, region=2)
    assert other.read(8192, 5, region=2) == b"later"


def test_a_session_that_was_ended_begins_anew() -> None:
    source = Bench()
    first = source.go(S.PRE_COPY).save()
    source.go(S.RUNNING)
    second = source.go(S.PRE_COPY).save()
    third = source.go(S.RUNNING, S.STOP_COPY).save()
    fourth = source.go(S.STOP, S.STOP_COPY).save()
    assert first == second
    assert third.startswith(first)
    assert third == fourth


def test_the_source_goes_on_after_a_migration_that_failed() -> None:
    source = Bench()
    source.go(S.STOP_COPY).save()
    source.go(S.RUNNING)
    source.write(DOORBELL, bytes(4))
    source.host.run()
    assert source.status() == DONE


def test_the_memory_is_watched_in_a_session_only() -> None:
    bench = Bench(fragile)
    (memory,) = bench.device.memories().values()
    for walk in ((S.PRE_COPY, S.RUNNING), (S.STOP_COPY, S.STOP), (S.PRE_COPY, S.STOP_COPY, S.RUNNING)):
        bench.go(*walk)
        bench.write(0, b"x", region=2)
        assert memory.pending == 0


# "To abort a RESUMING session the device must be reset"


def test_resuming_without_a_state_cannot_be_left() -> None:
    bench = Bench().go(S.RESUMING)
    with pytest.raises(DeviceError, match="ends after 0 bytes") as caught:
        bench.go(S.RUNNING)
    assert caught.value.errno == errno.EINVAL
    assert bench.engine.state is S.ERROR
    assert "ends after 0 bytes" in bench.engine.reason


@pytest.mark.parametrize("state", [*STATES, None], ids=lambda s: s.name if s else "ERROR")
def test_reset_leads_to_running_from_every_state(state: MigrationState | None) -> None:
    bench = Bench()
    if state is not None:
        bench.go(state)
    else:
        with pytest.raises(DeviceError):
            bench.go(S.RESUMING, S.STOP)
    bench.host.reset()
    bench.device.reset()
    bench.engine.reset()
    assert (bench.engine.state, bench.engine.reason) == (S.RUNNING, "")
    assert bench.host.running
    assert not bench.engine.saving
    assert not bench.engine.resuming
    bench.go(S.PRE_COPY, S.STOP_COPY, S.RUNNING)


def test_a_reset_does_not_resume_what_runs() -> None:
    """Host.resume would step every task, also one that waits for a reply."""
    bench = Bench()
    bench.host.dma.mapped = False
    bench.write(0xFF0, (64).to_bytes(4, "little"))
    bench.write(DOORBELL, bytes(4))
    bench.host.run()
    bench.engine.reset()
    assert not bench.host.tasks.ready


# A client that vanishes


@pytest.mark.parametrize("state", STATES)
def test_a_client_that_vanishes_leaves_the_device_as_it_is(state: MigrationState) -> None:
    bench = Bench(fragile)
    bench.write(0, b"kept")
    bench.write(4096, b"kept", region=2)
    bench.go(state)
    if bench.engine.saving:
        bench.engine.read(10)
    if bench.engine.resuming:
        bench.engine.write(saved(fragile)[:100])
    bench.host.stop()
    bench.engine.client_left()
    assert bench.engine.state is (S.STOP if state in (S.STOP, S.STOP_COPY) else S.RUNNING)
    assert not bench.host.running, "until the next client uses it"
    assert not bench.engine.saving
    assert not bench.engine.resuming
    expect_kept(bench)
    data = bench.go(S.STOP_COPY).save()
    bench.go(S.RESUMING).engine.write(data)
    bench.go(S.RUNNING)
    expect_kept(bench)


@pytest.mark.parametrize("state", [S.STOP, S.STOP_COPY])
def test_what_a_device_that_was_moved_away_still_owed_is_not_done_for_the_next_client(
    state: MigrationState,
) -> None:
    bench = Bench()
    bench.write(DOORBELL, bytes(4))
    bench.go(state)
    bench.engine.client_left()
    assert not bench.engine.may_run
    bench.host.reset()
    bench.device.reset()
    bench.engine.reset()
    bench.host.run()
    assert bench.engine.may_run
    assert bench.status() == 0


def test_a_client_that_vanishes_after_a_bad_stream_leaves_the_device_as_it_is() -> None:
    bench = broken("nowhere").go(S.RESUMING)
    with pytest.raises(DeviceError):
        bench.engine.write(b"nonsense" * 10)
    bench.engine.client_left()
    assert (bench.engine.state, bench.engine.reason) == (S.RUNNING, "")
    expect_kept(bench)


# When a step fails


def test_a_bad_stream_is_an_error_at_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = broken("nowhere").go(S.RESUMING)
    with pytest.raises(DeviceError, match="no saved state") as caught:
        bench.engine.write(b"nonsense" * 10)
    assert caught.value.errno == errno.EINVAL
    assert bench.engine.state is S.ERROR
    assert "fragile: the state cannot be restored" in caplog.text
    expect_kept(bench)
    for refused in (
        lambda: bench.engine.write(b"more"),
        lambda: bench.go(S.STOP),
        lambda: bench.go(S.RUNNING),
    ):
        with pytest.raises(DeviceError):
            refused()
    assert not bench.host.running


def test_the_reason_names_section_and_field() -> None:
    """Of a stream whose digest is right: the section is wrong, not its way here."""
    source = Bench()
    section = source.device.sections()[0]
    fields = section.save()
    wrong = Section(section.name, 1, lambda: {**fields, "surplus": 1}, section.load)
    source.device.sections = lambda: (wrong, *type(source.device).sections(source.device)[1:])  # type: ignore[method-assign]
    bench = Bench().go(S.RESUMING)
    bench.engine.write(source.go(S.STOP_COPY).save())
    with pytest.raises(DeviceError):
        bench.go(S.STOP)
    assert bench.engine.reason == "section config, field surplus: it is not known here"


@pytest.mark.parametrize("place", ["load", "apply", "adopt", "restored"])
def test_a_model_that_fails_while_it_is_restored_is_as_it_was_before(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = saved(fragile)
    bench = broken(place).go(S.RESUMING)
    bench.engine.write(data)
    with pytest.raises(DeviceError) as caught:
        bench.go(S.RUNNING)
    assert caught.value.errno == (errno.EINVAL if place == "load" else errno.EIO)
    assert bench.engine.state is S.ERROR
    assert f"{place} fails on demand" in bench.engine.reason
    assert f"{place} fails on demand" in caplog.text
    assert not bench.host.running
    expect_kept(bench)
    bench.engine.client_left()
    assert bench.engine.state.name == "RUNNING"


def test_a_model_whose_own_state_cannot_be_kept_is_not_touched() -> None:
    data = saved(fragile)
    bench = broken("save").go(S.RESUMING)
    bench.engine.write(data)
    with pytest.raises(DeviceError, match="save fails on demand"):
        bench.go(S.STOP)
    assert bench.engine.state is S.ERROR
    expect_kept(bench)


def test_tasks_of_before_are_there_again_when_a_restore_fails() -> None:
    class Failing(Scratch):
        fails = 0

        def restored(self) -> None:
            super().restored()
            if self.fails:
                self.fails -= 1
                raise RuntimeError("once")

    bench = Bench(Failing)
    bench.write(DOORBELL, bytes(4))
    assert isinstance(bench.device, Failing)
    bench.device.fails = 1
    bench.go(S.RESUMING).engine.write(saved())
    with pytest.raises(DeviceError):
        bench.go(S.STOP)
    bench.engine.client_left()
    bench.host.resume()
    bench.host.run()
    assert bench.status() == DONE


def test_a_device_that_cannot_go_back_either_is_no_good_until_a_reset(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = saved(fragile)
    bench = broken("restored", times=2).go(S.RESUMING)
    bench.engine.write(data)
    with pytest.raises(DeviceError):
        bench.go(S.STOP)
    assert "cannot go back" in caplog.text
    bench.engine.client_left()
    assert bench.engine.state is S.ERROR, "the next client must not take it for a device that works"
    assert not bench.engine.may_run
    bench.device.reset()
    bench.engine.reset()
    assert bench.engine.state.name == "RUNNING"


@pytest.mark.parametrize("origin", [S.RUNNING, S.RUNNING_P2P, S.STOP, S.PRE_COPY, S.PRE_COPY_P2P])
def test_a_state_that_cannot_be_saved_leaves_the_device_where_it_was(
    origin: MigrationState, caplog: pytest.LogCaptureFixture
) -> None:
    """ "may be the original operating state": it is intact, there is no need for ERROR and a reset."""
    bench = broken("save")
    bench.go(origin)
    running = bench.host.running
    with pytest.raises(DeviceError, match="save fails on demand") as caught:
        bench.go(S.STOP_COPY)
    assert caught.value.errno == errno.EIO
    assert "save fails on demand" in caplog.text
    assert bench.engine.state is origin
    assert bench.host.running == running
    assert bench.engine.saving == (origin in (S.PRE_COPY, S.PRE_COPY_P2P))
    expect_kept(bench)
    bench.go(S.STOP_COPY)
    data = bench.save()
    other = Bench(fragile).go(S.RESUMING)
    other.engine.write(data)
    expect_kept(other.go(S.STOP))


def test_saving_that_fails_on_the_way_from_a_restore_ends_in_stop() -> None:
    bench = Bench(fragile).go(S.RESUMING)
    bench.engine.write(saved(fragile))
    sections = bench.device.sections
    calls = iter(range(10))

    def failing() -> Sequence[Section]:
        if next(calls) == 1:
            raise RuntimeError("the second time, which is for STOP_COPY")
        return sections()

    bench.device.sections = failing  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="STOP to STOP_COPY"):
        bench.go(S.STOP_COPY)
    assert bench.engine.state is S.STOP
    assert not bench.engine.saving
    assert bench.read(0) == b"move"


@pytest.mark.parametrize("state", [S.PRE_COPY, S.STOP_COPY])
def test_a_memory_that_cannot_be_read_fails_the_read(state: MigrationState) -> None:
    bench = broken("take").go(state)
    with pytest.raises(DeviceError, match="take fails on demand") as caught:
        bench.save()
    assert caught.value.errno == errno.EIO
    assert bench.engine.state is state
    bench.go(S.RUNNING)
    expect_kept(bench)


def test_a_memory_that_cannot_be_watched_any_more_or_less_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(fragile)
    (memory,) = bench.device.memories().values()

    def failing() -> None:
        raise RuntimeError("no log")

    memory.stop_log = failing  # type: ignore[method-assign]
    bench.go(S.PRE_COPY, S.RUNNING)
    assert bench.engine.state is S.RUNNING
    assert "failed to stop watching" in caplog.text
    memory.start_log = failing  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="no log"):
        bench.go(S.PRE_COPY)
    assert bench.engine.state is S.RUNNING
    assert bench.host.running


@pytest.mark.parametrize("state", STATES)
def test_a_request_that_leads_nowhere_changes_nothing(state: MigrationState) -> None:
    bench = Bench().go(state)
    running = bench.host.running
    for wanted in (S.ERROR, 8, 0xFFFFFFFF):
        with pytest.raises(DeviceError):
            bench.engine.set_state(wanted)
    assert (bench.engine.state, bench.host.running) == (state, running)


# A model that cannot be moved


def test_a_model_without_a_version_of_its_state_has_no_migration() -> None:
    class Fixed(Scratch):
        state_version = 0

    assert not Bench(Fixed).engine.available
    assert Bench().engine.available


# The way back of a memory that others map


def test_memory_of_before_comes_back_by_copy_where_it_cannot_be_swapped() -> None:
    class Copying(StreamedMemory):
        """As one whose memory a client has mapped: the content moves, the memory stays."""

        def adopt(self, memory: memoryview, used: Ranges | None = None) -> memoryview:
            before = memoryview(bytearray(self.view))
            self.view[:] = memory
            return before

    class Shared(Fragile):
        def memories(self) -> Mapping[str, StateMemory]:
            return {"shared": self.shared}

        def __init__(self, host: FakeHost) -> None:
            self.shared = Copying(host.allocate_memory(SIZE))
            super().__init__(host)

    def make(host: FakeHost) -> Shared:
        return Shared(host)

    data = saved(make)
    bench = Bench(make)
    assert isinstance(bench.device, Shared)
    bench.device.shared.write(0, b"kept")
    bench.device.failures["restored"] = 1
    bench.go(S.RESUMING).engine.write(data)
    with pytest.raises(DeviceError):
        bench.go(S.STOP)
    assert bench.device.shared.read(0, 4) == b"kept"


# What a restore leaves behind


@pytest.fixture
def no_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only counts of references free anything; and pytest keeps no log, nor its tracebacks."""
    for module in ("engine", "restore"):
        monkeypatch.setattr(logging.getLogger(f"vfio_user.server.migration.{module}"), "disabled", True)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[object]]:
    """Every reader and every memory that is staged from now on."""
    made: list[weakref.ref[object]] = []

    def watch(kind: type[object], construct: Callable[[Any, Any], None]) -> None:
        def note(self: Any, argument: Any) -> None:
            construct(self, argument)
            made.append(weakref.ref(self.view.obj if isinstance(self, StagedMemory) else self))

        monkeypatch.setattr(kind, "__init__", note)

    watch(StreamReader, StreamReader.__init__)
    watch(StagedMemory, StagedMemory.__init__)
    return made


def _refused(bench: Bench, data: bytes) -> None:
    with pytest.raises(DeviceError):
        bench.engine.write(data)


def _stopped(bench: Bench) -> None:
    with pytest.raises(DeviceError):
        bench.go(S.STOP)


ENDS: Mapping[str, Callable[[Bench], None]] = {
    "reset": lambda bench: bench.engine.reset(),
    "client left": lambda bench: bench.engine.client_left(),
    "abandoned": lambda bench: bench.engine.abandon(None, S.STOP),
    "too short": _stopped,
    "damaged": lambda bench: _refused(bench, b"\xff" * 64),
}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("cut", [40, 1])
@pytest.mark.parametrize("end", ENDS)
def test_a_restore_that_comes_to_nothing_gives_its_memory_back_at_once(
    end: str, cut: int, staged: list[weakref.ref[object]]
) -> None:
    source = Bench(fragile)
    source.write(4096, b"moved", region=2)
    data = source.go(S.STOP_COPY).save()
    bench = Bench(fragile).go(S.RESUMING)
    bench.engine.write(data[:-cut])
    assert len([made for made in staged if made() is not None]) == 2
    ENDS[end](bench)
    assert [made() for made in staged] == [None, None]


@pytest.mark.usefixtures("no_collector")
def test_a_stream_that_is_refused_within_a_memory_gives_the_memory_back_at_once(
    staged: list[weakref.ref[object]],
) -> None:
    data = bytearray(saved(fragile))
    bench = Bench(fragile).go(S.RESUMING)
    first = data.index(b"bar2") + 4 + 16
    bench.engine.write(data[:first])
    assert len(staged) == 2
    _refused(bench, packed_zero("bar2", SIZE, 4096))
    assert [made() for made in staged] == [None, None]


def packed_zero(name: str, offset: int, length: int) -> bytes:
    head = bytes([3, len(name)]) + bytes(2) + (16).to_bytes(4, "little")
    return head + name.encode() + offset.to_bytes(8, "little") + length.to_bytes(8, "little")


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("place", ["load", "apply", "adopt", "restored"])
def test_a_model_that_refuses_a_state_leaves_nothing_staged(
    place: str, times: int, staged: list[weakref.ref[object]]
) -> None:
    data = saved(fragile)
    bench = broken(place, times).go(S.RESUMING)
    bench.engine.write(data)
    _stopped(bench)
    assert len(staged) == 2
    assert [made() for made in staged] == [None, None]


def test_an_empty_memory_that_was_restored_has_nothing_to_say() -> None:
    make = partial(Scratch, memory=64 << 20)
    source = Bench(make)
    data = source.go(S.STOP_COPY).save()
    bench = Bench(make).go(S.RESUMING)
    bench.engine.write(data)
    bench.go(S.RUNNING, S.PRE_COPY)
    assert bench.engine.pending_bytes < 4096
    bench.go(S.STOP_COPY)
    assert len(bench.save(1 << 20)) == len(data)


def test_a_failed_restore_adds_only_what_it_brought_to_what_is_streamed() -> None:
    data = saved(fragile)
    bench = broken("restored").go(S.RESUMING)
    bench.engine.write(data)
    _stopped(bench)
    expect_kept(bench)
    bench.engine.client_left()
    bench.go(S.RUNNING, S.PRE_COPY)
    assert bench.engine.pending_bytes < 2 * 4096
    assert b"kept" in bench.go(S.STOP_COPY).save()


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
