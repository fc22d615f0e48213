# SPDX-License-Identifier: BSD-3-Clause
"""libvfio-user as a shared library: found, told apart by its revision, and bound, before anything is called.

All revisions have the same soname and export nearly the same names, while arguments and structures differ.
What tells them apart without a call is one exported name (v1's migration region) and one text in the file:
the message about too many DMA regions, which changed with the type of the limit.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfio_user.server.engines.libvfio_user_abi import FUNCTIONS, SONAME, Abi, CType, Fails, Function

VARIABLE = "VFIO_USER_LIBVFIO_USER"
HOW_TO_GET = f"build it with `make lab` or `vfio-user lab`, or name one with {VARIABLE}=PATH"

V1_NAME = "vfu_get_migr_register_area_size"
FIXED_LIMIT, GIVEN_LIMIT = b"hit max regions %d", b"hit max regions %zu"

MARKS: Mapping[tuple[bool, bytes], Abi] = {
    (True, FIXED_LIMIT): Abi.V1,
    (False, FIXED_LIMIT): Abi.V2,
    (False, GIVEN_LIMIT): Abi.V2_LIMIT,
}
"""By whether `V1_NAME` is exported, and which of the texts is there."""


class LibraryError(Exception):
    """The library cannot be had, or is one that we do not know; the text is one line."""


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of a library, by name; each raises OSError when it fails, as its row says."""

    path: Path
    abi: Abi
    functions: Mapping[str, Callable[..., Any]]


def find_library(environment: Mapping[str, str] = os.environ, lab: Path | None = None) -> Library:
    """The library that `VFIO_USER_LIBVFIO_USER` names, else the loader's, else the one at `lab`.

    LibraryError: there is none, or it is none that we know. A library that the variable names is never
    passed over for another.
    """
    if chosen := environment.get(VARIABLE):
        return load(chosen)
    try:
        return load(SONAME)
    except NotLoadedError:
        pass
    if lab is None or not lab.exists():
        raise LibraryError(f"there is no libvfio-user: {HOW_TO_GET}")
    return load(os.fspath(lab))


class NotLoadedError(LibraryError):
    """The loader does not have it."""


def load(name: str) -> Library:
    """Open a library by path or soname, and bind what its revision has. LibraryError."""
    try:
        handle = ctypes.CDLL(name, use_errno=True)
    except OSError as error:
        raise NotLoadedError(f"{name} cannot be loaded as libvfio-user: {error}: {HOW_TO_GET}") from error
    path = _path_of(handle, name)
    abi = identify(path, lambda function: hasattr(handle, function))
    return Library(path, abi, bind(handle, abi))


def _path_of(handle: ctypes.CDLL, name: str) -> Path:
    """The file that the loader has taken, from where its functions are."""
    if not hasattr(handle, "vfu_create_ctx"):
        raise LibraryError(f"{name} is no libvfio-user: it does not export vfu_create_ctx")
    place = ctypes.cast(handle.vfu_create_ctx, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.partition(" ")[0].partition("-")
        if int(start, 16) <= place < int(end, 16):
            return Path(line[73:])
    raise LibraryError(f"{name} has been loaded, but its file cannot be found")


def identify(path: Path, exports: Callable[[str], bool]) -> Abi:
    """The revision of the library in the file. LibraryError names the difference to those that we know."""
    data = path.read_bytes()
    texts = [text for text in (FIXED_LIMIT, GIVEN_LIMIT) if text + b"\0" in data]
    if len(texts) != 1:
        found = "both" if texts else "neither"
        raise _unknown(
            path,
            f"it has {found} of the messages {FIXED_LIMIT!r} and {GIVEN_LIMIT!r}, by which the arguments of "
            "vfu_setup_device_dma are known",
        )
    abi = MARKS.get((exports(V1_NAME), texts[0]))
    if abi is None:
        raise _unknown(path, f"it exports {V1_NAME} of v1 and has v2's message {texts[0]!r}")
    missing = [function.name for function in functions_of(abi) if not exports(function.name)]
    if missing:
        raise _unknown(path, f"of {abi.value} it lacks {', '.join(missing)}")
    return abi


def _unknown(path: Path, difference: str) -> LibraryError:
    return LibraryError(f"{path} has an ABI that is not known here: {difference}")


def functions_of(abi: Abi) -> list[Function]:
    """The rows of a revision."""
    return [function for function in FUNCTIONS if abi in function.abis]


def bind(handle: ctypes.CDLL, abi: Abi) -> Mapping[str, Callable[..., Any]]:
    """The functions of a revision with their types, raising as their rows say."""
    bound: dict[str, Callable[..., Any]] = {}
    for row in functions_of(abi):
        function = getattr(handle, row.name)
        function.restype = row.result
        function.argtypes = row.arguments
        check = _CHECKS[row.fails]
        if check is not None:
            function.errcheck = check
        bound[row.name] = function
    return bound


def _check_negative(result: int, function: CType, _arguments: object) -> int:
    if result < 0:
        raise _failed(function)
    return result


def _check_null(result: int | None, function: CType, _arguments: object) -> int:
    if not result:
        raise _failed(function)
    return result


def _failed(function: CType) -> OSError:
    number = ctypes.get_errno() or errno.EINVAL
    return OSError(number, f"{function.__name__}: {os.strerror(number)}")


_CHECKS: Mapping[Fails, Callable[..., Any] | None] = {
    Fails.NEVER: None,
    Fails.NEGATIVE: _check_negative,
    Fails.NULL: _check_null,
}
