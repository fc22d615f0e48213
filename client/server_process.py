# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user serve` as a real second process: started, waited for, ended; its counters, its log, and what it
holds of its clients.

    async with serving("scratch", folder / "s", ["--verbose"]) as server:
        ... a client of server.path ...
        await server.ask_counters()
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vfio_user.client.background import background
from vfio_user.client.qemu.process import guarded_words, namespace_words

_PROGRAM = "from vfio_user.cli.main import main; main()"
_LISTENING = "listening on "
_COUNTERS = "# counters: "
_TAIL = 2000
_TROUBLE = re.compile(r" (?:WARNING|ERROR|CRITICAL) | refused[: ]|Traceback|Error:")


class ServerError(Exception):
    """The server did not start, or did not end as it should; the text has the end of its output."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds: the kinds of its open descriptors (sorted), and its shared mappings by name."""

    fds: tuple[str, ...]
    mappings: tuple[str, ...]


@dataclass(slots=True)
class ServerProcess:
    """A running server. `lines` is what it has written so far besides counters, standard error among it."""

    popen: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)
    _snapshots: dict[str, dict[str, int]] = field(default_factory=dict)
    _occasion: str = ""
    _figures: dict[str, int] = field(default_factory=dict)
    _changed: trio.Condition = field(default_factory=trio.Condition)
    _ended: trio.Event = field(default_factory=trio.Event)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def path(self) -> Path:
        """Its socket, once it listens."""
        return Path(next(line for line in self.lines if line.startswith(_LISTENING)).removeprefix(_LISTENING))

    def log(self) -> str:
        """`lines` as a text."""
        return "\n".join(self.lines)

    def trouble(self) -> list[str]:
        """The lines that no undisturbed server writes: warnings, refused requests, errors."""
        return [line for line in self.lines if _TROUBLE.search(line)]

    def holdings(self) -> Holdings:
        """What it holds at the moment (/proc/PID/fd and maps)."""
        folder = Path(f"/proc/{self.pid}")
        fds = (re.sub(r"\[?\d+\]?$", "", os.readlink(entry)) for entry in (folder / "fd").iterdir())
        maps = (line.split(maxsplit=5) for line in (folder / "maps").read_text().splitlines())
        return Holdings(tuple(sorted(fds)), tuple(sorted(words[-1] for words in maps if words[1][3] == "s")))

    async def counters(self, occasion: str, timeout: float = 20.0) -> dict[str, int]:
        """What `--stats` has printed on an occasion: "client 1 has left", "SIGUSR1", "the end".

        All figures count from the server's start. What was a client's is released when it has left.
        ServerError when they do not come.
        """
        await self._wait(lambda: occasion in self._snapshots, timeout)
        if occasion not in self._snapshots:
            raise self._error(f"the server has printed no counters ({occasion})")
        return self._snapshots[occasion]

    async def ask_counters(self, timeout: float = 20.0) -> dict[str, int]:
        """The figures now (SIGUSR1), after all that clients who have left did."""
        self._snapshots.pop("SIGUSR1", None)
        self.popen.send_signal(signal.SIGUSR1)
        return await self.counters("SIGUSR1", timeout)

    async def wait_listening(self, timeout: float) -> None:
        """Wait until clients can connect. ServerError when it does not come to that."""
        await self._wait(self._listens, timeout)
        if not self._listens():
            raise self._error(f"the server has not said {_LISTENING!r}")

    def _listens(self) -> bool:
        return any(line.startswith(_LISTENING) for line in self.lines)

    async def _wait(self, done: Callable[[], bool], timeout: float) -> None:
        """Until it is done, the time is up, or there will be no more lines."""
        with trio.move_on_after(timeout):
            async with self._changed:
                while not done() and not self._ended.is_set():
                    await self._changed.wait()

    async def stop(self, timeout: float = 20.0) -> dict[str, int]:
        """SIGTERM; its counters. ServerError unless it ends with status 0 and removes its socket."""
        self.popen.send_signal(signal.SIGTERM)
        with trio.move_on_after(timeout):
            await self._ended.wait()
        if not self._ended.is_set():
            raise self._error(f"the server still runs {timeout:g} s after SIGTERM")
        status = self.popen.wait()
        if status:
            raise self._error(f"the server ended with status {status}")
        if self.path.exists():
            raise self._error(f"the server left {self.path} behind")
        return await self.counters("the end")

    async def explain(self, what: str) -> ServerError:
        """An error for a connection that the server has ended, with what the server last wrote."""
        with trio.move_on_after(1):
            await self._ended.wait()
        return self._error(what)

    async def read_output(self) -> None:
        """Collect lines until the server closes its output, which it does when it ends."""
        assert self.popen.stdout is not None
        fd, rest = self.popen.stdout.fileno(), b""
        while data := await _read(fd):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self.take_line(line.decode(errors="replace"))
            async with self._changed:
                self._changed.notify_all()
        self._ended.set()
        async with self._changed:
            self._changed.notify_all()

    def take_line(self, line: str) -> None:
        """A line of the output. Counters come in a block; what is logged meanwhile may stand in it."""
        name, _, value = line.partition(" ")
        if line.startswith(_COUNTERS):
            self._occasion, self._figures = line.removeprefix(_COUNTERS), {}
        elif self._occasion and value.isdecimal():
            self._figures[name] = int(value)
        elif self._occasion and not line:
            self._snapshots[self._occasion] = self._figures
            self._occasion = ""
        else:
            self.lines.append(line)

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{what}\n{self.log()[-_TAIL:]}")


async def _read(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, 65536)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)


def _start(
    words: Sequence[str], netns: str, environment: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    # The kernel ends it should we be killed; the interrupt key is for us alone, who then end it.
    guarded = guarded_words(words, signal.SIGTERM) if shutil.which("setpriv") else words
    popen = subprocess.Popen(
        [*namespace_words(netns), *guarded],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )
    assert popen.stdout is not None
    os.set_blocking(popen.stdout.fileno(), False)
    return popen


@contextlib.asynccontextmanager
async def started(
    command: Sequence[str],
    *,
    netns: str = "",
    environment: Mapping[str, str] | None = None,
    timeout: float = 40.0,
) -> AsyncIterator[ServerProcess]:
    """The server that `command` becomes (by exec), listening; killed at the end if it still runs. Then the
    socket file stays: give a path in a folder of your own. `netns`: in this network namespace.
    `environment` is this process's unless it is given.

    ServerError when it does not listen within `timeout` seconds.
    """
    popen = _start(command, netns, environment)
    server = ServerProcess(popen)
    try:
        async with background() as nursery:
            nursery.start_soon(server.read_output)
            await server.wait_listening(timeout)
            yield server
    finally:
        popen.kill()
        popen.wait()
        assert popen.stdout is not None
        popen.stdout.close()


@contextlib.asynccontextmanager
async def serving(
    model: str,
    path: Path,
    words: Sequence[str] = (),
    *,
    netns: str = "",
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[ServerProcess]:
    """`vfio-user serve MODEL --socket-path PATH --stats WORDS`, as `started`."""
    command = [sys.executable, "-c", _PROGRAM, "serve", model, "--socket-path", str(path), "--stats", *words]
    async with started(command, netns=netns, environment=environment) as server:
        yield server
