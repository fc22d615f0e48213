# SPDX-License-Identifier: BSD-3-Clause
"""The control socket of a server: JSON-RPC 2.0, an object a line, for several controllers at once.

All of it runs in the server's loop, by callbacks of its poller. docs/control.md describes the protocol.
"""

import logging
import os
import socket
import struct
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.json_rpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    BadLine,
    Call,
    LineSplitter,
    RpcError,
    build_error,
    build_result,
    parse_call,
)
from vfio_user.server.control_jobs import Job
from vfio_user.server.control_methods import Control, find_method
from vfio_user.server.engines.engine import Engine
from vfio_user.transport.channel import Channel
from vfio_user.transport.fds import OwnedFd, close_all
from vfio_user.transport.listener import Listener

logger = logging.getLogger(__name__)

MAX_CONTROLLERS = 16
MAX_JOBS = 16
"""Requests of one controller under way at once."""
MAX_FDS = 4
"""That wait for the end of their line."""
_CREDENTIALS = struct.Struct("3i")
_STREAM_METHODS = frozenset({"save", "load"})


def peer_uid(sock: socket.socket) -> int:
    """The user who called connect() (unix(7), SO_PEERCRED)."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def may_control(uid: int, own: int) -> bool:
    """Whether a user may control a server that runs as `own`: itself, and root."""
    return uid in (0, own)


class ControlServer:
    """Listens at `path` until `close`. `shutdown` is called once the server is to end. ListenError."""

    def __init__(
        self, engine: Engine[Any], engine_name: str, path: Path, shutdown: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._control = Control(engine, engine_name, shutdown, self._cut_transfer)
        self._controllers: list[_Controller] = []
        before = os.umask(0o177)  # the file must never be anybody else's to open, not even at first
        try:
            self._listener = Listener.bind(path)
        finally:
            os.umask(before)
        engine.poller.register(self._listener.socket.fileno(), self._accept)

    def close(self) -> None:
        """Cut what is under way, and remove the file."""
        self._engine.poller.unregister(self._listener.socket.fileno())
        self._listener.close()
        for controller in list(self._controllers):
            controller.close("the server ends")

    def _accept(self) -> None:
        try:
            sock = self._listener.accept()
        except OSError as error:
            logger.error("a controller cannot be accepted: %s", error.strerror)
            return
        if sock is None:
            return
        uid = peer_uid(sock)
        if not may_control(uid, os.geteuid()) or len(self._controllers) >= MAX_CONTROLLERS:
            logger.warning("a controller of user %d was turned away", uid)
            sock.close()
            return
        self._controllers.append(_Controller(self._engine, self._control, sock, self._controllers.remove))

    def _cut_transfer(self) -> None:
        for controller in self._controllers:
            controller.cut_transfer("it was cancelled")


class _Controller:
    """One connection, and what it has asked for."""

    def __init__(
        self,
        engine: Engine[Any],
        control: Control,
        sock: socket.socket,
        left: Callable[["_Controller"], None],
    ) -> None:
        self._engine = engine
        self._poller = engine.poller
        self._control = control
        self._channel = Channel(sock)
        self._left = left
        self._lines = LineSplitter()
        self._buffer = memoryview(bytearray(16384))
        self._fds: list[OwnedFd] = []
        """Came with the beginning of a line."""
        self._jobs: dict[Job, str] = {}
        self._open = True
        self._poller.register(self._channel.fileno(), self._receive)

    def close(self, reason: str) -> None:
        """It has gone: what it has asked for and is not done is undone."""
        if not self._open:
            return
        self._open = False
        self._poller.watch_writable(self._channel.fileno(), None)
        self._poller.unregister(self._channel.fileno())
        for job in list(self._jobs):
            job.abort(reason)
        close_all(self._fds)
        self._channel.close()
        self._left(self)

    def cut_transfer(self, reason: str) -> None:
        for job, method in list(self._jobs.items()):
            if method in _STREAM_METHODS:
                job.abort(reason)

    # Requests

    def _receive(self) -> None:
        try:
            received = self._channel.receive_into(self._buffer)
            if received is None:
                return
            if not received[0]:
                self.close("the controller has left")
                return
            self._take(*received)
        except VfioUserError as error:
            logger.info("a controller dropped: %s", error.reason)
            self.close("the controller has left")

    def _take(self, count: int, fds: list[OwnedFd]) -> None:
        """Descriptors belong to the last line that came with them (`Channel.receive_into`)."""
        try:
            lines = self._lines.feed(bytes(self._buffer[:count]))
        except RpcError as error:  # there is no telling where the next request begins
            close_all(fds)
            self._send(build_error(None, error))
            self.close("the controller has sent nonsense")
            return
        held, self._fds = self._fds, []
        for place, line in enumerate(lines):
            last = place == len(lines) - 1 and not self._lines.rest
            given = (held if place == 0 else []) + (fds if last else [])
            self._request(line, given)
        if not lines:
            self._fds = held + fds
            if len(self._fds) > MAX_FDS:
                self.close("the controller has sent nonsense")
        elif self._lines.rest:
            self._fds = fds
        if not self._open:
            close_all(self._fds)
            self._fds = []

    def _request(self, line: bytes, fds: list[OwnedFd]) -> None:
        id = None
        try:
            call = parse_call(line)
            id = call.id
            self._run(call, fds)
        except BadLine as error:
            self._send(build_error(error.id, error))
        except RpcError as error:
            self._send(build_error(id, error))
        except Exception as error:
            logger.exception("a request of a controller failed")
            self._send(build_error(id, RpcError(INTERNAL_ERROR, f"{type(error).__name__}: {error}")))
        finally:
            close_all(fds)

    def _run(self, call: Call, fds: list[OwnedFd]) -> None:
        method = find_method(call.method)
        arguments = method.arguments(call.params)
        if len(fds) != bool(method.stream):
            wanted = f"one descriptor, to be {method.stream}" if method.stream else "no descriptor"
            raise RpcError(INVALID_PARAMS, f"{method.name} takes {wanted}; {len(fds)} came with the request")
        if len(self._jobs) >= MAX_JOBS:
            raise RpcError(INVALID_PARAMS, f"{MAX_JOBS} requests are under way already")
        # A generator that never runs would not close it: so it is taken from `fds` where it is used.
        result = method.run(self._control, arguments, fds.pop() if fds else None)
        if isinstance(result, Generator):
            self._start(call, result)
        else:
            self._answer(call, result, None)

    def _start(self, call: Call, steps: Generator[Any, None, Any]) -> None:
        def done(result: Any, error: RpcError | None) -> None:
            self._jobs.pop(job, None)
            self._answer(call, result, error)

        job = Job(steps, self._poller, self._engine.call_later, done)
        self._jobs[job] = call.method
        job.step()

    # Answers

    def _answer(self, call: Call, result: Any, error: RpcError | None) -> None:
        if not call.notification:
            self._send(build_result(call.id, result) if error is None else build_error(call.id, error))

    def _send(self, line: bytes) -> None:
        if not self._open:
            return
        try:
            self._channel.send((line,))
        except VfioUserError:
            return  # it has gone, which the next read shows
        if self._channel.congested:
            self.close("the controller does not read")
        elif self._channel.pending:
            self._poller.watch_writable(self._channel.fileno(), self._flush)

    def _flush(self) -> None:
        try:
            if self._channel.flush():
                self._poller.watch_writable(self._channel.fileno(), None)
        except VfioUserError:
            self.close("the controller has left")
