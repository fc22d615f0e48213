# SPDX-License-Identifier: BSD-3-Clause
"""Requests and replies over one socket: many requests under way at once, the server's own served meanwhile.

One background task reads. A request sends at once, without a task or a cancel scope of its own, and
sleeps until the reader has its reply; with `spin` it looks for the reply itself for a while, which saves
the wake-up of an idle CPU.
"""

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

from vfio_user.client.call import Call, FdNumber, owned_fds
from vfio_user.client.errors import RemoteError, ReplyTimeout
from vfio_user.protocol.commands import BY_REQUEST
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import Role
from vfio_user.protocol.errors import RemoteProtocolError, StreamLost, VfioUserError
from vfio_user.protocol.events import BadReply, ErrorReply, Event, Outgoing, Rejected, Reply, Request
from vfio_user.protocol.messages import Message
from vfio_user.transport.channel import Buffer, Channel, PeerGone
from vfio_user.transport.fds import close_all

logger = logging.getLogger(__name__)

Serve = Callable[[Message], Message]
"""Answers a request of the server; a VfioUserError becomes an error reply."""

_FAIR_AFTER = 32  # replies that a spinning caller may take before the other tasks get a turn


class Link:
    """Owns the channel. `timeout` (seconds) and `spin` (seconds) may be changed at any time."""

    def __init__(self, channel: Channel, serve: Serve, *, timeout: float = 5.0, spin: float = 0.0) -> None:
        self.connection = Connection(Role.CLIENT)
        self.timeout = timeout
        self.spin = spin
        self.bad_replies: list[BadReply] = []
        """Replies that could not be used, or that nobody waited for."""
        self.failure: VfioUserError | None = None
        """Why the connection is over."""
        self._channel = channel
        self._serve = serve
        self._calls: dict[int, Call] = {}
        self._over = trio.Event()
        self._unsent = trio.Event()
        self._drained = trio.Event()
        self._taken = 0

    # Requests

    def begin(self, body: Message, fds: Sequence[int] = ()) -> Call:
        """Send a request now; `finish` waits for its reply. LocalProtocolError when it is not allowed."""
        self.check_open()
        message_id, outgoing = self.connection.request(body, tuple(map(FdNumber, fds)))
        call = Call(BY_REQUEST[type(body)].command, trio.current_time() + self.timeout)
        self._calls[message_id] = call
        self._send(outgoing, fds)
        return call

    async def finish(self, call: Call) -> Reply:
        """The reply. RemoteError, ReplyTimeout, RemoteProtocolError, or PeerGone when the server went."""
        if call.result is None and self.spin:
            self._spin(call)
        if call.result is not None:
            await self._give_way()
        else:
            call.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(lambda _: self._abandon(call))
        if isinstance(call.result, Reply):
            return call.result
        assert call.result is not None
        raise call.result

    def post(self, body: Message, fds: Sequence[int] = ()) -> None:
        """Send a command that gets no reply (NO_REPLY)."""
        self.check_open()
        _, outgoing = self.connection.request(body, tuple(map(FdNumber, fds)), no_reply=True)
        self._send(outgoing, fds)

    def send_raw(self, buffers: Sequence[Buffer], fds: Sequence[int] = ()) -> None:
        """Send bytes as they are; a reply to them ends up in `bad_replies`."""
        self.check_open()
        self._transmit(buffers, fds)

    async def drain(self) -> None:
        """Wait while the server leaves too much unread."""
        while self._channel.congested and self.failure is None:
            if self._drained.is_set():  # else others wait for the event that is there
                self._drained = trio.Event()
            await self._drained.wait()

    @property
    def congested(self) -> bool:
        return self._channel.congested

    @property
    def under_way(self) -> int:
        """Requests whose reply may still come in time. The others wait for nothing: a server that hangs would
        never let who asks for this go on."""
        now = trio.current_time()
        return sum(call.deadline > now for call in self._calls.values())

    async def wait_over(self) -> VfioUserError:
        """Wait for the end of the connection, and give its reason."""
        await self._over.wait()
        assert self.failure is not None
        return self.failure

    def check_open(self) -> None:
        """Raise the reason when the connection is over."""
        if self.failure is not None:
            raise PeerGone(self.failure.reason, self.failure.errno) from self.failure

    async def _give_way(self) -> None:
        self._taken += 1
        if self._taken % _FAIR_AFTER:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()

    def _abandon(self, call: Call) -> trio.lowlevel.Abort:
        """The caller is cancelled: its reply will be dropped."""
        call.task = None
        call.abandoned = True
        return trio.lowlevel.Abort.SUCCEEDED

    def _spin(self, call: Call) -> None:
        end = time.perf_counter() + self.spin
        while call.result is None and self.failure is None:
            self._pump()
            if time.perf_counter() > end:
                return
            os.sched_yield()  # a server on the same CPU gets it at once

    # Sending

    def _send(self, outgoing: Outgoing, fds: Sequence[int]) -> None:
        self._transmit(outgoing.buffers, fds)

    def _transmit(self, buffers: Sequence[Buffer], fds: Sequence[int]) -> None:
        try:
            self._channel.send(buffers, fds)
        except PeerGone as error:
            self._end(error)
        if self._channel.pending:
            self._unsent.set()

    async def _flush(self) -> None:
        while True:
            await self._unsent.wait()
            while not self._channel.flush():
                self._wake_drained()
                await self._channel.wait_writable()
            self._wake_drained()
            self._unsent = trio.Event()

    def _wake_drained(self) -> None:
        if not self._channel.congested:
            self._drained.set()

    # Receiving

    async def run(self, nursery: trio.Nursery) -> None:
        """Start what serves the connection."""
        nursery.start_soon(self._guard, self._read)
        nursery.start_soon(self._guard, self._flush)
        nursery.start_soon(self._watch_deadlines)
        await trio.lowlevel.checkpoint()

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            with contextlib.suppress(trio.ClosedResourceError):
                await work()
        except VfioUserError as error:
            self._end(error)

    async def _read(self) -> None:
        while self.failure is None:
            await self._channel.wait_readable()
            self._pump()

    def _pump(self) -> None:
        """Take what has arrived. Runs in the reader, or in a caller that spins."""
        try:
            while self.failure is None and self._receive():
                pass
        except (StreamLost, PeerGone) as error:
            self._end(error)

    def _receive(self) -> bool:
        """One read and what it completes. Whether there may be more to read."""
        room = self.connection.get_buffer()
        size = len(room)
        received = self._channel.receive_into(room)
        if received is None:
            return False
        count, fds = received
        if not count:
            raise PeerGone("the server has closed the connection")
        self.connection.received(count, fds)
        while (event := self.connection.next_event()) is not None:
            self._take(event)
        return count == size

    def _take(self, event: Event) -> None:
        match event:
            case Reply():
                self._settle(event.message_id, event)
            case ErrorReply():
                self._settle(event.message_id, RemoteError(event.command, event.error))
            case Request():
                self._answer(event)
            case Rejected():
                logger.info("request of the server refused: %s", event.reason)
                if not event.no_reply:
                    self._error(event.message_id, event.command_number, event.error)
            case BadReply():
                self.bad_replies.append(event)
                if event.command is not None:
                    self._settle(event.message_id, RemoteProtocolError(event.reason))

    def _settle(self, message_id: int, result: Reply | VfioUserError) -> None:
        call = self._calls.pop(message_id)
        if not call.abandoned:
            call.result = result
        if call.task is not None:
            trio.lowlevel.reschedule(call.task)
            call.task = None
        elif call.abandoned and isinstance(result, Reply):
            close_all(owned_fds(result))

    def _answer(self, request: Request) -> None:
        close_all(owned_fds(request))
        try:
            reply = self._serve(request.body)
        except VfioUserError as error:
            if not request.no_reply:
                self._error(request.message_id, request.command, error.errno)
            return
        if not request.no_reply:
            self._send(self.connection.reply(request, reply), ())

    def _error(self, message_id: int, command: int, errno: int) -> None:
        self._send(self.connection.error(message_id, command, errno), ())

    # The end

    async def _watch_deadlines(self) -> None:
        """One look at all calls now and then is much cheaper than a time-out for each."""
        while self.failure is None:
            await trio.sleep(min(max(self.timeout / 20, 0.005), 0.25))
            now = trio.current_time()
            for call in [call for call in self._calls.values() if call.deadline <= now]:
                self._expire(call)

    def _expire(self, call: Call) -> None:
        if call.result is None and not call.abandoned:
            call.abandoned = True
            call.result = ReplyTimeout(f"{call.command.name}: no reply within {self.timeout:g} s")
            if call.task is not None:
                trio.lowlevel.reschedule(call.task)
                call.task = None

    def _end(self, reason: VfioUserError) -> None:
        if self.failure is not None:
            return
        self.failure = reason
        for message_id in list(self._calls):
            self._settle(message_id, PeerGone(reason.reason, reason.errno))
        self._over.set()
        self._drained.set()

    def close(self) -> None:
        """End the connection; who still waits gets PeerGone. Harmless when done already."""
        self._end(PeerGone("this side has closed the connection"))
        self.connection.close()
        with contextlib.suppress(RuntimeError, ValueError):  # no trio runs, or closed before: nobody waits
            trio.lowlevel.notify_closing(self._channel.fileno())
        self._channel.close()
