# SPDX-License-Identifier: BSD-3-Clause
"""What a row of the control socket's methods is made of: its parameters, and how they are checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vfio_user.protocol.json_rpc import INVALID_PARAMS, RpcError
from vfio_user.server.control_jobs import Steps

if TYPE_CHECKING:
    from vfio_user.server.control_methods import Control

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter by name. Without a `default` it must be given.

    `kind` bytes: hexadecimal digits in a text, and `least` and `most` are numbers of bytes.
    """

    name: str
    kind: type[bool] | type[int] | type[bytes]
    default: bool | int | None
    text: str
    least: int = 0
    most: int = 1 << 30
    power_of_two: bool = False

    def check(self, value: Any) -> bool | int | bytes:
        """The value as a method gets it. RpcError when it is not of its kind."""
        checked = _CHECKS[self.kind](self, value)
        if checked is None:
            raise RpcError(INVALID_PARAMS, f"{self.name}: {self._wanted()}")
        return checked

    def _wanted(self) -> str:
        if self.kind is bool:
            return "true or false"
        if self.kind is bytes:
            return f"{self.least} to {self.most} bytes in hexadecimal digits, two for each"
        power = "a power of two" if self.power_of_two else "a number"
        return f"{power} from {self.least} to {self.most}"


def _check_truth(param: Param, value: Any) -> bool | None:
    return value if type(value) is bool else None


def _check_number(param: Param, value: Any) -> int | None:
    if type(value) is not int or not param.least <= value <= param.most:
        return None
    return None if param.power_of_two and value & (value - 1) else value


def _check_bytes(param: Param, value: Any) -> bytes | None:
    if type(value) is not str or len(value) > 2 * param.most or not value.isalnum():
        return None
    try:
        data = bytes.fromhex(value)
    except ValueError:
        return None
    return data if len(data) >= param.least else None


_CHECKS: Mapping[type, Callable[[Param, Any], bool | int | bytes | None]] = {
    bool: _check_truth,
    int: _check_number,
    bytes: _check_bytes,
}


@dataclass(frozen=True, slots=True)
class Method:
    """`run` gives the result, or the steps to it. With `stream` ("written", "read") a descriptor has to come
    with the request, unless `inline` is true; `run` owns what is made of it. `end` undoes what it has
    switched on, and may be called at any time: once the connection ends that asked with `lease`."""

    name: str
    run: Callable[["Control", Arguments, Any], Any | Steps]
    text: str
    when: str
    params: tuple[Param, ...] = ()
    stream: str = ""
    end: Callable[["Control"], object] | None = None

    def arguments(self, given: Mapping[str, Any]) -> Arguments:
        """The parameters with their defaults. RpcError for one that is unknown, missing or wrong."""
        known = {param.name for param in self.params}
        if unknown := sorted(given.keys() - known):
            raise RpcError(INVALID_PARAMS, f"{self.name} has no parameter {unknown[0][:40]!r}")
        arguments = {param.name: given.get(param.name, param.default) for param in self.params}
        return {param.name: param.check(arguments[param.name]) for param in self.params}
