# SPDX-License-Identifier: BSD-3-Clause
"""The log of large memory: what was written is given once, what was not is not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.device_models.fake_host import FakeMemory
from vfio_user.device_models.regions import StreamedMemory, parse_size
from vfio_user.device_models.state_memory import PAGE

PAGES = 9
SIZE = PAGES * PAGE - 100  # the last page is shorter


def make(size: int) -> StreamedMemory:
    return StreamedMemory(FakeMemory(size))


def taken(memory: StreamedMemory, limit: int = 1 << 20) -> list[tuple[int, int]]:
    ranges = []
    while (found := memory.take(limit)) is not None:
        ranges.append(found)
    return ranges


def test_only_what_was_ever_written_is_streamed_at_first() -> None:
    memory = make(16 * PAGE)
    memory.write(3 * PAGE - 1, b"xx")
    memory.write(15 * PAGE, b"x")
    assert (memory.pending, memory.take(PAGE)) == (0, None)
    memory.start_log()
    assert memory.pending == 3 * PAGE
    assert taken(memory) == [(2 * PAGE, 2 * PAGE), (15 * PAGE, PAGE)]
    assert memory.pending == 0
    memory.write(0, b"")
    memory.write(PAGE, b"y")
    assert taken(memory) == [(PAGE, PAGE)]
    memory.stop_log()
    memory.stop_log()
    memory.write(PAGE, b"y")
    assert taken(memory) == []


def test_a_range_is_no_larger_than_asked_for_but_at_least_a_page() -> None:
    memory = make(SIZE)
    memory.write(0, bytes(SIZE))
    memory.start_log()
    sizes = [memory.take(limit) for limit in (1, PAGE, 3 * PAGE - 1, 1 << 30)]
    end = SIZE - 4 * PAGE
    assert sizes == [(0, PAGE), (PAGE, PAGE), (2 * PAGE, 2 * PAGE), (4 * PAGE, end)]


def test_a_place_that_is_written_all_the_time_starves_no_other() -> None:
    memory = make(4 * PAGE)
    memory.start_log()
    memory.write(2 * PAGE, b"x")
    seen = set()
    for _ in range(3):
        memory.write(0, b"x")
        found = memory.take(PAGE)
        assert found is not None
        seen.add(found[0])
    assert seen == {0, 2 * PAGE}


def test_a_reset_while_streaming_is_streamed_as_zeros_and_forgotten_later() -> None:
    memory = make(4 * PAGE)
    memory.write(PAGE, b"secret")
    memory.start_log()
    assert taken(memory) == [(PAGE, PAGE)]
    memory.reset()
    assert memory.read(PAGE, 6) == bytes(6)
    assert taken(memory) == [(PAGE, PAGE)]
    memory.stop_log()
    memory.reset()
    memory.start_log()
    assert taken(memory) == []


def test_adopted_memory_takes_the_place_without_a_copy() -> None:
    memory = make(2 * PAGE)
    memory.write(0, b"old")
    new = bytearray(2 * PAGE)
    new[5] = 7
    before = memory.adopt(memoryview(new))
    assert (bytes(before[:3]), memory.read(5, 1)) == (b"old", b"\x07")
    memory.write(0, b"x")
    assert new[0] == ord("x")
    memory.start_log()
    assert taken(memory) == [(0, 2 * PAGE)]
    memory.adopt(before)
    assert memory.read(0, 3) == b"old"


def test_adopted_memory_counts_as_written_where_it_is_said_to_be_and_where_the_old_was() -> None:
    memory = make(6 * PAGE)
    memory.write(0, b"old")
    memory.start_log()
    assert taken(memory) == [(0, PAGE)]
    new = bytearray(6 * PAGE)
    new[2 * PAGE] = new[3 * PAGE] = new[5 * PAGE] = 1
    memory.adopt(memoryview(new), [(2 * PAGE, 2 * PAGE), (5 * PAGE, PAGE)])
    # Page 0 was sent, and is zero now: a copy of it has to be told.
    assert sorted(taken(memory)) == [(0, PAGE), (2 * PAGE, 2 * PAGE), (5 * PAGE, PAGE)]
    memory.stop_log()
    memory.reset()
    assert not any(new)


def test_memory_that_does_not_fit_is_not_adopted() -> None:
    memory = make(PAGE)
    for wrong in (memoryview(bytes(PAGE)), memoryview(bytearray(PAGE + 1))):
        with pytest.raises(ValueError, match="cannot take the place"):
            memory.adopt(wrong)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, SIZE - 1), st.integers(1, 3 * PAGE)),
            st.tuples(st.just("take"), st.integers(0, 4 * PAGE), st.just(0)),
            st.tuples(st.just("reset"), st.just(0), st.just(0)),
        ),
        max_size=30,
    )
)
def test_copying_what_is_given_makes_an_equal_memory(actions: list[tuple[str, int, int]]) -> None:
    """At any moment: what was copied, and what is still to be given, are all of it."""
    memory, copy = make(SIZE), bytearray(SIZE)
    memory.write(PAGE, b"before")
    memory.start_log()

    def fetch(limit: int) -> bool:
        found = memory.take(limit)
        if found is not None:
            offset, length = found
            assert 0 < length <= max(limit, PAGE)
            copy[offset : offset + length] = memory.view[offset : offset + length]
        return found is not None

    for count, (name, first, second) in enumerate(actions):
        if name == "write":
            memory.write(first, bytes([count + 1]) * min(second, SIZE - first))
        elif name == "take":
            fetch(first)
        else:
            memory.reset()
    while fetch(1 << 20):
        pass
    assert copy == memory.view
    assert memory.pending == 0


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("4K", 4096), ("65536", 65536), ("1M", 1 << 20), ("1G", 1 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1", "2048", "3M", "2G", "-4K", "4k", "4 K", "1T", "1e6", "9" * 5000])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="from 4K to 1G"):
        parse_size(text)
