# SPDX-License-Identifier: BSD-3-Clause
"""What a `Connection` hands out: events that came in, bytes that go out.

File descriptors are opaque objects with `close()`. Whoever takes an event out of the connection owns its
`fds` and closes each exactly once; `Outgoing.fds` belong to whoever called `request` or `reply`, and have
to live until the message has been sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from vfio_user.protocol.constants import Command
from vfio_user.protocol.messages import Message, Payload


class Fd(Protocol):
    """A file descriptor that somebody owns (transport/fds.py has the real one)."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A command of the peer. Answer it with `reply` or `error` exactly once, unless `no_reply` is set."""

    message_id: int
    command: Command
    no_reply: bool
    body: Message
    fds: tuple[Fd, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to our request of this id; the id is free again."""

    message_id: int
    command: Command
    body: Message
    fds: tuple[Fd, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Our request of this id failed. `error` is an errno and may be 0 (specification: "Header")."""

    message_id: int
    command: Command
    error: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A command that is well framed and wrong: answer it with `error`, unless `no_reply` is set. Its file
    descriptors are closed already. `command_number` may be no `Command`."""

    message_id: int
    command_number: int
    no_reply: bool
    error: int
    reason: str


@dataclass(frozen=True, slots=True)
class BadReply:
    """A reply that cannot be used; nothing is to be sent, its file descriptors are closed already.

    `command` is that of our request which is over with this, or None when nobody waits for this id.
    """

    message_id: int
    command_number: int
    command: Command | None
    reason: str


Event: TypeAlias = Request | Reply | ErrorReply | Rejected | BadReply


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to send: its bytes in order, bulk payloads not copied, and the fds beside them. Send it
    with one `sendmsg` (QEMU does not accept a split header), and no fds with what may follow."""

    buffers: tuple[Payload, ...]
    fds: tuple[Fd, ...] = ()

    @property
    def size(self) -> int:
        return sum(map(len, self.buffers))


def close_all(fds: Iterable[Fd]) -> None:
    for fd in fds:
        fd.close()
