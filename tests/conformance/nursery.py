# SPDX-License-Identifier: BSD-3-Clause
"""Servers in processes of their own, forked from one that has everything imported: 20 ms each, not 600.

For an engine that may hang or crash: a server that hangs is killed by its alarm, and takes nobody with it.
Over its socket a server says that it listens, gives counters when asked, and ends when it is closed.
"""

import contextlib
import json
import logging
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from conformance import patience
from conformance.holdings import Spoiled
from vfio_user.cli.engines import ENGINES
from vfio_user.device_models.backends import NoneBackend
from vfio_user.device_models.catalog import make_device, parse_options
from vfio_user.device_models.device import Device
from vfio_user.server.engines.engine import Engine, Settings

LIFE = 60
"""Seconds after which a server is killed, whatever it is doing, unless its order says otherwise."""

PATIENCE = 20.0
_FORMAT = "%(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True, slots=True)
class Order:
    """What a server is to serve, and where."""

    engine: str
    model: type[Device]
    path: Path
    log: Path
    assignments: tuple[str, ...]
    settings: Settings
    life: int = LIFE


class Child:
    """The parent's end of a server."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines = control.makefile("r")
        try:
            self.pid: int = self._ask("pid", PATIENCE)
        except BaseException:
            self.close()
            raise

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self._ask("counters", patience.seconds)
        return found

    def _ask(self, what: str, seconds: float) -> Any:
        self._control.settimeout(seconds)
        with contextlib.suppress(BrokenPipeError):
            self._control.sendall(what.encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise Spoiled("the server's process has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise Spoiled(f"the server cannot start: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        """It ends then; killed if it does not."""
        self._lines.close()
        self._control.close()


class Zygote:
    """The process that servers are forked from."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        words = [sys.executable, "-c", "from conformance.nursery import main; main()", str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment)
        ours.recv(1)  # it has imported everything: from now on a start takes what a start takes
        self._socket = ours

    def fork(self, order: Order) -> Child:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._socket, [pickle.dumps(order)], [theirs.fileno()])
        return Child(ours)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(PATIENCE)


# In the zygote


def main() -> None:
    """Fork a server for each order that comes; the pickles are of our own parent."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    orders = socket.socket(fileno=int(sys.argv[1]))
    orders.send(b"\n")
    while True:
        data, fds, _, _ = socket.recv_fds(orders, 65536, 1)
        if not data:
            return
        if os.fork() == 0:
            orders.close()
            status = 1
            try:
                status = _serve(pickle.loads(data), socket.socket(fileno=fds[0]))
            finally:
                os._exit(status)
        os.close(fds[0])


def _serve(order: Order, control: socket.socket) -> int:
    signal.alarm(order.life)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    logging.basicConfig(level=logging.INFO, format=_FORMAT)
    try:
        with _made(order) as server:
            trio.run(_run, server, control)
    except Exception as error:
        logging.exception("the server failed")
        with contextlib.suppress(OSError):
            control.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return 1
    return 0


@contextlib.contextmanager
def _made(order: Order) -> Iterator[Engine[Any]]:
    with ENGINES[order.engine](order.settings) as server:
        options = parse_options(order.model, order.assignments)
        server.install(lambda host: make_device(order.model, host, NoneBackend(), options))
        server.listen_at(order.path)
        yield server


async def _run(server: Engine[Any], control: socket.socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        await _answer(server, control)
        nursery.cancel_scope.cancel()


async def _answer(server: Engine[Any], control: socket.socket) -> None:
    """Answer what the parent asks, until it closes."""
    answers: dict[str, Callable[[], Any]] = {"pid": os.getpid, "counters": lambda: dict(server.counters())}
    stream, rest = trio.SocketStream(trio.socket.from_stdlib_socket(control)), b""
    async for data in stream:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            await stream.send_all(json.dumps({"answer": answers[line.decode()]()}).encode() + b"\n")
