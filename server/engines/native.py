# SPDX-License-Identifier: BSD-3-Clause
"""The native engine: our own protocol, session and handlers on one socket."""

import logging
import socket
from contextlib import ExitStack
from pathlib import Path

from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.engines.engine import Engine, Settings, log_failure
from vfio_user.server.host import ServerHost
from vfio_user.server.session import Session
from vfio_user.transport.channel import Channel, PeerGone
from vfio_user.transport.listener import Listener
from vfio_user.transport.poller import Poller

__all__ = ["NativeServer", "Settings"]

logger = logging.getLogger(__name__)

ACCEPT_AGAIN = 1_000_000_000  # ns until the next try, when a client could not be accepted


class NativeServer(Engine[ServerHost]):
    """A device and its socket. One client at a time; others wait in the socket's backlog."""

    def __init__(self, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        poller = Poller(log_failure)
        host = ServerHost(
            poller,
            trust_client_memory=settings.trust_client_memory,
            max_dma_maps=settings.max_dma_maps,
        )
        super().__init__(host, poller, settings)
        self._owned = ExitStack()
        self._listener: Listener | None = None
        self._channel: Channel | None = None
        self._session: Session | None = None

    def close(self) -> None:
        """Let go of the client, the memory and every descriptor; a listener of `listen` is its maker's."""
        self._listener = None
        self._detach()
        self._owned.close()
        super().close()

    # Clients

    def listen_at(self, path: Path) -> None:
        listener = Listener.bind(path)
        self._owned.callback(listener.close)
        self.listen(listener)

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        self._await_client()

    def _await_client(self) -> None:
        if self._listener is not None:
            self.poller.register(self._listener.socket.fileno(), self._accept)

    def adopt_fd(self, fd: int) -> None:
        self.adopt(Listener.adopt(fd))

    def adopt(self, inherited: Listener | socket.socket) -> None:
        """Take a socket that somebody else made (`--fd`): a listening one, or a client that is there."""
        if isinstance(inherited, Listener):
            self.listen(inherited)
        else:
            self._attach(inherited)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client = self._listener.accept()
        except OSError as error:  # too many open files, for one: the client waits
            logger.error("a client cannot be accepted: %s", error.strerror)
            self.poller.unregister(self._listener.socket.fileno())
            self.call_later(ACCEPT_AGAIN, self._await_client)
            return
        if client is not None:
            self.poller.unregister(self._listener.socket.fileno())
            self._attach(client)

    def _attach(self, sock: socket.socket) -> None:
        assert self.device is not None
        self.clients_served += 1
        self._channel = Channel(sock)
        self._client_fd = self._channel.fileno()
        self._session = Session(self.device, self.host, self._channel, self.settings.version())
        self.poller.register(self._channel.fileno(), self._receive, urgent=True)
        logger.info("client %d attached", self.clients_served)

    def _detach(self) -> None:
        """The client is gone: its mappings and descriptors too; the device keeps its state, stopped."""
        if self._channel is None or self._session is None:
            return
        self.poller.watch_writable(self._channel.fileno(), None)
        self.poller.unregister(self._channel.fileno())
        self.host.detach()
        self._session.close()
        self._channel.close()
        self._channel = self._session = self._client_fd = None
        logger.info("client %d left", self.clients_served)
        self._await_client()
        if self.client_left is not None:
            self.client_left()

    @property
    def outstanding(self) -> int:
        return 0 if self._session is None else self._session.outstanding

    @property
    def unread(self) -> int:
        """Also what waits for the rest of its message, or for the client to read replies."""
        if self._session is None:
            return 0
        connection = self._session.connection
        return super().unread + connection.end - connection.start

    @property
    def session(self) -> Session | None:
        """That of the client, if one is there."""
        return self._session

    # The loop

    @property
    def ended(self) -> bool:
        return self._listener is None and self._channel is None

    def _receive(self) -> None:
        """Take what the client has sent, answer all of it, and only then let rings be walked."""
        channel, session = self._channel, self._session
        assert channel is not None
        assert session is not None
        try:
            received = channel.receive_into(session.connection.get_buffer())
            if received is None:
                return
            if not received[0]:
                self._detach()
                return
            session.receive(*received)
        except VfioUserError as error:
            self._drop(error)
        except Exception as error:  # a mistake of ours: rather lose this client than all that follow
            log_failure(error)
            self._detach()

    def _drop(self, error: VfioUserError) -> None:
        """A client that was killed is nothing to warn of; one that talks nonsense is."""
        level = logging.INFO if isinstance(error, PeerGone) else logging.WARNING
        logger.log(level, "client %d dropped: %s", self.clients_served, error.reason)
        self._detach()

    def send_owed(self) -> None:
        """Send what tasks have asked of the client, and mind a client that does not read its replies."""
        channel, session = self._channel, self._session
        if channel is None or session is None:
            return
        try:
            session.flush()
            if channel.pending:
                self._mind_backlog(channel, session)
        except VfioUserError as error:
            self._drop(error)

    def _mind_backlog(self, channel: Channel, session: Session) -> None:
        """Replies wait for the client to read: send them when they go, and take nothing new until then."""
        while channel.flush():
            session.serve()  # requests that had to wait
            if not channel.pending:
                self.poller.watch_writable(channel.fileno(), None)
                self.poller.register(channel.fileno(), self._receive, urgent=True)
                return
        self.poller.watch_writable(channel.fileno(), self.send_owed)
        if channel.congested:
            self.poller.unregister(channel.fileno())

    def while_idle(self) -> None:
        """Make ready what a client that reads the device's state will ask for next."""
        if self._channel is not None and not self._channel.pending:
            self.host.migration.prepare()

    def turn(self) -> bool:
        """Do once all that can be done without waiting. Returns whether there was anything to do."""
        tasks = self.host.tasks
        busy = self.poller.poll()
        self.run_timers()
        if tasks.ready:
            tasks.run_ready()
            self.send_owed()
            return True
        if self._channel is not None and self._channel.pending:
            self.send_owed()
        return busy
