# SPDX-License-Identifier: BSD-3-Clause
"""JSON-RPC 2.0 by lines: what is a request, what is refused and with which code."""

import json

import pytest

from vfio_user.protocol import json_rpc
from vfio_user.protocol.json_rpc import BadLine, LineSplitter, RpcError, parse_answer, parse_call


def test_a_request_and_a_notification() -> None:
    call = parse_call(json_rpc.build_call("stop", {"wait": 5}, 7).strip())
    assert (call.method, call.params, call.id, call.notification) == ("stop", {"wait": 5}, 7, False)
    assert parse_call(b'{"jsonrpc":"2.0","method":"stop"}').notification


@pytest.mark.parametrize(
    ("line", "code", "id"),
    [
        (b"{", json_rpc.PARSE_ERROR, None),
        (b"\xff\xfe", json_rpc.PARSE_ERROR, None),
        (b"[" * 50_000, json_rpc.PARSE_ERROR, None),
        (b"1" * 5000, json_rpc.PARSE_ERROR, None),
        (b'{"jsonrpc":"2.0","method":"stop","id":NaN}', json_rpc.PARSE_ERROR, None),
        (b'{"jsonrpc":"2.0","method":"stop","id":-1e999}', json_rpc.PARSE_ERROR, None),
        (b"[]", json_rpc.INVALID_REQUEST, None),
        (b'"stop"', json_rpc.INVALID_REQUEST, None),
        (b'{"jsonrpc":"1.0","method":"stop","id":1}', json_rpc.INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","method":3,"id":"x"}', json_rpc.INVALID_REQUEST, "x"),
        (b'{"jsonrpc":"2.0","method":"stop","id":[1]}', json_rpc.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","method":"stop","id":true}', json_rpc.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","method":"stop","params":[1],"id":2}', json_rpc.INVALID_PARAMS, 2),
    ],
    ids=range(13),
)
def test_what_is_no_request(line: bytes, code: int, id: object) -> None:
    with pytest.raises(BadLine) as raised:
        parse_call(line)
    assert (raised.value.code, raised.value.id) == (code, id)


def test_answers() -> None:
    assert parse_answer(json_rpc.build_result(3, {"a": 1}).strip()).result == {"a": 1}
    answer = parse_answer(json_rpc.build_error("x", RpcError(json_rpc.REFUSED, "not now")).strip())
    assert answer.id == "x"
    assert answer.error is not None
    assert (answer.error.code, answer.error.message) == (json_rpc.REFUSED, "not now")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_answer_with_what_is_no_number_of_json(number: str) -> None:
    with pytest.raises(BadLine, match="this is not JSON"):
        parse_answer(f'{{"jsonrpc":"2.0","id":1,"result":{number}}}'.encode())


@pytest.mark.parametrize(
    "value", [{}, {"jsonrpc": "2.0"}, {"jsonrpc": "2.0", "error": 1}, {"jsonrpc": "2.0", "error": {}}, 3]
)
def test_what_is_no_answer(value: object) -> None:
    with pytest.raises(BadLine):
        parse_answer(json.dumps(value).encode())


def test_lines_are_found_wherever_they_are_cut() -> None:
    data = b'{"a":1}\n\n  \n{"b":2}\n{"c"'
    whole = LineSplitter()
    assert whole.feed(data) == [b'{"a":1}', b'{"b":2}']
    assert whole.rest == b'{"c"'
    cut = LineSplitter()
    assert [line for byte in data for line in cut.feed(bytes([byte]))] == [b'{"a":1}', b'{"b":2}']
    assert cut.rest == whole.rest


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_too_long(end: bytes) -> None:
    assert LineSplitter(10).feed(b"x" * 10 + b"\n") == [b"x" * 10]
    with pytest.raises(RpcError, match="more than 10 bytes"):
        LineSplitter(10).feed(b"x" * 11 + end)
