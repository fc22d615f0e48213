# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user serve` as a process of its own: its counters, its log, and what it holds of its clients.

async with open_server(["scratch"], folder) as server:
    ... a client of server.path ...
    await server.counters()
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from vfio_user.client.qemu.process import Child, running

_BLOCK = re.compile(r"^# counters: .*\n((?:\w+ \d+\n)*)\n", re.MULTILINE)
_STARTED = re.compile(r"^listening on (.*)$", re.MULTILINE)
_TROUBLE = re.compile(r"^.*(?: (?:WARNING|ERROR|CRITICAL) | refused[: ]|Traceback|Error:).*$", re.MULTILINE)
_POLL = 0.01


class ServerError(Exception):
    """The server did not start, answer or end; the text carries the end of its log."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds: the kinds of its open descriptors (sorted), and its shared mappings by name."""

    fds: tuple[str, ...]
    mappings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server; `path` is its socket."""

    path: Path
    child: Child

    @property
    def pid(self) -> int:
        return self.child.pid

    def log(self) -> str:
        """Everything it has written, its counters too."""
        return self.child.log_text()

    def trouble(self) -> list[str]:
        """The lines of its log that no undisturbed server writes: warnings, refused requests, errors."""
        return _TROUBLE.findall(self.log())

    def _runs(self) -> bool:
        return self.child.popen.poll() is None

    def reports(self) -> list[Mapping[str, int]]:
        """The counters that it has printed so far: asked for, when a client left, at the end."""
        return [_parse(block) for block in _BLOCK.findall(self.log())]

    async def counters(self, timeout: float = 5.0) -> Mapping[str, int]:
        """Its counters now."""
        before = len(self.reports())
        self.child.signal(signal.SIGUSR1)
        return await self.report(before, timeout)

    async def report(self, number: int, timeout: float = 5.0) -> Mapping[str, int]:
        """The counters that it prints as the `number`th, from 0. Raises ServerError when it does not."""
        with trio.move_on_after(timeout):
            while len(reports := self.reports()) <= number and self._runs():  # noqa: ASYNC110
                await trio.sleep(_POLL)
            if len(reports) > number:
                return reports[number]
        raise ServerError(f"no counters within {timeout:g} s\n{self.log()[-1500:]}")

    async def wait_clients_left(self, count: int, timeout: float = 10.0) -> None:
        """Waits until `count` clients have left and what was theirs is released."""
        with trio.move_on_after(timeout):
            while self.log().count(" has left\n") < count:  # noqa: ASYNC110
                await trio.sleep(_POLL)
            return
        raise ServerError(f"client {count} has not left within {timeout:g} s\n{self.log()[-1500:]}")

    def holdings(self) -> Holdings:
        """What it holds at the moment (/proc/PID/fd and maps)."""
        folder = Path(f"/proc/{self.pid}")
        fds = (re.sub(r"\[?\d+\]?$", "", os.readlink(entry)) for entry in (folder / "fd").iterdir())
        maps = (line.split(maxsplit=5) for line in (folder / "maps").read_text().splitlines())
        return Holdings(tuple(sorted(fds)), tuple(sorted(words[-1] for words in maps if words[1][3] == "s")))

    async def stop(self, timeout: float = 5.0) -> int:
        """SIGTERM; its exit status. Raises ServerError when it goes on."""
        self.child.signal(signal.SIGTERM)
        with trio.move_on_after(timeout):
            return await self.child.wait()
        raise ServerError(f"the server still runs after {timeout:g} s\n{self.log()[-1500:]}")


def _parse(block: str) -> Mapping[str, int]:
    return {name: int(value) for name, value in (line.split() for line in block.splitlines())}


def serve_words(*words: str) -> list[str]:
    """`vfio-user serve` of the interpreter that runs this, with counters and a log."""
    return [str(Path(sys.executable).with_name("vfio-user")), "serve", *words, "--stats", "--verbose"]


@contextlib.asynccontextmanager
async def open_server(
    words: Sequence[str], folder: Path, name: str = "server", netns: str = ""
) -> AsyncIterator[ServerProcess]:
    """Starts `vfio-user serve` with `words` on a socket in `folder`; killed, if need be, at the end."""
    path, log = folder / f"{name}.socket", folder / f"{name}.log"
    command = serve_words(*words, "--socket-path", str(path))
    async with running(command, log, netns=netns) as child:
        yield await started(child)


async def started(child: Child, timeout: float = 20.0) -> ServerProcess:
    """The server that `child` is, once it listens. Raises ServerError when it does not."""
    with trio.move_on_after(timeout):
        while child.popen.poll() is None:
            if (match := _STARTED.search(child.log_text())) is not None:
                return ServerProcess(Path(match[1]), child)
            await trio.sleep(_POLL)
    raise ServerError(f"the server does not listen\n{child.log_text()[-1500:]}")
