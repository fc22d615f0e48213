# SPDX-License-Identifier: BSD-3-Clause
"""One end of a vfio-user connection, without I/O: bytes and file descriptors in, events out, and back.

    view = connection.get_buffer()              # receive into it
    connection.received(nbytes, fds)            # say what came
    while (event := connection.next_event()) is not None: ...

    message_id, outgoing = connection.request(body)
    outgoing = connection.reply(event, body)
    outgoing = connection.error(event.message_id, event.command, errno)

It knows framing, directions, the order of VERSION, ids, and which file descriptors belong to which message.
It does not know devices, and never answers by itself: `Rejected` tells the caller to.

Bodies: small payloads are `bytes`, large ones read-only views of the receive buffer; both are safe to keep
(receive_buffer.py), but a view that is kept holds its whole buffer.

Parsing in place: a server's loop may read REGION_READ and REGION_WRITE from `buffer[start:end]` itself (see
codec.py) and advance `start` past whole messages, while `queued_fds` is false and `negotiated` is true. It
answers them itself too; `reply` and `error` are for what came out of `next_event`.

Errors: `StreamLost` when bytes can no longer be divided into messages; then close the connection.
`LocalProtocolError` when the caller wants to send something wrong. Nothing else is raised.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import NoReturn

from vfio_user.protocol import codec
from vfio_user.protocol import constants as c
from vfio_user.protocol.commands import BY_NUMBER, BY_REQUEST, COMMANDS, Row
from vfio_user.protocol.constants import Command, Role
from vfio_user.protocol.errors import LocalProtocolError, RemoteProtocolError, StreamLost
from vfio_user.protocol.events import (
    BadReply,
    ErrorReply,
    Event,
    Fd,
    Outgoing,
    Rejected,
    Reply,
    Request,
    close_all,
)
from vfio_user.protocol.exchange import Exchange
from vfio_user.protocol.fd_queue import FD_LIMIT_BYTES, FdQueue, Frame, Taken, fd_limit
from vfio_user.protocol.messages import Message, Payload
from vfio_user.protocol.receive_buffer import ReceiveBuffer

_FAR = 1 << 64


class Connection(ReceiveBuffer):
    """`max_message_size` (bytes, with the header) and `max_receive_fds` bound what the peer may send,
    `max_send_fds` what we may; set them again after the negotiation."""

    def __init__(self, role: Role, max_message_size: int = c.DEFAULT_MAX_MESSAGE_SIZE) -> None:
        super().__init__()
        self.role = role
        self.max_message_size = max_message_size
        self.max_receive_fds = c.SCM_MAX_FD
        self.max_send_fds = c.SCM_MAX_FD
        self._fds = FdQueue()
        self._exchange = Exchange(role)
        self._lost = ""

    @property
    def queued_fds(self) -> bool:
        """Whether some message in the buffer has, may get, or is refused for file descriptors."""
        return bool(self._fds)

    @property
    def negotiated(self) -> bool:
        """Whether VERSION has been answered without an error."""
        return self._exchange.negotiated

    @property
    def pending(self) -> int:
        """How many of our requests wait for their reply."""
        return len(self._exchange.pending)

    def close(self) -> None:
        """Close the file descriptors that no event has handed out. The connection is lost afterwards."""
        self._fds.close()
        self._exchange.clear()
        self._lost = self._lost or "the connection has been closed"

    # Receiving

    def get_buffer(self, room: int = 1) -> memoryview:
        """Free space to receive into, at least `room` bytes and the rest of the message under way. Valid
        until `received` or the next `get_buffer`."""
        size = 0
        if self.end - self.start >= c.HEADER_SIZE:
            size = min(codec.HEADER.unpack_from(self.buffer, self.start)[2], self.max_message_size)
        return self.get_room(size, room)

    def received(self, nbytes: int, fds: Sequence[Fd] = (), *, truncated: bool = False) -> None:
        """One read has put `nbytes` bytes into the buffer and brought `fds`, which are ours from now on.
        `truncated`: control data was lost (MSG_CTRUNC), so that StreamLost is raised."""
        if truncated or self._lost:
            close_all(fds)
            self._lose(self._lost or "control data was truncated: too many file descriptors, or none left")
        first = self.position + self.end
        try:
            self.commit(nbytes)
        except ValueError as error:
            close_all(fds)
            raise LocalProtocolError(str(error)) from None
        if fds:
            self._fds.add(fds, first, first + nbytes)
        if self._fds.undecided:
            self._fds.assign(tuple(self._frames()), self.max_receive_fds)

    def feed(self, data: bytes | bytearray | memoryview, fds: Sequence[Fd] = ()) -> list[Event]:
        """One read and all its events. StreamLost is raised by the next call if there are events."""
        if not self._lost:
            self.get_buffer(len(data))[: len(data)] = data
        self.received(len(data), fds)
        events: list[Event] = []
        try:
            while (event := self.next_event()) is not None:
                events.append(event)
        except StreamLost:
            if not events:
                raise
        return events

    def next_event(self) -> Event | None:
        """The next complete message, or None. StreamLost, again and again, when there can be no more."""
        if self._lost:
            self._lose(self._lost)
        start, available = self.start, self.end - self.start
        if available < c.HEADER_SIZE:
            return None
        message_id, number, size, flags, error = codec.HEADER.unpack_from(self.buffer, start)
        if not c.HEADER_SIZE <= size <= self.max_message_size:
            self._lose(f"message of {size} bytes, allowed are {c.HEADER_SIZE} to {self.max_message_size}")
        if available < size or (self._fds.undecided and self._fds.must_wait(next(self._frames()))):
            return None
        self.start = start + size
        taken = self._fds.take(self.position + start)
        body = self.lend(start + c.HEADER_SIZE, start + size)
        if flags & c.TYPE_MASK == c.TYPE_REPLY:
            return self._on_reply(message_id, number, error if flags & c.FLAG_ERROR else None, body, taken)
        return self._on_command(message_id, number, flags, body, taken)

    def _lose(self, reason: str) -> NoReturn:
        self._lost = reason
        self._fds.close()
        raise StreamLost(reason)

    def _frames(self) -> Iterator[Frame]:
        """The messages from `start` on, up to the first whose header is incomplete or wrong."""
        index = self.start
        while index < self.end:
            position = self.position + index
            if self.end - index < c.HEADER_SIZE:
                yield Frame(position, _FAR, None)
                return
            _, number, size, flags, _ = codec.HEADER.unpack_from(self.buffer, index)
            if not c.HEADER_SIZE <= size <= self.max_message_size:
                yield Frame(position, _FAR, 0)
                return
            yield Frame(
                position,
                position + size,
                min(self._fd_limit(index, number, flags, size), self.max_receive_fds),
            )
            index += size

    def _fd_limit(self, index: int, number: int, flags: int, size: int) -> int:
        received = self.buffer[index + c.HEADER_SIZE : min(index + min(size, FD_LIMIT_BYTES), self.end)]
        return fd_limit(self.role, number, flags, received)

    def _on_command(self, message_id: int, number: int, flags: int, body: Payload, taken: Taken) -> Event:
        fds, refused = taken
        no_reply = bool(flags & c.FLAG_NO_REPLY)
        if not no_reply:
            self._exchange.owe(message_id, number)
        try:
            row = self._check_command(number, flags, refused)
            message = codec.parse(row.request, body)
        except RemoteProtocolError as error:
            close_all(fds)
            return Rejected(message_id, number, no_reply, error.errno, error.reason)
        self._exchange.accept(row.command)
        return Request(message_id, row.command, no_reply, message, fds)

    def _check_command(self, number: int, flags: int, refused: bool) -> Row:
        row = BY_NUMBER.get(number)
        if row is None:
            raise RemoteProtocolError(f"unknown command {number}", errno.ENOSYS)
        usual = not flags & c.TYPE_MASK and not refused and self._exchange.usual(row.command)
        if usual and row.sender is not self.role:
            return row  # nearly every message: no reasons are put into words
        name = row.command.name
        version = row.command is Command.VERSION
        for wrong, reason in (
            (flags & c.TYPE_MASK != c.TYPE_COMMAND, f"message type {flags & c.TYPE_MASK}"),
            (row.sender is self.role, "this command goes the other way"),
            (refused, "more file descriptors than this message may have"),
            # What was agreed is in the reply alone (specification: "VFIO_USER_VERSION").
            (version and flags & c.FLAG_NO_REPLY, "it has to be answered, and asks for no reply"),
            self._exchange.out_of_order(row.command),
        ):
            if wrong:
                raise RemoteProtocolError(f"{name}: {reason}")
        return row

    def _on_reply(
        self, message_id: int, number: int, error: int | None, body: Payload, taken: Taken
    ) -> Event:
        fds, refused = taken
        command = self._exchange.answered(message_id)
        try:
            if command is None or command != number or refused:
                raise RemoteProtocolError(_reply_trouble(command, number))
            if error is not None:
                return ErrorReply(message_id, command, error)
            reply = Reply(message_id, command, codec.parse(COMMANDS[command].reply, body), fds)
        except RemoteProtocolError as problem:
            close_all(fds)
            return BadReply(message_id, number, command, problem.reason)
        if command is Command.VERSION:
            self._exchange.agree()
        return reply

    # Sending

    def request(
        self, body: Message, fds: Sequence[Fd] = (), *, no_reply: bool = False
    ) -> tuple[int, Outgoing]:
        """A command with a new message id, which is not used again before its reply has come."""
        row = BY_REQUEST.get(type(body))
        if row is None or row.sender is not self.role:
            raise LocalProtocolError(f"{type(body).__name__} is no request of the {self.role.name.lower()}")
        self._exchange.check_order(row.command)
        if no_reply and row.command is Command.VERSION:
            raise LocalProtocolError("VERSION: what is agreed comes with the reply")
        self._check_fds(row.command, fds, row.request_fds)
        parts = codec.build_parts(body)
        message_id = self._exchange.new_id()
        flags = c.FLAG_NO_REPLY if no_reply else c.TYPE_COMMAND
        outgoing = _outgoing(message_id, row.command, flags, parts, fds)
        if not no_reply:
            self._exchange.ask(message_id, row.command)
        return message_id, outgoing

    def reply(self, request: Request, body: Message, fds: Sequence[Fd] = ()) -> Outgoing:
        """The answer to a `Request`, once; LocalProtocolError when none is due, as for NO_REPLY."""
        row = COMMANDS[request.command]
        if type(body) is not row.reply:
            raise LocalProtocolError(f"{type(body).__name__} is no reply to {request.command.name}")
        self._check_fds(request.command, fds, row.reply_fds)
        parts = codec.build_parts(body)
        self._exchange.settle(request.message_id, request.command, request.no_reply)
        if request.command is Command.VERSION:
            self._exchange.agree()
        return _outgoing(request.message_id, request.command, c.TYPE_REPLY, parts, fds)

    def error(self, message_id: int, command: int, errno: int) -> Outgoing:
        """The error reply to a `Request` or a `Rejected`: the header alone (specification: "Header").
        LocalProtocolError when no reply is due, as for NO_REPLY."""
        header = codec.pack_error(message_id, command, errno)
        self._exchange.settle(message_id, command, False)
        if command == Command.VERSION:
            self._exchange.refuse()
        return Outgoing((header,))

    def _check_fds(self, command: Command, fds: Sequence[Fd], limits: tuple[int, int]) -> None:
        most = min(limits[1], self.max_send_fds)
        if not limits[0] <= len(fds) <= most:
            raise LocalProtocolError(
                f"{command.name}: {len(fds)} file descriptors, at most {most} are allowed"
            )


def _reply_trouble(command: Command | None, number: int) -> str:
    if command is None:
        return f"a reply to command {number} that nobody waits for"
    if command != number:
        return f"a reply to command {number} has the id of our {command.name}"
    return f"{command.name}: more file descriptors than the reply may have"


def _outgoing(
    message_id: int, command: Command, flags: int, parts: tuple[Payload, ...], fds: Sequence[Fd]
) -> Outgoing:
    size = c.HEADER_SIZE + sum(map(len, parts))
    header = codec.pack_header(message_id, command, size, flags)
    if not parts:
        return Outgoing((header,), tuple(fds))
    return Outgoing((header + parts[0], *parts[1:]), tuple(fds))
