# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's machine protocol (QMP) on trio, over the QEMU project's own library `qemu.qmp`.

    async with open_qmp("/run/qemu.qmp") as qmp:
        with qmp.listen("STOP") as events:
            await qmp.execute("stop")
            event = await events.next()

QEMU serves one client of a monitor at a time: with another one connected there is no greeting (QmpLost).
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio
from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from vfio_user.client.qemu_migration.asyncio_thread import AsyncioThread, asyncio_thread
from vfio_user.transport.connector import AGAIN, new_socket, try_connect
from vfio_user.transport.listener import SUN_PATH_SIZE

# What the library says in its log is in our errors as well: without a handler it would go to standard error.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

MAX_ANSWER = 16 << 20
"""Longest line that is taken from QEMU, in bytes."""


class QmpError(Exception):
    """QEMU refused a command; `error_class` and `description` are its own words."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command, self.error_class, self.description = command, error_class, description


class QmpLost(Exception):
    """QEMU cannot be reached, or the connection has ended; whether a command was executed is not known."""


@dataclass(frozen=True, slots=True)
class Event:
    """What QEMU tells unasked (`MIGRATION`, `STOP`, …); `time` is QEMU's clock in seconds since 1970."""

    name: str
    data: Mapping[str, Any]
    time: float


class Events:
    """The events of some names from a moment on: `await events.next()`, or `async for`, which never ends."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._put, self._get = trio.open_memory_channel[Event](math.inf)
        self._reason = ""

    async def next(self) -> Event:
        """The next event. QmpLost when the connection has ended and all that came before is taken."""
        try:
            return await self._get.receive()
        except trio.EndOfChannel:
            raise QmpLost(self._reason) from None

    def ready(self) -> list[Event]:
        """Those that have come and were not taken."""
        count = self._get.statistics().current_buffer_used
        return [self._get.receive_nowait() for _ in range(count)]

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> Event:
        return await self.next()

    def take(self, event: Event) -> None:
        if not self._names or event.name in self._names:
            self._put.send_nowait(event)

    def end(self, reason: str) -> None:
        self._reason = reason
        self._put.close()


class Qmp:
    """One connection; commands may be given by several tasks at once, QEMU executes them in order.

    An event that QEMU sent before the answer to a command is delivered before that answer.
    """

    def __init__(self, address: str, thread: AsyncioThread) -> None:
        self.address = address
        self.lost = trio.Event()
        """Set when the connection has ended; `lost_reason` says why."""
        self.lost_reason = ""
        self._thread = thread
        self._session = _Session(self)
        self._events: list[Events] = []

    async def execute(self, name: str, /, **args: Any) -> Any:
        """The answer to a command. Names with a dash: `**{"downtime-limit": 20}`. QmpError, QmpLost."""
        return (await self.execute_all([(name, args)]))[0]

    async def execute_all(self, commands: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
        """The answers to several commands for the price of little more than one: QEMU has them all at once.

        QmpError of the first that QEMU refuses; those behind it are executed all the same. QmpLost.
        """
        if self.lost.is_set():
            raise QmpLost(self.lost_reason)
        return await self._thread.run(self._session.execute_all(commands))

    async def execute_at_once(self, name: str, /, **args: Any) -> Any:
        """As `execute`, before all that waits, and also when QEMU's main loop hangs: out of band, which few
        commands may be. QmpError, QmpLost."""
        if self.lost.is_set():
            raise QmpLost(self.lost_reason)
        return await self._thread.run(self._session.execute_at_once(name, args))

    async def hmp(self, line: str) -> str:
        """What the human monitor prints for a line, complaints included. QmpError, QmpLost."""
        return (await self.hmp_all([line]))[0]

    async def hmp_all(self, lines: Sequence[str]) -> list[str]:
        """What the human monitor prints for each of several lines, which QEMU gets all at once."""
        answers = await self.execute_all(
            [("human-monitor-command", {"command-line": line}) for line in lines]
        )
        return [str(answer) for answer in answers]

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[Events]:
        """The events of these names (of all without one) from now on."""
        events = Events(names)
        self._events.append(events)
        if self.lost.is_set():
            events.end(self.lost_reason)
        try:
            yield events
        finally:
            self._events.remove(events)

    async def wait_event(self, *names: str) -> Event:
        """The next event of these names. Use `listen` around a command whose event must not be missed."""
        with self.listen(*names) as events:
            return await events.next()

    def take_event(self, event: Event) -> None:
        """From the session, in trio's thread."""
        for events in self._events:
            events.take(event)

    def lose(self, reason: str) -> None:
        """From the session, in trio's thread: the connection has ended."""
        self.lost_reason = reason
        for events in self._events:
            events.end(reason)
        self.lost.set()


async def _connect_path(path: str) -> socket.socket:
    """In the asyncio loop, which would take a socket at a full backlog for one that is connected."""
    with contextlib.ExitStack() as failed:
        sock = failed.enter_context(new_socket())
        while not try_connect(sock, path):  # noqa: ASYNC110 - nobody tells when there is room
            await asyncio.sleep(AGAIN)
        failed.pop_all()
    return sock


class _Session(EventListener):
    """The side that lives in the asyncio loop; what it tells trio goes there in order."""

    def __init__(self, qmp: Qmp) -> None:
        super().__init__()
        self._qmp = qmp
        self._token = trio.lowlevel.current_trio_token()
        self._client = QMPClient(readbuflen=MAX_ANSWER)
        self._client.events.event_filter = lambda _event: False  # it would keep every event for ever
        self._client.register_listener(self)
        self._closing: asyncio.Event | None = None

    async def connect(self, address: str | tuple[str, int]) -> None:
        with contextlib.ExitStack() as failed:
            where = (
                failed.enter_context(await _connect_path(address)) if isinstance(address, str) else address
            )
            await self._connect_client(where)
            failed.pop_all()  # the socket is the client's now
        self._closing = asyncio.Event()
        self._watcher = asyncio.create_task(self._watch(self._closing))

    async def _connect_client(self, where: socket.socket | tuple[str, int]) -> None:
        try:
            await self._client.connect(where)
        except AssertionError:
            # The library's own. Its tasks have to be asked what they have met, or asyncio complains.
            with contextlib.suppress(EOFError, OSError, QMPError):
                await self._client.disconnect()
            raise ValueError("the connection ended right after the greeting") from None

    async def close(self) -> None:
        if self._closing is not None:
            self._closing.set()
            await self._watcher

    async def execute_all(self, commands: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Any]:
        # Tasks begin in the order in which gather makes them, and sending is the first thing that they do.
        answers = await asyncio.gather(
            *(self._execute(*command) for command in commands), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def execute_at_once(self, name: str, args: Mapping[str, Any]) -> Any:
        return await self._execute(name, args, at_once=True)

    async def _execute(self, name: str, args: Mapping[str, Any], *, at_once: bool = False) -> Any:
        try:
            return await self._client.execute(name, args, oob=at_once)
        except ExecuteError as error:
            raise QmpError(name, error.error_class, str(error)) from None
        except QMPError as error:
            raise QmpLost(f"{self._qmp.address}: the connection ended during {name}") from error

    async def put(self, event: Message) -> None:
        """Called by the library for every event."""
        self._tell(self._qmp.take_event, _parse_event(dict(event)))

    async def _watch(self, closing: asyncio.Event) -> None:
        """Waits for the end of the connection from either side, puts it away and tells."""
        ends = [asyncio.create_task(closing.wait()), asyncio.create_task(self._wait_end())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        reason = "closed"
        try:
            await self._client.disconnect()
        except (EOFError, OSError, QMPError) as error:
            reason = f"QEMU has ended the connection {error}".strip()
        self._tell(self._qmp.lose, f"{self._qmp.address}: {reason}")

    async def _wait_end(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    def _tell(self, function: Any, *args: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)


def _parse_event(message: Mapping[str, Any]) -> Event:
    clock = message.get("timestamp", {})
    time = clock.get("seconds", 0) + clock.get("microseconds", 0) / 1e6
    return Event(message["event"], message.get("data", {}), time)


def parse_address(address: str) -> str | tuple[str, int]:
    """A UNIX socket's path, or host and port from HOST:PORT, [V6]:PORT. What has a slash is a path.
    ValueError, in one line, for what is neither."""
    host, colon, port = address.rpartition(":")
    if "/" in address or not colon or not port.isdecimal():
        if not address or len(os.fsencode(address)) > SUN_PATH_SIZE:
            raise ValueError(f"the QMP address {address!r} is no path of a socket, and no HOST:PORT")
        return address
    if not host or not 1 <= int(port) <= 0xFFFF:
        raise ValueError(f"the QMP address {address!r} needs a host, and a port from 1 to 65535")
    return host.strip("[]"), int(port)


@contextlib.asynccontextmanager
async def open_qmp(address: str, timeout: float = 5.0) -> AsyncIterator[Qmp]:
    """A connection to QEMU's monitor at a UNIX socket's path or HOST:PORT. QmpLost: none to be had."""
    with asyncio_thread() as thread:
        qmp = Qmp(address, thread)
        try:
            await _connect(qmp, timeout)
            yield qmp
        finally:
            with trio.CancelScope(shield=True):
                await thread.run(qmp._session.close())


async def _connect(qmp: Qmp, timeout: float) -> None:
    with trio.move_on_after(timeout) as scope:
        try:
            await qmp._thread.run(qmp._session.connect(parse_address(qmp.address)))
        except (ConnectError, OSError, ValueError) as error:
            raise QmpLost(f"{qmp.address} cannot be connected to: {_cause(error)}") from error
    if scope.cancelled_caught:
        raise QmpLost(f"{qmp.address}: no greeting within {timeout:g} s; does it serve another client?")


def _cause(error: BaseException) -> str:
    cause = error.exc if isinstance(error, ConnectError) else error
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    return "it is no QMP monitor" if isinstance(cause, QMPError) else str(cause) or "the connection ended"
