# SPDX-License-Identifier: BSD-3-Clause
"""JSON-RPC 2.0 (jsonrpc.org/specification) as one object a line, for the control socket. No I/O.

Not taken: batches, and parameters by position.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

MAX_LINE: Final = 64 << 10
"""Bytes of a request, without its newline."""

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
REFUSED: Final = -32000
"""Not now, or not with this device or engine; nothing has changed. (-32000 to -32099 are a server's own.)"""
FAILED: Final = -32001
"""It was begun and could not be done; the device is as it was, unless the message says otherwise."""

Id = str | int | float | None


class RpcError(Exception):
    """What the answer to a request says when it is not a result."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class BadLine(RpcError):
    """A line that is no request; `id` is its id, where one could be seen."""

    def __init__(self, code: int, message: str, id: Id = None) -> None:
        super().__init__(code, message)
        self.id = id


@dataclass(frozen=True, slots=True)
class Call:
    """A request. `notification`: it has no id, and gets no answer."""

    method: str
    params: Mapping[str, Any]
    id: Id = None
    notification: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request: a result, or an error."""

    id: Id
    result: Any = None
    error: RpcError | None = None


class LineSplitter:
    """Cuts what comes into lines. RpcError for one that is too long: what follows is lost."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._data = b""
        self._start = self._searched = 0

    @property
    def rest(self) -> bytes:
        """What has come and was not taken."""
        return self._data[self._start :]

    def put(self, data: bytes) -> None:
        """Bytes that have come, for `take`."""
        self._searched -= self._start
        self._data, self._start = self.rest + data, 0

    def take(self) -> bytes | None:
        """The next line that is not blank; None: its end has not come yet."""
        while True:
            end = self._data.find(b"\n", self._searched)
            line_end = len(self._data) if end < 0 else end
            if line_end - self._start > self._limit:
                raise RpcError(INVALID_REQUEST, f"a line has more than {self._limit} bytes")
            self._searched = line_end + (end >= 0)
            if end < 0:
                return None
            line, self._start = self._data[self._start : end], self._searched
            if line.strip():
                return line

    def feed(self, data: bytes) -> list[bytes]:
        """`put`, and every line that can be taken."""
        self.put(data)
        return list(iter(self.take, None))

    def take_rest(self) -> bytes:
        """What has come and was not taken, which is no lines."""
        rest = self.rest
        self._data, self._start, self._searched = b"", 0, 0
        return rest


def parse_call(line: bytes) -> Call:
    """The request in a line. BadLine."""
    value = _load(line)
    if not isinstance(value, dict):
        raise BadLine(INVALID_REQUEST, "a request is an object, one a line; there are no batches")
    id = value.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int | float | None):
        raise BadLine(INVALID_REQUEST, "id: a text or a number")
    method, params = value.get("method"), value.get("params", {})
    if value.get("jsonrpc") != "2.0" or not isinstance(method, str):
        raise BadLine(INVALID_REQUEST, 'a request has "jsonrpc": "2.0" and a method, a text', id)
    if not isinstance(params, dict):
        raise BadLine(INVALID_PARAMS, "params: an object with the parameters by name", id)
    return Call(method, params, id, "id" not in value)


def parse_answer(line: bytes) -> Answer:
    """The answer in a line. BadLine for anything else."""
    value = _load(line)
    if (
        not isinstance(value, dict)
        or value.get("jsonrpc") != "2.0"
        or ("result" in value) == ("error" in value)
    ):
        raise BadLine(INVALID_REQUEST, "this is no answer of JSON-RPC 2.0")
    error = value.get("error")
    if error is None:
        return Answer(value.get("id"), value.get("result"))
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        raise BadLine(INVALID_REQUEST, "the error of an answer has no code", value.get("id"))
    return Answer(value.get("id"), error=RpcError(error["code"], str(error.get("message", ""))))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    """A number beyond a double's would go back as `Infinity`, which nobody can read."""
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)


def _load(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise BadLine(PARSE_ERROR, f"this is not JSON: {error}") from None


def build_call(method: str, params: Mapping[str, Any], id: Id) -> bytes:
    """The line of a request."""
    return _line({"jsonrpc": "2.0", "id": id, "method": method, "params": dict(params)})


def build_result(id: Id, result: Any) -> bytes:
    """The line of an answer with a result."""
    return _line({"jsonrpc": "2.0", "id": id, "result": result})


def build_error(id: Id, error: RpcError) -> bytes:
    """The line of an answer with an error."""
    return _line({"jsonrpc": "2.0", "id": id, "error": {"code": error.code, "message": error.message}})


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
