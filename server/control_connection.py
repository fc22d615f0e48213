# SPDX-License-Identifier: BSD-3-Clause
"""One controller's connection: its lines, the jobs that it has asked for, and a stream over it."""

import logging
import socket
from collections.abc import Callable, Generator
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
from vfio_user.server.control_inline import InlineSink, InlineSource
from vfio_user.server.control_jobs import Job
from vfio_user.server.control_method import Arguments, Method
from vfio_user.server.control_methods import Control, find_method
from vfio_user.server.control_streams import StreamFd
from vfio_user.server.engines.engine import Engine
from vfio_user.transport.channel import Channel
from vfio_user.transport.fds import OwnedFd, close_all

logger = logging.getLogger(__name__)

MAX_JOBS = 16
"""Requests of one controller under way at once."""
MAX_FDS = 4
"""That wait for the end of their line."""
LEFT = "the controller has left"
_STREAM_METHODS = frozenset({"save", "load"})


class Controller:
    """One connection, and what it has asked for. `left` is told once it is closed."""

    def __init__(
        self,
        engine: Engine[Any],
        control: Control,
        sock: socket.socket,
        left: Callable[["Controller"], None],
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
        self._streaming = False
        """A state goes over the connection: what comes is no request."""
        self._ending = False
        """It is closed once the last answer is out."""
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
        self._control.leases.leave(self)
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
                self.close(LEFT)
                return
            self._take(*received)
        except VfioUserError as error:
            logger.info("a controller dropped: %s", error.reason)
            self.close(LEFT)

    def _take(self, count: int, fds: list[OwnedFd]) -> None:
        """Descriptors belong to the last line that came with them (`Channel.receive_into`)."""
        self._lines.put(bytes(self._buffer[:count]))
        held, self._fds = self._fds, []
        try:
            while self._takes_lines and (line := self._lines.take()) is not None:
                if fds and not self._lines.rest.strip():
                    held, fds = held + fds, []
                self._request(line, held)
                held = []
        except RpcError as error:  # there is no telling where the next request begins
            self._send(build_error(None, error))
            self.close("the controller has sent nonsense")
        self._fds = held + fds
        if not self._open:
            close_all(self._fds)
        elif len(self._fds) > MAX_FDS or (self._streaming and self._lines.rest):
            self.close("the controller has sent nonsense")

    @property
    def _takes_lines(self) -> bool:
        return self._open and not self._streaming and not self._ending

    def _request(self, line: bytes, fds: list[OwnedFd]) -> None:
        call = None
        try:
            call = parse_call(line)
            self._run(call, fds)
        except BadLine as error:
            self._send(build_error(error.id, error))
        except RpcError as error:
            self._refuse(call, error)
        except Exception as error:
            logger.exception("a request of a controller failed")
            self._refuse(call, RpcError(INTERNAL_ERROR, f"{type(error).__name__}: {error}"))
        finally:
            close_all(fds)

    def _refuse(self, call: Call | None, error: RpcError) -> None:
        """After a load over the connection comes a stream, which may not be read as requests."""
        self._send(build_error(None if call is None else call.id, error))
        if call is not None and call.method == "load" and call.params.get("inline"):
            self._end()

    def _run(self, call: Call, fds: list[OwnedFd]) -> None:
        method = find_method(call.method)
        arguments = method.arguments(call.params)
        inline = bool(arguments.get("inline"))
        if len(fds) != (bool(method.stream) and not inline):
            raise RpcError(INVALID_PARAMS, _wanted(method, inline, len(fds)))
        if len(self._jobs) >= MAX_JOBS:
            raise RpcError(INVALID_PARAMS, f"{MAX_JOBS} requests are under way already")
        if inline:
            self._run_inline(call, method, arguments)
            return
        # A generator that never runs would not close it: so it is taken from `fds` where it is used.
        stream = StreamFd(fds.pop(), writing=method.stream == "written") if method.stream else None
        result = method.run(self._control, arguments, stream)
        self._note_lease(method, arguments)
        if isinstance(result, Generator):
            self._start(call, result, lambda value, error: self._answer(call, value, error))
        else:
            self._answer(call, result, None)

    def _note_lease(self, method: Method, arguments: Arguments) -> None:
        if (end := method.end) is not None:
            leased = (lambda: end(self._control)) if arguments["lease"] else None
            self._control.leases.note(method.name, self, leased)

    def _start(
        self,
        call: Call,
        steps: Generator[Any, None, Any],
        answer: Callable[[Any, RpcError | None], None],
    ) -> None:
        def done(result: Any, error: RpcError | None) -> None:
            self._jobs.pop(job, None)
            answer(result, error)

        job = Job(steps, self._poller, self._engine.call_later, done)
        self._jobs[job] = call.method
        job.step()

    # A stream over the connection

    def _run_inline(self, call: Call, method: Method, arguments: Arguments) -> None:
        if self._jobs or call.notification:
            raise RpcError(INVALID_PARAMS, "a stream needs a connection of its own, and a request with an id")
        run = self._save_inline if method.stream == "written" else self._load_inline
        run(call, method, arguments)

    def _save_inline(self, call: Call, method: Method, arguments: Arguments) -> None:
        sink = InlineSink(self._channel, lambda: self._answer(call, {"stream": True}, None))
        self._streaming = True

        def answer(result: Any, error: RpcError | None) -> None:
            if sink.begun:
                self._end()  # what has become of it is in `state`
                return
            self._streaming = False
            self._answer(call, result, error)

        self._start(call, method.run(self._control, arguments, sink), answer)

    def _load_inline(self, call: Call, method: Method, arguments: Arguments) -> None:
        source = InlineSource(self._channel, self._lines.take_rest())
        self._streaming = True
        self._poller.unregister(self._channel.fileno())  # what comes, and the end of it, is the source's

        def answer(result: Any, error: RpcError | None) -> None:
            self._answer(call, result, error)
            self._end()

        self._start(call, method.run(self._control, arguments, source), answer)

    def _end(self) -> None:
        """Close once all is sent; what comes is not read any more."""
        self._ending = True
        self._poller.unregister(self._channel.fileno())
        if not self._channel.pending:
            self.close("the connection has served its purpose")

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
                if self._ending:
                    self.close("the connection has served its purpose")
        except VfioUserError:
            self.close(LEFT)


def _wanted(method: Method, inline: bool, came: int) -> str:
    if not method.stream or inline:
        return f"{method.name} takes no descriptor{' inline' * inline}; {came} came with the request"
    wanted = f"one descriptor, to be {method.stream}, or inline=true"
    return f"{method.name} takes {wanted}; {came} came with the request"
