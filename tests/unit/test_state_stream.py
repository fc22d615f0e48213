# SPDX-License-Identifier: BSD-3-Clause
"""The state stream: what is written is read again in any pieces, and whatever else comes is refused whole."""

import itertools
import json
import struct
import time
from collections.abc import Iterator, Sequence

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.device_models.device import Device
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.regions import Buffer, StreamedMemory
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import StateError, save_sections
from vfio_user.server.migration.reader import Staged, StreamReader
from vfio_user.server.migration.staging import StagedMemory
from vfio_user.server.migration.stream import BLOCK, MAX_SECTION, Shape
from vfio_user.server.migration.writer import StreamWriter
from vfio_user.server.shared_memory import MemfdMemory

SECTION, MEMORY, ZERO, END = 1, 2, 3, 4
Record = tuple[int, str, int, bytes]
SIZE = 4 << 20
"""Bytes of the device's memory."""


def make(memory: int = SIZE) -> Scratch:
    device = Scratch(FakeHost(), memory=memory)
    device.reset()
    return device


def fill(device: Device) -> None:
    """Something to tell: words, and three places in the memory, of which one crosses a block."""
    device.regions[0].write(0, b"words")
    for offset in (0, BLOCK - 10, SIZE - 8192):
        device.regions[2].write(offset, b"\xa5" * 5000)


def save(device: Device, *sizes: int) -> bytes:
    """The whole stream, read in pieces of these sizes and the rest at once."""
    writer = StreamWriter(device)
    writer.finish()
    data = b"".join(bytes(piece) for size in (*sizes, 1 << 40) for piece in writer.take(size))
    assert writer.pending == 0
    writer.close()
    return data


def restore(data: bytes, device: Device, sizes: Sequence[int] = ()) -> Staged:
    reader = StreamReader(Shape.of(device))
    for size in sizes:
        reader.feed(data[:size])
        data = data[size:]
    reader.feed(data)
    return reader.finish()


def test_staged_memory_says_where_it_may_differ_from_zero() -> None:
    memory = StagedMemory(6 * 4096 - 100)
    memory.take(4095, 2)[:] = b"ab"
    memory.take(3 * 4096, 1)[:] = b"c"
    memory.take(5 * 4096, 1)[:] = b"d"
    memory.clear(3 * 4096, 4096)
    assert list(memory.used()) == [(0, 2 * 4096), (5 * 4096, 4096 - 100)]


def test_a_reader_that_is_closed_takes_nothing_more() -> None:
    reader = StreamReader(Shape.of(make()))
    reader.close()
    reader.close()
    for call in (lambda: reader.feed(b"v"), reader.finish):
        with pytest.raises(StateError, match="closed"):
            call()


def refusal(data: bytes, device: Device) -> StateError:
    with pytest.raises(StateError) as caught:
        restore(data, device)
    return caught.value


@pytest.fixture(scope="module")
def device() -> Scratch:
    made = make()
    fill(made)
    return made


@pytest.fixture(scope="module")
def data(device: Scratch) -> bytes:
    return save(device)


@pytest.fixture(scope="module")
def small() -> bytes:
    return save(make(memory=0))


# By hand, from the description of the format: an oracle beside the code


def header(model: bytes = b"scratch", version: int = 1, magic: bytes = b"vfiouser", **other: int) -> bytes:
    numbers = other.get("format", 1), other.get("flags", 0), version, len(model)
    return struct.pack("<8sHHHB", magic, *numbers) + model


def packed(record: Record) -> bytes:
    kind, name, version, payload = record
    return struct.pack("<BBHI", kind, len(name.encode()), version, len(payload)) + name.encode() + payload


def assembled(records: Sequence[Record], head: bytes = header(), count: int | None = None) -> bytes:
    """A stream of these records with an end that fits them."""
    body = head + b"".join(map(packed, records))
    body += struct.pack("<BBHIQ", END, 0, 0, 24, len(records) if count is None else count)
    return body + xxhash.xxh3_128(body).digest()


def taken_apart(data: bytes) -> list[Record]:
    """The records before the end."""

    def records() -> Iterator[Record]:
        place = 15 + data[14]
        while data[place] != END:
            kind, name_length, version, length = struct.unpack_from("<BBHI", data, place)
            name = data[place + 8 : place + 8 + name_length].decode()
            place += 8 + name_length + length
            yield kind, name, version, data[place - length : place]

    return list(records())


def sections(data: bytes) -> list[Record]:
    return [record for record in taken_apart(data) if record[0] == SECTION]


def memory(offset: int, content: bytes) -> Record:
    return MEMORY, "bar2", 0, struct.pack("<Q", offset) + content


def zero(offset: int, length: int, name: str = "bar2") -> Record:
    return ZERO, name, 0, struct.pack("<QQ", offset, length)


# Written and read


def test_the_bytes_are_those_of_the_description(data: bytes) -> None:
    assert assembled(taken_apart(data)) == data


def test_what_was_saved_arrives(device: Scratch, data: bytes) -> None:
    staged = restore(data, device)
    assert staged.sections == save_sections(device.sections())
    assert bytes(staged.memories["bar2"]) == bytes(device.memories()["bar2"].view)


def test_nothing_is_said_of_memory_that_was_never_written(data: bytes) -> None:
    written = [record for record in taken_apart(data) if record[0] == MEMORY]
    assert [struct.unpack_from("<Q", payload)[0] for _, _, _, payload in written] == [
        0,
        BLOCK - 4096,
        SIZE - 8192,
    ]
    assert len(data) < 64 << 10


def test_zeros_that_were_written_are_said_shortly(device: Scratch) -> None:
    other = make()
    other.regions[2].write(BLOCK, bytes(BLOCK))
    records = taken_apart(save(other))
    assert [record for record in records if record[1] == "bar2"] == [zero(0, SIZE), zero(BLOCK, BLOCK)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40_000), max_size=8), st.lists(st.integers(0, 40_000), max_size=8))
def test_borders_mean_nothing(written: list[int], read: list[int]) -> None:
    device = make()
    fill(device)
    data = save(device, *written)
    assert data == save(device)
    assert bytes(restore(data, make(), read).memories["bar2"]) == bytes(device.memories()["bar2"].view)


def test_byte_by_byte(small: bytes) -> None:
    device = make(memory=0)
    assert restore(small, device, [1] * len(small)) == restore(small, device)


def test_take_gives_exactly_what_is_asked_for_until_the_end(device: Scratch, data: bytes) -> None:
    writer = StreamWriter(device)
    writer.finish()
    total = 0
    while piece := b"".join(map(bytes, writer.take(1000))):
        total += len(piece)
        assert len(piece) == 1000 or total == len(data)
    assert total == len(data)
    assert writer.take(1) == []
    writer.close()


# Pre-copy: memories while the device runs


def test_pre_copy_sends_memory_first_and_then_what_has_changed() -> None:
    device = make()
    fill(device)
    writer = StreamWriter(device)
    first = b"".join(map(bytes, writer.take(1 << 40)))
    assert writer.pending == 0
    assert writer.take(1 << 20) == []
    device.regions[2].write(2 * BLOCK, b"late")
    assert writer.pending == 4096
    device.regions[0].write(0, b"later")
    writer.finish()
    rest = b"".join(map(bytes, writer.take(1 << 40)))
    writer.close()
    staged = restore(first + rest, make())
    assert bytes(staged.memories["bar2"]) == bytes(device.memories()["bar2"].view)
    assert staged.sections == save_sections(device.sections())
    assert len(rest) < 20_000


def test_pre_copy_gives_copies_that_the_device_does_not_change_any_more() -> None:
    device = make()
    device.regions[2].write(0, b"\1" * 4096)
    writer = StreamWriter(device)
    pieces = writer.take(1 << 20)
    before = b"".join(map(bytes, pieces))
    device.regions[2].write(0, b"\2" * 4096)
    assert b"".join(map(bytes, pieces)) == before
    writer.finish()
    rest = b"".join(map(bytes, writer.take(1 << 20)))
    writer.close()
    assert bytes(restore(before + rest, make()).memories["bar2"][:4096]) == b"\2" * 4096


WIDE = 16 << 20


@pytest.mark.parametrize("finishing", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("every", [1, 2], ids=["all of it", "every second page"])
def test_zeros_are_not_looked_through_in_one_go(every: int, finishing: bool) -> None:
    """Whoever fills a large memory with zeros holds up the loop for no longer than others: a read gives up
    looking, and sends what is left of it as it is. It is short only where there is nothing more."""
    device = make(WIDE)
    for page in range(0, WIDE, 4096 * every):
        device.regions[2].write(page, bytes(4096))
    writer = StreamWriter(device)
    if finishing:
        writer.finish()
    pending, pieces = device.memories()["bar2"].pending, []
    while len(data := b"".join(map(bytes, writer.take(BLOCK)))) == BLOCK:
        pieces.append(data)
        looked_at = pending - device.memories()["bar2"].pending
        assert looked_at <= (7 << 20 if every == 1 else 5 << 20)
        pending -= looked_at
        assert writer.pending
    assert not writer.pending
    assert len(pieces) > 2
    writer.finish()
    rest = b"".join(map(bytes, writer.take(1 << 40)))
    writer.close()
    staged = restore(b"".join(pieces) + data + rest, make(WIDE))
    assert bytes(staged.memories["bar2"]) == bytes(WIDE)


def test_a_page_that_changes_in_the_middle_of_a_record_is_sent_again() -> None:
    device = make()
    device.regions[2].write(0, b"\1" * 8192)
    writer = StreamWriter(device)
    data = b"".join(map(bytes, writer.take(5000)))
    device.regions[2].write(4096, b"\3")
    writer.finish()
    data += b"".join(map(bytes, writer.take(1 << 20)))
    writer.close()
    assert bytes(restore(data, make()).memories["bar2"][:8192]) == b"\1" * 4096 + b"\3" + b"\1" * 4095


def test_what_late_replies_change_is_in_the_stream() -> None:
    """Tasks take note of replies before the sections are saved: in registers, and in the memory too."""
    device = make()
    device.regions[2].write(0, b"early")
    replies = [b"late"]

    def settle() -> None:
        while replies:
            device.regions[0].write(0, b"note")
            device.regions[2].write(2 * BLOCK, replies.pop())

    writer = StreamWriter(device, settle)
    writer.finish()
    data = b"".join(map(bytes, writer.take(1 << 20)))
    assert writer.pending == 0
    writer.close()
    staged = restore(data, make())
    assert staged.sections == save_sections(device.sections())
    assert bytes(staged.memories["bar2"][2 * BLOCK : 2 * BLOCK + 4]) == b"late"


def test_the_memory_is_not_watched_after_the_session() -> None:
    device = make()
    writer = StreamWriter(device)
    device.regions[2].write(0, b"x")
    assert device.memories()["bar2"].pending
    writer.close()
    assert not device.memories()["bar2"].pending


def test_memory_can_be_closed_after_the_session_although_somebody_keeps_its_failure() -> None:
    """As a log does that keeps the traceback: a server that ends closes the memory of its device."""
    shared = MemfdMemory(SIZE)
    device = make()
    device.regions[2] = memory = StreamedMemory(shared)  # type: ignore[index]
    device.memories = lambda: {"bar2": memory}  # type: ignore[method-assign]
    memory.write(0, b"\1" * SIZE)
    writer = StreamWriter(device)
    writer.finish()
    writer.take(5000)
    device.sections = lambda: 1 // 0  # type: ignore
    with pytest.raises(ZeroDivisionError) as kept:
        writer.take(1 << 40)
    writer.close()
    shared.close()
    assert kept.value.__traceback__


def test_saving_reads_the_memory_and_does_not_copy_it() -> None:
    device = make()
    device.regions[2].write(0, b"\1" * SIZE)
    writer = StreamWriter(device)
    writer.finish()
    view = device.memories()["bar2"].view
    pieces: list[Buffer] = []
    while taken := writer.take(BLOCK):
        pieces += taken
    seen = [piece for piece in pieces if isinstance(piece, memoryview) and piece.obj is view.obj]
    assert sum(map(len, seen)) >= SIZE - BLOCK  # the last may be copied: see the next test
    writer.close()


def test_what_waits_to_be_sent_stays_as_it_was_counted() -> None:
    """A late reply changes memory that is in the stream already: the old goes, and then the new."""
    device = make()
    device.regions[2].write(0, b"\1" * (BLOCK // 2))
    replies = [b"late"]

    def settle() -> None:
        while replies:
            device.regions[2].write(70_000, replies.pop())

    writer = StreamWriter(device, settle)
    writer.finish()
    data = b"".join(map(bytes, writer.take(1 << 20)))
    writer.close()
    staged = restore(data, make())
    assert bytes(staged.memories["bar2"][70_000:70_005]) == b"late\1"


def test_what_is_made_ready_beforehand_makes_no_difference() -> None:
    device = make()
    device.regions[2].write(0, b"\1" * SIZE)
    expected, pieces = save(device), []
    writer = StreamWriter(device)
    writer.finish()
    while True:
        writer.prepare()
        writer.prepare()
        assert writer._queued < 2 * BLOCK + 1000
        taken = b"".join(map(bytes, writer.take(100_000)))
        pieces.append(taken)
        if len(taken) < 100_000:
            break
    writer.close()
    assert b"".join(pieces) == expected


def test_what_fails_while_it_is_made_ready_is_told_to_who_reads() -> None:
    device = make()
    device.regions[2].write(0, b"\1" * SIZE)
    writer = StreamWriter(device)
    writer.finish()
    memory = device.memories()["bar2"]
    take = memory.take

    def fail(limit: int) -> tuple[int, int] | None:
        memory.take = take  # type: ignore[method-assign]
        raise RuntimeError("not now")

    memory.take = fail  # type: ignore[method-assign]
    writer.prepare()
    writer.prepare()
    with pytest.raises(RuntimeError, match="not now"):
        writer.take(100)
    data = b"".join(map(bytes, writer.take(1 << 40)))  # and then it goes on
    writer.close()
    assert bytes(restore(data, make()).memories["bar2"]) == b"\1" * SIZE


# A model that saves what cannot be restored is found out at the source


# Streams that are not whole


def test_every_end_that_comes_too_early_is_found(small: bytes) -> None:
    device = make(memory=0)
    for length in {*range(200), *range(200, len(small), 41), *range(len(small) - 100, len(small))}:
        reader = StreamReader(Shape.of(device))
        reader.feed(small[:length])
        with pytest.raises(StateError, match=f"ends after {length} bytes, in "):
            reader.finish()


def test_the_reason_names_where_it_ends(data: bytes, device: Scratch) -> None:
    assert "in the header" in refusal(b"", device).reason
    assert "in record 0, bar2" in refusal(data[:35], device).reason
    assert "the end" in refusal(data[:-1], device).reason


def test_every_damaged_byte_is_found(small: bytes) -> None:
    """Not quite every one: the text of a section is long, and all of it alike."""
    device = make(memory=0)
    for place in {*range(200), *range(200, len(small), 41), *range(len(small) - 100, len(small))}:
        damaged = bytearray(small)
        damaged[place] ^= 1 << place % 8
        refusal(bytes(damaged), device)


def test_data_after_the_end(small: bytes) -> None:
    device = make(memory=0)
    assert "1 bytes follow the end" in refusal(small + b"\0", device).reason
    reader = StreamReader(Shape.of(device))
    reader.feed(small)
    reader.feed(b"")
    with pytest.raises(StateError, match="follow the end"):
        reader.feed(small)


def test_a_refused_reader_stays_refused(small: bytes) -> None:
    reader = StreamReader(Shape.of(make(memory=0)))
    with pytest.raises(StateError, match="no saved state") as first:
        reader.feed(b"x" * 100)
    for again in (lambda: reader.feed(small), lambda: reader.feed(b""), reader.finish):
        with pytest.raises(StateError) as later:
            again()
        assert later.value is first.value


# Streams of something else


@pytest.mark.parametrize(
    ("head", "field", "reason"),
    [
        (header(magic=b"QEVM\0\0\0\3"), "magic", "no saved state"),
        (header(format=2), "format", "version 2, known is 1"),
        (header(format=0), "format", "version 0"),
        (header(flags=1), "flags", "0x1 is not known"),
        (header(model=b"e1000"), "model", "of e1000, not of scratch"),
        (header(model=b""), "model", "not of scratch"),
        (header(model=b"scratch\0"), "model", "not of scratch"),
        (header(model=b"\xff\xfe"), "model", "not of scratch"),
        (header(version=2), "version", "2 is not one of those known, 1 to 1"),
        (header(version=0), "version", "0 is not one"),
    ],
)
def test_a_header_that_does_not_fit(small: bytes, head: bytes, field: str, reason: str) -> None:
    error = refusal(assembled(sections(small), head), make(memory=0))
    assert error.field == field
    assert reason in error.reason


def test_another_size_of_memory(data: bytes, small: bytes) -> None:
    error = refusal(data, make(memory=2 * SIZE))
    assert (error.section, error.field) == ("bar2", "size")
    assert "no such memory" in refusal(data, make(memory=0)).reason
    error = refusal(small, make())
    assert (error.section, error.reason) == ("bar2", "the memory is missing")


def test_records_that_were_reordered_are_found(data: bytes, device: Scratch) -> None:
    """Every exchange of two neighbours, as it would come from a carrier that mixes up its pieces."""
    records = taken_apart(data)
    digest = data[-16:]
    for place in range(len(records) - 1):
        mixed = [*records]
        mixed[place], mixed[place + 1] = mixed[place + 1], mixed[place]
        refusal(assembled(mixed)[:-16] + digest, device)


def test_a_record_that_was_replayed_or_lost_is_found(data: bytes, device: Scratch) -> None:
    records, end = taken_apart(data), data[-48:]
    for place, record in enumerate(records):
        for wrong in ([*records[:place], record, *records[place:]], records[:place] + records[place + 1 :]):
            refusal(header() + b"".join(map(packed, wrong)) + end, device)


def test_a_section_may_come_anywhere_between_memories(data: bytes, device: Scratch) -> None:
    """The order of records is the writer's: only that of records of one memory means something."""
    parts = [record for record in taken_apart(data) if record[0] != SECTION]
    staged = restore(assembled([*sections(data)[::-1], *parts]), device)
    assert staged.sections == save_sections(device.sections())
    assert bytes(staged.memories["bar2"]) == bytes(device.memories()["bar2"].view)


# Hostile records, in streams whose digest is right


def hostile(small: bytes) -> Iterator[tuple[Record, str, str]]:
    _, name, version, payload = sections(small)[0]
    yield (0, name, version, payload), name, "no record of kind 0"
    yield (5, "", 0, b""), "", "no record of kind 5"
    yield (255, "x" * 255, 65535, b""), "x" * 255, "no record of kind 255"
    yield (SECTION, "other", 1, b"{}"), "other", "no such section"
    yield (SECTION, "", 1, b"{}"), "", "no such section"
    yield (SECTION, "é", 1, b"{}"), "\\xc3\\xa9", "no such section"
    yield (SECTION, "a\n", 1, b"{}"), "'a\\n'", "no such section"
    yield (SECTION, name, version, payload), name, "it is there twice"
    yield (ZERO, "bar9", 0, struct.pack("<QQ", 0, SIZE)), "bar9", "no such memory"
    yield (MEMORY, "bar9", 0, struct.pack("<Q", 0) + b"x"), "bar9", "nothing has said"


def test_records_that_do_not_belong_here(small: bytes) -> None:
    for record, name, reason in hostile(small):
        error = refusal(assembled([*sections(small), record]), make(memory=0))
        assert (error.section, reason in error.reason) == (name, True), error


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (zero(0, SIZE), "offset"),
        (zero(SIZE - 1, 2), "offset"),
        (zero(SIZE, 1), "offset"),
        (zero(0, 0), "offset"),
        (zero((1 << 64) - 1, 1), "offset"),
        (zero(1, (1 << 64) - 1), "offset"),
        (zero(0, BLOCK + 1), "offset"),
        (memory(SIZE, b"x"), "offset"),
        (memory(SIZE - 1, b"xy"), "offset"),
        (memory((1 << 64) - 1, b"xy"), "offset"),
        (memory(0, b""), "length"),
        (memory(0, bytes(BLOCK + 1)), "length"),
        ((MEMORY, "bar2", 0, b"short"), "length"),
        ((MEMORY, "bar2", 1, bytes(9)), "version"),
        ((ZERO, "bar2", 0, bytes(15)), "length"),
        ((ZERO, "bar2", 0, bytes(17)), "length"),
        ((ZERO, "bar2", 9, bytes(16)), "version"),
    ],
)
def test_a_record_that_leaves_its_memory(data: bytes, record: Record, field: str) -> None:
    error = refusal(assembled([*taken_apart(data), record]), make())
    assert (error.section, error.field) == ("bar2", field)


@pytest.mark.parametrize("first", [zero(0, SIZE - 1), zero(1, SIZE), zero(0, SIZE + 1), zero(0, 0)])
def test_a_memory_is_opened_at_its_size_and_no_other(first: Record) -> None:
    assert refusal(assembled([first]), make()).field == "size"


def test_what_is_announced_takes_no_memory(data: bytes) -> None:
    """A head of a record that promises 4 GiB is refused before a byte of it is taken."""
    for kind, name in ((SECTION, "config"), (MEMORY, "bar2"), (ZERO, "bar2"), (END, "")):
        reader = StreamReader(Shape.of(make()))
        reader.feed(header() + packed(zero(0, SIZE)))
        with pytest.raises(StateError):
            reader.feed(struct.pack("<BBHI", kind, len(name), 0, 0xFFFFFFFF) + name.encode())


def test_a_count_that_is_wrong(small: bytes) -> None:
    records = sections(small)
    for count in (0, len(records) - 1, len(records) + 1, (1 << 64) - 1):
        error = refusal(assembled(records, count=count), make(memory=0))
        assert (error.field, f"counts {count} records" in error.reason) == ("end", True)


@pytest.mark.parametrize(("name", "version"), [("x", 0), ("", 1)])
def test_an_end_with_something_on_it(small: bytes, name: str, version: int) -> None:
    start = header() + b"".join(map(packed, sections(small)))
    assert refusal(start + packed((END, name, version, bytes(24))), make(memory=0)).field == "end"


def test_fields_that_are_not_as_they_should_be() -> None:
    error = refusal(assembled([(SECTION, "config", 1, b'{"a": 1}')]), make(memory=0))
    assert (error.section, "shortest form" in error.reason) == ("config", True)


def test_a_section_that_is_too_long() -> None:
    payload = json.dumps({"a": "x" * MAX_SECTION}).encode()
    assert "at most" in refusal(assembled([(SECTION, "config", 1, payload)]), make(memory=0)).reason


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_anything_may_come(noise: bytes, place: int) -> None:
    """Only StateError, whatever is put where: into a stream, and after a header."""
    small = save(make(memory=0))
    for data in (small[:place] + noise + small[place:], header() + noise, noise):
        reader = StreamReader(Shape.of(make(memory=0)))
        try:
            reader.feed(data)
            reader.finish()
        except StateError:
            continue
        assert data == small


def seconds(records: Sequence[Record], times: int) -> float:
    """Of this process's time, to take the records over and over, after a memory was opened and filled."""
    reader = StreamReader(Shape.of(make()))
    filled = [memory(place, b"\xa5" * BLOCK) for place in range(0, SIZE, BLOCK)]
    reader.feed(header() + b"".join(map(packed, [zero(0, SIZE), *filled])))
    again = b"".join(map(packed, records)) * times
    begun = time.process_time()
    reader.feed(again)
    return time.process_time() - begun


def test_few_bytes_do_not_make_much_work() -> None:
    """A record of 28 bytes can speak of a megabyte of zeros: said again and again it must cost no more than
    one of a page. (Done literally, this is 100 times as much.)"""
    large, small = [zero(BLOCK, BLOCK)], [zero(BLOCK, 4096)]
    assert min(seconds(large, 2000) for _ in range(3)) < 5 * min(seconds(small, 2000) for _ in range(3))
    # Nor where each is preceded by a byte that makes a page of it worth looking at.
    assert min(seconds([memory(BLOCK, b"x"), *large], 2000) for _ in range(3)) < 5 * min(
        seconds([memory(BLOCK, b"x"), *small], 2000) for _ in range(3)
    )


LITTLE = 6 * 4096 - 100
places = st.integers(0, LITTLE - 1) | st.sampled_from([0, 4095, 4096, 8192, LITTLE - 1])
lengths = st.integers(1, 3 * 4096) | st.sampled_from([1, 4096, 8192])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), places, lengths), max_size=12), st.sampled_from([7, 500, 1 << 20]))
def test_memory_is_what_the_last_records_said(writes: list[tuple[bool, int, int]], size: int) -> None:
    """Zeros where nothing is, over what is, over a part of a page: as if each had been written out. In small
    pieces and at once, which goes another way."""
    expected, records = bytearray(LITTLE), [zero(0, LITTLE)]
    for number, (zeros, offset, length) in enumerate(writes, 1):
        length = min(length, LITTLE - offset)
        data = bytes(length) if zeros else bytes([number]) * length
        expected[offset : offset + length] = data
        records.append(zero(offset, length) if zeros else memory(offset, data))
    reader = StreamReader(Shape("scratch", 1, {}, {"bar2": LITTLE}))
    data = assembled(records)
    for place in range(0, len(data), size):
        reader.feed(data[place : place + size])
    assert bytes(reader.finish().memories["bar2"]) == expected


def test_the_device_is_not_touched_by_what_is_staged(data: bytes) -> None:
    device = make()
    before = save(device)
    restore(data, device)
    for wrong in (data[:-1] + b"\0", data + b"\0"):
        refusal(wrong, device)
    assert save(device) == before


def test_later_records_replace_earlier_ones() -> None:
    device = make()
    records = [zero(0, SIZE), memory(0, b"abcdef"), zero(1, 2), memory(4, b"EF"), memory(5, b"X")]
    staged = restore(assembled(records), device)
    assert bytes(staged.memories["bar2"][:8]) == b"a\0\0dEX\0\0"
    assert list(itertools.islice(staged.sections, 1)) == []
