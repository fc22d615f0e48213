# SPDX-License-Identifier: BSD-3-Clause
"""Who owes whom a reply, and how far the negotiation is: what a connection knows besides its bytes.

A server may see a second message before it has answered VERSION, because clients need not wait; whoever
sends requests waits for the answer.
"""

from __future__ import annotations

import errno
from enum import Enum

from vfio_user.protocol import constants as c
from vfio_user.protocol.constants import Command, Role
from vfio_user.protocol.errors import LocalProtocolError


class _Version(Enum):
    MISSING = 0
    ASKED = 1
    AGREED = 2


class Exchange:
    """`pending` are our requests that wait for their reply, by message id."""

    def __init__(self, role: Role) -> None:
        self.pending: dict[int, Command] = {}
        self._role = role
        self._version = _Version.MISSING
        self._owed: dict[tuple[int, int], int] = {}
        self._next_id = 0

    @property
    def negotiated(self) -> bool:
        """Whether VERSION has been answered without an error."""
        return self._version is _Version.AGREED

    def agree(self) -> None:
        """VERSION has its answer."""
        self._version = _Version.AGREED

    def refuse(self) -> None:
        """A VERSION was answered with an error: the one under way, or one too many."""
        if self._version is _Version.ASKED:
            self._version = _Version.MISSING

    def clear(self) -> None:
        """Nobody waits for anything any more."""
        self.pending.clear()
        self._owed.clear()

    # Requests of the peer

    def out_of_order(self, command: Command) -> tuple[bool, str]:
        """Whether the peer may not send this now, and why."""
        if command is Command.VERSION:
            again = self._version is not _Version.MISSING or bool(self._role is Role.CLIENT)
            return again, "the version has been negotiated already"
        least = _Version.ASKED if self._role is Role.SERVER else _Version.AGREED
        return self._version.value < least.value, "no version has been negotiated yet"

    def usual(self, command: Command) -> bool:
        """Whether all is agreed, and the command is another than VERSION: it is in order."""
        return self._version is _Version.AGREED and command is not Command.VERSION

    def owe(self, message_id: int, number: int) -> None:
        """A command has come that wants a reply. Ids may repeat: they are the peer's affair."""
        self._owed[message_id, number] = self._owed.get((message_id, number), 0) + 1

    def accept(self, command: Command) -> None:
        """A command of the peer is in order."""
        if command is Command.VERSION:
            self._version = _Version.ASKED

    def settle(self, message_id: int, number: int, no_reply: bool) -> None:
        """A reply goes out. LocalProtocolError when none is due."""
        due = self._owed.get((message_id, number), 0)
        if no_reply or not due:
            raise LocalProtocolError(f"no reply is due to command {int(number)} with id {message_id}")
        self._owed[message_id, number] = due - 1
        if due == 1:
            del self._owed[message_id, number]

    # Our requests

    def check_order(self, command: Command) -> None:
        """LocalProtocolError when we may not send this now."""
        if (command is Command.VERSION) != (self._version is _Version.MISSING):
            raise LocalProtocolError(f"{command.name}: VERSION must be sent first, and once")
        if self._role is Role.SERVER and not self.negotiated:
            raise LocalProtocolError(f"{command.name}: no version has been negotiated yet")

    def new_id(self) -> int:
        """An id that is not used again before its reply has come."""
        if len(self.pending) > c.MAX_MESSAGE_ID:
            raise LocalProtocolError("all message ids wait for their reply", errno.EBUSY)
        while self._next_id in self.pending:
            self._next_id = (self._next_id + 1) & c.MAX_MESSAGE_ID
        message_id = self._next_id
        self._next_id = (message_id + 1) & c.MAX_MESSAGE_ID
        return message_id

    def ask(self, message_id: int, command: Command) -> None:
        """Our request goes out and waits for its reply."""
        self.pending[message_id] = command
        if command is Command.VERSION:
            self._version = _Version.ASKED

    def answered(self, message_id: int) -> Command | None:
        """The command that a reply belongs to, which waits no longer; None when nobody waits for it."""
        command = self.pending.pop(message_id, None)
        if command is Command.VERSION:
            self._version = _Version.MISSING
        return command
