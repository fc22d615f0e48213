# SPDX-License-Identifier: BSD-3-Clause
"""Child processes that end with us, whenever that is."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from vfio_user.client.qemu.process import guarded_words, running

# Forks; the child waits until its parent is dead, and only then becomes the guarded command.
_ORPHAN = """
import os, signal, time
from vfio_user.client.qemu.process import guarded_words
words = guarded_words(["touch", {ran!r}], signal.SIGKILL)
owner = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == owner:
    time.sleep(0.001)
os.execvp(words[0], words)
"""

_OWNER = """
import signal, subprocess, sys
from vfio_user.client.qemu.process import guarded_words
child = subprocess.Popen(guarded_words(["sh", "-c", "echo $$; exec sleep 60"], signal.SIGKILL))
signal.pause()
"""


def test_runs_nothing_when_the_owner_died_before_it_began(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    # The pipe ends when the last process that holds it has ended, the orphan too.
    result = subprocess.run(
        [sys.executable, "-c", _ORPHAN.format(ran=str(ran))], stdout=subprocess.PIPE, check=True
    )
    assert (result.stdout, ran.exists()) == (b"", False)


def test_dies_with_its_owner() -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = os.pidfd_open(int(owner.stdout.readline()))
        owner.kill()
    try:
        assert select.select([child], [], [], 10)[0] == [child]
    finally:
        os.close(child)


async def test_the_pid_is_the_programs_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with running(["sh", "-c", "echo $$"], log) as child:
        assert await child.wait() == 0
        assert child.log_text() == f"{child.pid}\n"


async def test_a_program_that_is_killed(tmp_path: Path) -> None:
    async with running(["sleep", "60"], tmp_path / "log") as child:
        child.signal(signal.SIGTERM)
        assert await child.wait() == -signal.SIGTERM


def test_the_guarded_command_gets_its_words_unchanged() -> None:
    words = guarded_words(["printf", "%s|", "a b", "$HOME", "'"], signal.SIGTERM)
    assert subprocess.run(words, capture_output=True, check=True).stdout == b"a b|$HOME|'|"
