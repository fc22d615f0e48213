# SPDX-License-Identifier: BSD-3-Clause
"""The payload of a section: JSON in one form only, so that a state is written, and read, in one way."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.device_models.state import StateError
from vfio_user.server.migration.stream import MAX_SECTION, decode_fields, encode_fields


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
