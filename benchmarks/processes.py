# SPDX-License-Identifier: BSD-3-Clause
"""Servers as processes of their own, on the CPUs where we want them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.client.qemu.process import guarded_words

_START_LIMIT = 10.0  # seconds


class BenchmarkError(Exception):
    """Something that was to be measured did not work; the text says what."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server; `log` has all that it wrote."""

    name: str
    popen: subprocess.Popen[bytes]
    socket_path: Path
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def pin(self, cpus: set[int]) -> None:
        """Put every thread of the process on these CPUs."""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(thread), cpus)

    def connect(self) -> socket.socket:
        """A connected socket, as soon as the server listens. BenchmarkError when it never does."""
        deadline = time.monotonic() + _START_LIMIT
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(self.socket_path))
                return sock
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
            if self.popen.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"{self.name} does not listen: {self.log.read_text()[-500:]}")
            time.sleep(0.01)


def compiled(source: str, folder: Path, *flags: str) -> Path:
    """A program of ours in C (`c/SOURCE.c`), compiled into `folder`. BenchmarkError when it cannot be."""
    program = folder / source
    words = ["gcc", "-O2", "-Wall", "-o", str(program), str(Path(__file__).parent / "c" / f"{source}.c")]
    try:
        subprocess.run([*words, *flags], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise BenchmarkError("there is no gcc: apt-get install gcc libc6-dev") from None
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{source}.c does not compile: {error.stderr[-500:]}") from None
    return program


def our_server(*words: str) -> list[str]:
    """The command line of our own server on `{socket}`."""
    start = "from vfio_user.cli.main import main; main()"
    return [sys.executable, "-c", start, "serve", *words, "--socket-path", "{socket}"]


@contextlib.contextmanager
def server_process(
    name: str, words: Sequence[str], folder: Path, prefix: Sequence[str] = ()
) -> Iterator[ServerProcess]:
    """Starts a server, `{socket}` in `words` replaced by its path; it is dead when the block is left.

    `prefix` is a command that runs it in place of itself, such as nsenter.
    """
    path, log = folder / f"{name}.sock", folder / f"{name}.log"
    filled = [word.replace("{socket}", str(path)) for word in words]
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [*prefix, *guarded_words(filled, signal.SIGKILL)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield ServerProcess(name, popen, path, log)
    except (BenchmarkError, OSError) as error:
        raise BenchmarkError(
            f"{error}; {name} says: {log.read_text()[-500:].strip() or 'nothing'}"
        ) from error
    finally:
        popen.terminate()
        try:
            popen.wait(5)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        path.unlink(missing_ok=True)  # libvfio-user leaves it there when it is killed
