# SPDX-License-Identifier: BSD-3-Clause
"""Sections and their reader: what is taken, what is refused, and how old versions get in."""

from collections.abc import Callable
from typing import Any

import pytest

from vfio_user.device_models.state import (
    LONGEST_TIME,
    U64,
    Apply,
    Fields,
    Reader,
    Section,
    StateError,
    counted,
    load_sections,
    save_sections,
    time_left,
)


def test_an_error_says_where() -> None:
    texts = [str(StateError(*where, "why")) for where in (("s", "f"), ("s", ""), ("", ""))]
    assert texts == ["section s, field f: why", "section s: why", "why"]


def test_what_a_reader_takes() -> None:
    reader = Reader(
        "s",
        {
            **{"number": 7, "negative": -1, "no number": None, "flag": True, "nothing": None, "data": "00ff"},
            **{"numbers": [1, 2], "pieces": ["", "01"], "inner": {"x": 1}, "many": [{"y": 2}], "none": None},
        },
    )
    assert (reader.integer("number", 7, 7), reader.integer("negative", 0, -1)) == (7, -1)
    assert reader.maybe_integer("no number", 1) is None
    assert reader.flag("flag") is True
    reader.null("nothing")
    assert reader.data("data", 2) == b"\x00\xff"
    assert reader.integers("numbers", 2, 2) == [1, 2]
    assert reader.data_list("pieces", 2, 1) == [b"", b"\x01"]
    assert reader.record("inner").integer("x", 1) == 1
    assert [inner.integer("y", 2) for inner in reader.records("many", 1)] == [2]
    assert reader.maybe_record("none") is None
    reader.finish()


WRONG: list[tuple[Any, Callable[[Reader], object], str]] = [
    (1, lambda r: r.integer("x", 0), "1 is not from 0 to 0"),
    (-1, lambda r: r.integer("x", 5), "-1 is not from 0 to 5"),
    (1 << 3000, lambda r: r.integer("x", 5), "a number of 3001 bits is not from 0 to 5"),
    (True, lambda r: r.integer("x", 5), "a number is wanted, not true or false"),
    (None, lambda r: r.integer("x", 5), "a number is wanted, not null"),
    ("1", lambda r: r.maybe_integer("x", 5), "a number is wanted, not text"),
    (1, lambda r: r.flag("x"), "true or false is wanted, not a number"),
    (1, lambda r: r.null("x"), "null is wanted, not a number"),
    (1, lambda r: r.data("x", 1), "hexadecimal text is wanted, not a number"),
    ("00", lambda r: r.data("x", 2), "1 bytes, where 2 are wanted"),
    ("000000", lambda r: r.data("x", 2, 1), "3 bytes, where 1 to 2 are wanted"),
    ("000", lambda r: r.data("x", 2, 1), "not hexadecimal text in lower case"),
    ("0 00", lambda r: r.data("x", 2), "not hexadecimal text in lower case"),
    ("FF", lambda r: r.data("x", 1), "not hexadecimal text in lower case"),
    ("\u0660\u0660", lambda r: r.data("x", 1), "not hexadecimal text in lower case"),
    ({}, lambda r: r.integers("x", 1, 1), "a list is wanted, not an object"),
    ([1], lambda r: r.integers("x", 1, 2), "1 elements, where 2 are wanted"),
    ([], lambda r: r.integers("x", 1, 2, 1), "0 elements, where 1 to 2 are wanted"),
    ([1, 2], lambda r: r.integers("x", 1, 2), "field x[1]: 2 is not from 0 to 1"),
    (["00", "zz"], lambda r: r.data_list("x", 2, 1), "field x[1]: it is not hexadecimal"),
    ([], lambda r: r.record("x"), "an object is wanted, not a list"),
    ([{}, 1], lambda r: r.records("x", 2), "field x[1]: an object is wanted, not a number"),
    ({"y": {"z": 3}}, lambda r: r.record("x").record("y").integer("z", 2), "field x.y.z: 3 is not"),
    ({"y": 0}, lambda r: r.record("x").integer("z", 2), "field x.z: it is missing"),
    (0, lambda r: r.integer("y", 2), "field y: it is missing"),
]


@pytest.mark.parametrize(("value", "take", "text"), WRONG, ids=[text for _, _, text in WRONG])
def test_what_a_reader_refuses(value: Any, take: Callable[[Reader], object], text: str) -> None:
    with pytest.raises(StateError) as found:
        take(Reader("s", {"x": value}))
    assert text in str(found.value)
    assert str(found.value).startswith("section s, field ")


def test_what_nobody_has_asked_for_is_refused_at_any_depth() -> None:
    cases: list[tuple[Fields, Callable[[Reader], object], str]] = [
        ({"x": 1}, lambda reader: None, "x"),
        ({"in": {"y": 1}}, lambda reader: reader.record("in"), "in.y"),
        ({"in": [{"z": 1}]}, lambda reader: reader.records("in", 1), "in[0].z"),
    ]
    for fields, take, name in cases:
        reader = Reader("s", fields)
        take(reader)
        with pytest.raises(StateError, match="not known here") as found:
            reader.finish()
        assert found.value.field == name


def test_a_hostile_name_does_not_get_into_the_message_as_it_is() -> None:
    for name in ("\x1b[2J" * 3, "x" * 5000):
        with pytest.raises(StateError) as found:
            Reader("s", {name: 1}).finish()
        assert len(str(found.value)) < 120
        assert str(found.value).isprintable()


class Counter:
    """A device with one number, known by two names in its time, and since version 3 a second one."""

    def __init__(self) -> None:
        self.number = self.limit = 0

    def section(self) -> Section:
        upgrades = {1: lambda old: {"number": old["count"]}, 2: lambda old: {**old, "limit": 99}}
        return Section("counter", 3, self._save, self._load, upgrades)

    def _save(self) -> Fields:
        return {"number": self.number, "limit": self.limit}

    def _load(self, reader: Reader) -> Apply:
        number, limit = reader.integer("number", 1000), reader.integer("limit", 1000)

        def apply() -> None:
            self.number, self.limit = number, limit

        return apply


@pytest.mark.parametrize(
    ("version", "fields", "expected"),
    [
        (3, {"number": 5, "limit": 7}, (5, 7)),
        (2, {"number": 5}, (5, 99)),
        (1, {"count": 5}, (5, 99)),
    ],
)
def test_versions_up_to_todays_load(version: int, fields: Fields, expected: tuple[int, int]) -> None:
    counter = Counter()
    before = dict(fields)
    apply = counter.section().prepare(version, fields)
    assert (counter.number, fields) == (0, before)
    apply()
    assert (counter.number, counter.limit) == expected
    assert save_sections([counter.section()]) == {
        "counter": (3, {"number": expected[0], "limit": expected[1]})
    }


@pytest.mark.parametrize(
    ("version", "fields", "text"),
    [
        (4, {}, "version 4 is newer than 3, the one known"),
        (0, {}, "the section is missing"),
        (-5, {}, "version -5 is too old"),
        (1, {}, "cannot be loaded: KeyError"),
        (1, {"count": []}, "field number: a number is wanted"),
        (2, {"number": 5, "other": 1}, "field other: it is not known"),
    ],
)
def test_versions_that_do_not_load(version: int, fields: Fields, text: str) -> None:
    with pytest.raises(StateError) as found:
        Counter().section().prepare(version, fields)
    assert text in str(found.value)
    assert found.value.section == "counter"


def test_a_section_that_came_later_may_say_what_it_was_before() -> None:
    def load(reader: Reader) -> Apply:
        seen.append(reader.integer("x", 9))
        return lambda: None

    seen: list[int] = []
    section = Section("later", 1, lambda: {"x": 0}, load, {0: lambda _: {"x": 4}})
    load_sections([section], {})
    assert seen == [4]


def test_nothing_is_applied_before_everything_was_checked() -> None:
    first, second = Counter(), Counter()
    sections = [first.section(), Section("other", 1, dict, lambda r: second._load(r))]
    good: tuple[int, Fields] = (3, {"number": 1, "limit": 1})
    with pytest.raises(StateError):
        load_sections(sections, {"counter": good, "other": (1, {"number": 1})})
    applies = load_sections(sections, {"other": (1, {"number": 2, "limit": 2}), "counter": good})
    assert (first.number, second.number) == (0, 0)
    for apply in applies:
        apply()
    assert (first.number, second.number) == (1, 2)


def test_a_model_that_is_broken_is_a_state_error_too() -> None:
    def load(_reader: Reader) -> Apply:
        raise RuntimeError("x" * 1000)

    with pytest.raises(StateError, match="cannot be loaded") as found:
        Section("s", 1, dict, load).prepare(1, {})
    assert len(str(found.value)) < 300


def test_times_and_counters_have_ends() -> None:
    assert [time_left(*times) for times in ((5, 3), (3, 5), (1 << 80, 0))] == [2, 0, LONGEST_TIME]
    assert [counted(3), counted(1 << 70)] == [3, U64]
