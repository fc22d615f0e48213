# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user ctl`: one method of a server's control socket."""

import contextlib
import errno
import json
import math
import os
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import trio

from vfio_user.cli.main import fail
from vfio_user.client.control import ControlLost, open_control
from vfio_user.client.control_streams import PIECE, inline_load, open_inline_save
from vfio_user.protocol.json_rpc import RpcError
from vfio_user.server.control_method import Method
from vfio_user.server.control_methods import find_method

STANDARD = Path("-")
AT_ONCE = frozenset({"state", "configuration", "cancel", "link", "announce"})
"""Methods that wait for nobody; how long the others take is up to the device, the VMM and the caller."""
ANSWER = 5.0
"""Seconds for them."""
_HINTS = {
    ("--to FILE", errno.ENOENT): "make its folder first",
    ("--to FILE", errno.ENOTDIR): "a part of the path is no folder, choose another path",
    ("--to FILE", errno.EACCES): "choose a folder that you may write to",
    ("--to FILE", errno.EROFS): "choose a folder that can be written to",
    ("--from FILE", errno.ENOENT): "give a file that `save` has written",
    ("--from FILE", errno.EACCES): "give a file that you may read",
}


@click.command("ctl")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("method")
@click.argument("assignments", nargs=-1, metavar="[NAME=VALUE]...")
@click.option(
    "--to", "target", type=click.Path(path_type=Path), help="The file that `save` writes; -: standard output."
)
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="The file that `load` reads; -: standard input."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, in one line.")
def command(
    path: Path,
    method: str,
    assignments: tuple[str, ...],
    target: Path | None,
    source: Path | None,
    as_json: bool,
) -> None:
    """Ask the server whose control socket is PATH (`serve --control PATH`) for METHOD.

    docs/control.md lists the methods; `state` shows what there is.
    """
    try:
        row = find_method(method)
        params = dict(_assignment(row, text) for text in assignments)
        row.arguments(params)
        with _stream(row, target, source) as fd:
            inline = params.get("inline") or STANDARD in (target, source)
            call = _INLINE[row.stream] if row.stream and inline else _call
            result = trio.run(call, path, method, fd, params)
    except RpcError as error:
        fail(f"{method}: {error.message}")
    except (ControlLost, OSError) as error:
        fail(str(error))
    shown = json.dumps(result) if as_json else "\n".join(lines(result))
    click.echo(shown, err=target == STANDARD)


def _assignment(row: Method, text: str) -> tuple[str, Any]:
    """Numbers may be hexadecimal, with 0x; bytes stay the digits that they are."""
    name, equals, value = text.partition("=")
    if not equals:
        fail(f"{text!r} is not NAME=VALUE")
    kind = next((param.kind for param in row.params if param.name == name), None)
    try:
        if kind is bytes:
            return name, value
        return name, int(value, 0) if kind is int else json.loads(value)
    except ValueError:
        return name, value


@contextlib.contextmanager
def _stream(row: Method, target: Path | None, source: Path | None) -> Iterator[int | None]:
    """The descriptor that goes along. A file that was not written to its end does not stay."""
    needed = {"written": "--to FILE", "read": "--from FILE"}.get(row.stream)
    given = [option for option, path in (("--to FILE", target), ("--from FILE", source)) if path is not None]
    if given != ([needed] if needed else []):
        fail(f"{row.name} takes {needed or 'neither --to nor --from'}")
    path = target or source
    if path is None or needed is None:
        yield None
        return
    fd = _open(path, needed, writing=target is not None)
    try:
        yield fd
    except BaseException:
        if target and target != STANDARD and stat.S_ISREG(os.fstat(fd).st_mode):
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _open(path: Path, option: str, *, writing: bool) -> int:
    if path == STANDARD:
        return os.dup(sys.stdout.fileno() if writing else sys.stdin.fileno())
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if writing else os.O_RDONLY, 0o600)
    except OSError as error:
        hint = _HINTS.get((option, error.errno or 0), "choose another path")
        fail(f"{path} cannot be {'written' if writing else 'read'}: {error.strerror}: {hint}")


async def _call(path: Path, method: str, fd: int | None, params: dict[str, Any]) -> Any:
    """ControlLost when what is answered at once is not: the device's own socket takes a connection too."""
    with trio.move_on_after(ANSWER if method in AT_ONCE else math.inf):
        async with open_control(path) as control:
            return await control.call(method, fd=fd, **params)
    raise ControlLost(f"{path} does not answer within {ANSWER:g} s: is it the control socket?")


async def _save_inline(path: Path, method: str, fd: int, params: dict[str, Any]) -> Any:
    """The server sends the stream to us, and we write it: blocking, for there is nothing else to do."""
    async with open_inline_save(path, hold=params.get("hold", False)) as chunks:
        async for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(fd, rest) :]
        return await chunks.check()


async def _load_inline(path: Path, method: str, fd: int, params: dict[str, Any]) -> Any:
    return await inline_load(path, _pieces(fd))


async def _pieces(fd: int) -> AsyncIterator[bytes]:
    while piece := os.read(fd, PIECE):
        yield piece


_INLINE: Mapping[str, Callable[..., Awaitable[Any]]] = {"written": _save_inline, "read": _load_inline}


def lines(value: Any, prefix: str = "") -> Iterator[str]:
    """A result for people: a line for each value, as `name value`; nothing in it: "done"."""
    if isinstance(value, dict):
        if not value and not prefix:
            yield "done"
        for name, inner in value.items():
            yield from lines(inner, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            if isinstance(inner, list):
                yield f"{prefix}.{number} {' '.join(f'{part:#x}' for part in inner)}"
            else:
                yield from lines(inner, f"{prefix}.{number}")
    else:
        yield f"{prefix} {_WORDS.get(value, value) if isinstance(value, bool | None) else value}"


_WORDS = {True: "yes", False: "no", None: "-"}
