# SPDX-License-Identifier: BSD-3-Clause
"""The control socket of a server: JSON-RPC 2.0, an object a line, for several controllers at once.

All of it runs in the server's loop, by callbacks of its poller. docs/control.md describes the protocol.
"""

import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfio_user.server.control_connection import Controller
from vfio_user.server.control_methods import Control
from vfio_user.server.engines.engine import Engine
from vfio_user.transport.listener import Listener

logger = logging.getLogger(__name__)

MAX_CONTROLLERS = 16
_CREDENTIALS = struct.Struct("3i")


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
        self._controllers: list[Controller] = []
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
        if reason := self._why_not(uid):
            logger.warning("a controller of user %d was turned away: %s", uid, reason)
            sock.close()
            return
        self._controllers.append(Controller(self._engine, self._control, sock, self._controllers.remove))

    def _why_not(self, uid: int) -> str:
        if not may_control(uid, os.geteuid()):
            return f"only user {os.geteuid()} and root may control this server"
        if len(self._controllers) >= MAX_CONTROLLERS:
            return f"{MAX_CONTROLLERS} are connected already"
        return ""

    def _cut_transfer(self) -> None:
        for controller in list(self._controllers):
            controller.cut_transfer("it was cancelled")
