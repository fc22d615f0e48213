# SPDX-License-Identifier: BSD-3-Clause
"""What layouts.py is made of: a construct declaration joined with a value class."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from construct import Adapter, Array, Construct, ExprAdapter, ExprValidator, Rebuild, len_, obj_, this

from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.protocol.values import Payload, Structure

# The type stubs make construct's classes generic; at run time they are not.
if TYPE_CHECKING:
    AnyAdapter: TypeAlias = Adapter[Any, Any, Any, Any]
else:
    AnyAdapter = Adapter

MAX_ROWS = 4096
"""Most entries of an array in one message: a peer must not keep us parsing for seconds. The kernel allows
256 logging ranges; mappable areas and sub-regions are a handful."""

_HEAD_LIMIT = 64
"""No fixed part before a payload is longer, so that parsing does not copy the payload."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`length` names the wire field that counts the bytes of `payload`, the field that ends the message.
    `optional`: an empty body stands for the value with all fields at their defaults. `padded`: more bytes
    may follow than `length` says, and mean nothing."""

    kind: type[Structure]
    struct: Construct[Any, Any]
    payload: str | None = None
    length: str | None = None
    optional: bool = False
    padded: bool = False

    def parse(self, body: memoryview) -> Structure:
        if self.optional and not body:
            return self.kind()
        stream = io.BytesIO(body[:_HEAD_LIMIT] if self.payload else body)
        parsed = self.struct.parse_stream(stream)
        values = {
            field.name: parsed[field.name] for field in fields(cast(Any, self.kind)) if field.name in parsed
        }
        if self.payload:
            end = stream.tell() + parsed[self.length] if self.padded and self.length else len(body)
            values[self.payload] = body[stream.tell() : end]
            self._check_length(parsed, len(values[self.payload]))
        return self.kind(**values)

    def _check_length(self, parsed: Mapping[str, Any], actual: int) -> None:
        if self.length and parsed[self.length] != actual:
            reason = f"{self.kind.__name__}.{self.length}: {parsed[self.length]}, but {actual} bytes follow"
            raise RemoteProtocolError(reason)

    def build(self, value: Structure) -> tuple[Payload, ...]:
        if self.optional and value == self.kind():
            return ()
        wire = fields_of(value)
        if not self.payload:
            return (self.struct.build(wire),)
        payloads: tuple[Payload, ...] = (wire.pop(self.payload), *wire.pop("more", ()))
        if self.length:
            wire[self.length] = sum(map(len, payloads))
        return (self.struct.build(wire), *filter(len, payloads))


def fields_of(value: Structure) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(cast(Any, value))}


class Nested(AnyAdapter):
    """A structure inside another one, as a value of its class."""

    def __init__(self, kind: type[Structure], struct: Construct[Any, Any]) -> None:
        super().__init__(struct)
        self.kind = kind

    def _decode(self, obj: Any, context: Any, path: Any) -> Structure:
        return self.kind(**{field.name: obj[field.name] for field in fields(cast(Any, self.kind))})

    def _encode(self, obj: Any, context: Any, path: Any) -> dict[str, Any]:
        return fields_of(obj)


def rows_of(count: str, row: Construct[Any, Any]) -> Construct[Any, Any]:
    return ExprAdapter(
        Array(lambda context: context[count], row), lambda rows, _: tuple(rows), lambda rows, _: rows
    )


def count_of(name: str, kind: Any, limit: int = MAX_ROWS) -> Construct[Any, Any]:
    return Rebuild(ExprValidator(kind, obj_ <= limit), len_(this[name]))


def require(condition: bool, field: str, reason: str) -> None:
    """Check what construct cannot say; the caller's `parse` adds the structure's name."""
    if not condition:
        raise RemoteProtocolError(f"{field}: {reason}")
