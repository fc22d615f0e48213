# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user serve` as a real second process: started, waited for, ended, and its counters read."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vfio_user.client.background import background

_PROGRAM = "from vfio_user.cli.main import main; main()"
_COUNTERS = "# counters: "
_TAIL = 2000


class ServerError(Exception):
    """The server did not start, or did not end as it should; the text has the end of its output."""


@dataclass(slots=True)
class ServerProcess:
    """A running server. `lines` is what it has written so far besides counters, standard error among it."""

    popen: subprocess.Popen[bytes]
    path: Path
    lines: list[str] = field(default_factory=list)
    _snapshots: dict[str, dict[str, int]] = field(default_factory=dict)
    _occasion: str = ""
    _figures: dict[str, int] = field(default_factory=dict)
    _changed: trio.Condition = field(default_factory=trio.Condition)
    _ended: trio.Event = field(default_factory=trio.Event)

    @property
    def pid(self) -> int:
        return self.popen.pid

    async def counters(self, occasion: str, timeout: float = 5.0) -> dict[str, int]:
        """What `--stats` has printed on an occasion: "client 1 has left", "SIGUSR1", "the end".

        All figures count from the server's start. ServerError when they do not come.
        """
        await self._wait(lambda: occasion in self._snapshots, timeout)
        if occasion not in self._snapshots:
            raise self._error(f"the server has printed no counters ({occasion})")
        return self._snapshots[occasion]

    async def ask_counters(self, timeout: float = 5.0) -> dict[str, int]:
        """The figures now (SIGUSR1), after all that clients who have left did."""
        self._snapshots.pop("SIGUSR1", None)
        self.popen.send_signal(signal.SIGUSR1)
        return await self.counters("SIGUSR1", timeout)

    async def wait_line(self, start: str, timeout: float) -> None:
        """Wait until a line begins so. ServerError when it does not come."""
        await self._wait(lambda: any(line.startswith(start) for line in self.lines), timeout)
        if not any(line.startswith(start) for line in self.lines):
            raise self._error(f"the server has not said {start!r}")

    async def _wait(self, done: Callable[[], bool], timeout: float) -> None:
        """Until it is done, the time is up, or there will be no more lines."""
        with trio.move_on_after(timeout):
            async with self._changed:
                while not done() and not self._ended.is_set():
                    await self._changed.wait()

    async def stop(self, timeout: float = 5.0) -> dict[str, int]:
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
                self._take(line.decode(errors="replace"))
            async with self._changed:
                self._changed.notify_all()
        self._ended.set()
        async with self._changed:
            self._changed.notify_all()

    def _take(self, line: str) -> None:
        """Counters come in a block; what is logged meanwhile may stand in it."""
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
        return ServerError(f"{what}\n" + "\n".join(self.lines)[-_TAIL:])


async def _read(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, 65536)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)


def _start(words: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    # The kernel ends it should we be killed; the interrupt key is for us alone, who then end it.
    guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    return subprocess.Popen(
        [*guard, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )


@contextlib.asynccontextmanager
async def serving(
    model: str,
    path: Path,
    words: Sequence[str] = (),
    *,
    timeout: float = 15.0,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[ServerProcess]:
    """`vfio-user serve MODEL --socket-path PATH --stats WORDS`, listening; killed at the end if it still
    runs. Then the socket file stays: give a path in a folder of your own. `environment` is this process's
    unless it is given.

    ServerError when it does not listen within `timeout` seconds.
    """
    command = [sys.executable, "-c", _PROGRAM, "serve", model, "--socket-path", str(path), "--stats", *words]
    popen = _start(command, environment)
    assert popen.stdout is not None
    os.set_blocking(popen.stdout.fileno(), False)
    server = ServerProcess(popen, path)
    try:
        async with background() as nursery:
            nursery.start_soon(server.read_output)
            await server.wait_line("listening on ", timeout)
            yield server
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()
