# SPDX-License-Identifier: BSD-3-Clause
"""A child process that cannot outlive us: killed when the block ends, and by the kernel when we die.

trio starts children from a worker thread, and the kernel's death signal belongs to the thread that started
the child: with trio it would come when that thread is put away. So the child is started here and now.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio


@dataclass(frozen=True, slots=True)
class Child:
    """A running program; `log` has what it wrote to its standard output and error."""

    popen: subprocess.Popen[bytes]
    pidfd: int
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens when the process has ended."""
        self.popen.send_signal(number)

    async def wait(self) -> int:
        """The exit status (negative: the signal that ended it)."""
        # A copy for each waiter: trio lets only one task wait for a descriptor.
        copy = os.dup(self.pidfd)
        try:
            while (status := self.popen.poll()) is None:
                await trio.lowlevel.wait_readable(copy)
        finally:
            os.close(copy)
        return status

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def namespace_words(netns: str) -> list[str]:
    """Prefix that runs a command in a network namespace of `ip netns`; it execs, so the pid stays."""
    return ["nsenter", f"--net=/run/netns/{netns}", "--"] if netns else []


def guarded_words(words: Sequence[str], number: signal.Signals) -> list[str]:
    """A command that the kernel sends a signal when we die; it execs, so the pid stays.

    The kernel sends nothing for a parent that died before it was asked to: the shell looks once more who the
    parent is, and runs nothing when it is not us any longer.
    """
    still_ours = '[ "$PPID" = "$0" ] && exec "$@"'
    return ["setpriv", "--pdeathsig", number.name[3:], "--", "sh", "-c", still_ours, str(os.getpid()), *words]


@contextlib.asynccontextmanager
async def running(
    words: Sequence[str], log: Path, pass_fds: Sequence[int] = (), netns: str = ""
) -> AsyncIterator[Child]:
    """Starts a program, its output appended to `log`; it is dead and reaped when the block is left."""
    child = _start([*namespace_words(netns), *guarded_words(words, signal.SIGKILL)], log, pass_fds)
    try:
        yield child
    finally:
        with trio.CancelScope(shield=True):
            child.popen.kill()
            await child.wait()
        os.close(child.pidfd)


def _start(words: Sequence[str], log: Path, pass_fds: Sequence[int]) -> Child:
    with log.open("ab") as output:
        popen = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=pass_fds
        )
    try:
        return Child(popen, os.pidfd_open(popen.pid), log)
    except OSError:
        popen.kill()
        popen.wait()
        raise
