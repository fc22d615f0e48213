# SPDX-License-Identifier: BSD-3-Clause
"""The payload of a section: JSON in one form only, so that a state is written, and read, in one way."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.device_models.device import Device
from vfio_user.device_models.e1000.bench import Bench
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import LONGEST, MOST_VALUES, Apply, Reader, Section, StateError
from vfio_user.server.migration.reader import StreamReader
from vfio_user.server.migration.stream import (
    HEADER,
    MAGIC,
    MAX_SECTION,
    RECORD,
    Kind,
    Limits,
    Shape,
    decode_fields,
    encode_fields,
)


@pytest.mark.parametrize("fields", [{"a": 1.5}, {"a": float("nan")}, {"a": "x" * MAX_SECTION}, ["a"]])
def test_fields_that_would_not_be_read_again_are_not_written(fields: Any) -> None:
    with pytest.raises(ValueError, match="section some"):
        encode_fields("some", fields)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"1",
        b"null",
        b'"text"',
        b"{",
        b"{}{}",
        b"{} \0",
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":1.0}',
        b'{"a":1e3}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        '{"ä":1}'.encode(),
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"a": 1}',
        b' {"a":1}',
        b'{"a":1}\n',
        b'{"b":1,"a":1}',
        b'{"a":{"c":1,"b":1}}',
        b'{"a":-0}',
        b'{"\\u0061":1}',
        b'{"a":"\\/"}',
        b'{"a":"\\u00E4"}',
        b'{"a":"\x7f\\u007f"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\udc00"}',
        b'{"a":"\\udc00\\ud800"}',
        b'{"\\ud800":1}',
        b'{"a":{"b":["\\ud83d\\ude00\\ud83d"]}}',
    ],
)
def test_fields_that_are_not_as_they_should_be(payload: bytes) -> None:
    with pytest.raises(StateError) as found:
        decode_fields("config", payload)
    assert found.value.section == "config"
    assert len(str(found.value)) < 300


numbers = st.integers(-(1 << 70), 1 << 70)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
fields_of_any_kind = st.dictionaries(st.text(), values, max_size=4)


@settings(max_examples=50, deadline=None)
@given(fields_of_any_kind)
def test_fields_are_read_as_they_were_written(fields: Any) -> None:
    assert decode_fields("config", encode_fields("config", fields)) == fields


@settings(deadline=None)
@given(fields_of_any_kind, st.data())
def test_no_other_text_gives_the_same_fields(fields: Any, data: st.DataObject) -> None:
    """One byte more, or another one: refused, or another state."""
    payload = encode_fields("config", fields)
    place = data.draw(st.integers(0, len(payload)))
    more = data.draw(
        st.sampled_from([b" ", b"\n", b"\\", b"0", b"-", b"+", b'"', b",", b"\x7f", b"A", b"d8"])
    )
    for changed in (payload[:place] + more + payload[place:], payload[:place] + more + payload[place + 1 :]):
        try:
            assert (decode_fields("config", changed) == fields) == (changed == payload)
        except StateError:
            continue


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text(), values, min_size=2, max_size=4),
    st.sampled_from([{"indent": 1}, {"separators": (", ", ":")}, {"separators": (",", ": ")}]),
)
def test_json_in_another_form(fields: Any, form: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="shortest form"):
        decode_fields("config", json.dumps(fields, sort_keys=True, **form).encode())
    names = sorted(fields, reverse=True)
    with pytest.raises(StateError, match="shortest form"):
        decode_fields(
            "config", json.dumps({name: fields[name] for name in names}, separators=(",", ":")).encode()
        )


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=1),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_half_a_surrogate_pair_is_no_text(half: str, before: str, after: str) -> None:
    text = before + half + after
    payload = json.dumps({"a": [text]}, separators=(",", ":")).encode()
    with pytest.raises(StateError, match="surrogate"):
        decode_fields("config", payload)
    with pytest.raises(ValueError, match="surrogate"):
        encode_fields("config", {text: 1})


# What a hostile section may take

Filler = Callable[[int], list[str]]
SHAPES: dict[str, Filler] = {
    "lists": lambda count: ["[]"] * count,
    "objects": lambda count: ["{}"] * count,
    "small objects": lambda count: ['{"":0}'] * count,
    "lists of one": lambda count: ["[0]"] * count,
    "nested": lambda count: ["[[[[[[0]]]]]]"] * count,
    "nested objects": lambda count: ['{"a":{"b":{"c":0}}}'] * count,
    "numbers": lambda count: [str(1 << 31 | place) for place in range(count)],
    "long numbers": lambda count: ["9" * 64] * count,
    "texts": lambda count: [f'"{place:06x}"' for place in range(count)],
    "names": lambda count: ["{" + ",".join(f'"{place:06x}":0' for place in range(count)) + "}"],
}


def cut(filler: Filler, limits: Limits) -> bytes:
    """As much of it as may be there: by its length or by the number of values."""

    def make(count: int) -> bytes:
        return f'{{"a":[{",".join(filler(count))}]}}'.encode()

    def fits(payload: bytes) -> bool:
        return len(payload) <= limits.longest and sum(map(payload.count, b"[{,:")) <= limits.values

    low, high = 1, limits.values
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(make(middle)) else (low, middle)
    return make(low)


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        kept = work()
        peak = tracemalloc.get_traced_memory()[1]
        del kept
        return peak
    finally:
        tracemalloc.stop()


def most_memory(payload: int, limits: Limits) -> int:
    """As `decode_fields` has it, with a little for the interpreter."""
    return 5 * payload + 160 * limits.values + 8192


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "limits", [Limits(), Limits(longest=MAX_SECTION, values=5000)], ids=["usual", "large"]
)
def test_what_is_made_of_a_section_takes_no_more_than_was_said(shape: str, limits: Limits) -> None:
    payload = cut(SHAPES[shape], limits)
    assert peak_of(lambda: decode_fields("config", payload, limits)) < most_memory(len(payload), limits)


def test_a_text_as_long_as_may_be_takes_no_more_than_was_said() -> None:
    payload = b'{"a":"%s"}' % (b"0" * (MAX_SECTION - 8))
    limits = Limits(longest=MAX_SECTION)
    assert peak_of(lambda: decode_fields("config", payload, limits)) < most_memory(len(payload), limits)


@pytest.mark.parametrize("shape", ["lists", "small objects", "nested"])
def test_too_many_values_are_refused_before_anything_is_made_of_them(shape: str) -> None:
    payload = cut(SHAPES[shape], Limits(values=200_000))

    def refused() -> None:
        with pytest.raises(StateError, match="values, where at most 1024 may be"):
            decode_fields("config", payload)

    assert peak_of(refused) < 3 * len(payload)


def device_named(name: str) -> Device:
    return Bench().device if name == "e1000" else Scratch(FakeHost(), memory=1 << 20)


def hostile_stream(device: Device, shape: str) -> bytes:
    """Each section is as much of this as it may be."""
    model = device.model.encode()
    data = HEADER.pack(MAGIC, 1, 0, device.state_version, len(model)) + model
    for section in device.sections():
        payload, name = cut(SHAPES[shape], Limits.of(section)), section.name.encode()
        data += RECORD.pack(Kind.SECTION, len(name), section.version, len(payload)) + name + payload
    return data


@pytest.mark.parametrize("shape", ["small objects", "nested", "texts"])
@pytest.mark.parametrize(("model", "most"), [("scratch", 2 << 20), ("e1000", 16 << 20)])
def test_a_whole_hostile_state_takes_bounded_memory(model: str, most: int, shape: str) -> None:
    """That the sections together may be so long, and hold so much, is what SECURITY.md says of our models."""
    device = device_named(model)
    data = hostile_stream(device, shape)
    limits = [Limits.of(section) for section in device.sections()]
    assert sum(most_memory(one.longest, one) for one in limits) < most
    reader = StreamReader(Shape.of(device))
    assert peak_of(lambda: reader.feed(data)) < most


def test_a_model_that_has_more_says_so() -> None:
    def load(reader: Reader) -> Apply:
        raise AssertionError

    fields: Any = {"numbers": [0] * 2000}
    usual, large = Section("s", 1, dict, load), Section("s", 1, dict, load, values=2002)
    with pytest.raises(ValueError, match=r"section s .*2002 values, where at most 1024 may be"):
        encode_fields("s", fields, Limits.of(usual))
    assert decode_fields("s", encode_fields("s", fields, Limits.of(large)), Limits.of(large)) == fields
    with pytest.raises(ValueError, match="bytes, where at most 65536 may be"):
        encode_fields("s", {"a": "x" * LONGEST}, Limits.of(usual))
    assert (usual.longest, usual.values) == (LONGEST, MOST_VALUES)
