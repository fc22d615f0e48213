# SPDX-License-Identifier: BSD-3-Clause
"""What a process holds: its descriptors and its mappings of files, from /proc. For tests of leaks."""

import os
from collections import Counter
from pathlib import Path

import trio

from conformance import patience

_LIBRARIES = (".so", ".cache", "locale-archive", "/dev/zero")


def holdings(pid: int) -> Counter[str]:
    """How often each open file, and each mapped file that is no library, is held."""
    return _open_files(pid) + _mapped_files(pid)


def _open_files(pid: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = os.readlink(fd)
        except FileNotFoundError:  # the one that iterdir itself had
            continue
        if not name.startswith("/proc/"):
            found[f"open {name.partition(':[')[0] if name.startswith('socket:') else name}"] += 1
    return found


def _mapped_files(pid: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        name = line[73:].strip()
        if name.startswith("/") and not any(part in name for part in _LIBRARIES):
            found[f"mapped {name}"] += 1
    return found


class Spoiled(AssertionError):
    """A server that does not start, that has ended, or that keeps what its clients should have taken along:
    whatever a test expects, this is something else."""


async def expect_unspoiled(pid: int, before: Counter[str]) -> None:
    """When a test's clients have gone, the process is there and holds what it held."""
    try:
        await expect_holdings(pid, before)
    except (AssertionError, OSError) as error:
        raise Spoiled(f"server {pid}: {error}") from error


async def expect_holdings(pid: int, before: Counter[str]) -> None:
    """The process lets go of everything but `before`, soon."""
    with trio.move_on_after(patience.seconds):
        while holdings(pid) != before:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.002)
        return
    now = holdings(pid)
    raise AssertionError(f"leaked: {dict(now - before)}, lost: {dict(before - now)}")
