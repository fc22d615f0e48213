# SPDX-License-Identifier: BSD-3-Clause
"""The native engine: one device on one socket, served on trio.

Everything that a device waits for (its client, network backends, eventfds, the listening socket) is in
one `Poller`. The loop asks it without waiting while there is work, and for a short spin after; then it
sleeps in trio on the poller's one descriptor. What a message costs is in docs/performance.md: no lock, no
task, no cancel scope and no checkpoint per message.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import trio

from vfio_user.device_models.device import Device, OptionError
from vfio_user.device_models.net import NetDevice
from vfio_user.device_models.timers import NANOSECONDS, Timer, Timers
from vfio_user.protocol import capabilities
from vfio_user.protocol.errors import DeviceError, VfioUserError
from vfio_user.server.engines.spin import Spin
from vfio_user.server.host import ServerHost
from vfio_user.server.session import Session
from vfio_user.transport.channel import Channel, PeerGone
from vfio_user.transport.listener import Listener
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)

ACCEPT_AGAIN = 1_000_000_000  # ns until the next try, when a client could not be accepted
SLICE = 1_000_000  # ns of work before trio's other tasks get a turn


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may choose."""

    spin_us: int = 200
    """How long to look for work before sleeping."""
    trust_client_memory: bool = False
    """Map files that the client could shrink under us (SIGBUS) instead of reading and writing them."""
    max_dma_maps: int = 65535
    max_msg_fds: int = 16
    max_data_xfer_size: int = 1 << 20

    def version(self) -> capabilities.Version:
        return capabilities.Version(
            capabilities=capabilities.Capabilities(
                max_msg_fds=self.max_msg_fds,
                max_data_xfer_size=self.max_data_xfer_size,
                max_dma_maps=self.max_dma_maps,
            )
        )


def _log_failure(error: Exception) -> None:
    logger.error("a callback failed: %s", error, exc_info=error)


class NativeServer:
    """A device and its socket. One client at a time; others wait in the socket's backlog."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.poller = Poller(_log_failure)
        self._timers = Timers(time.monotonic_ns, _log_failure)
        self.host = ServerHost(
            self.poller,
            trust_client_memory=self.settings.trust_client_memory,
            max_dma_maps=self.settings.max_dma_maps,
        )
        self.device: Device | None = None
        self._listener: Listener | None = None
        self._spin = Spin(self.settings.spin_us * 1000)
        self._channel: Channel | None = None
        self._session: Session | None = None
        self.clients_served = 0
        self.client_left: Callable[[], None] | None = None
        """Called when a client has left and what was its own is released."""

    def __enter__(self) -> "NativeServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the client, the memory and every descriptor; the listener is its maker's."""
        self._listener = None
        self._detach()
        self.host.close()
        self.poller.close()

    def install(self, make: Callable[[ServerHost], Device]) -> None:
        """Make the device; before `listen`. DeviceError when the model fails; others are `make`'s own."""
        try:
            self.device = make(self.host)
            self.host.install(self.device)
            self.device.reset()
        except (VfioUserError, OptionError):
            raise
        except Exception as error:
            logger.info("making the device failed", exc_info=True)
            raise DeviceError(f"the device cannot be made: {type(error).__name__}: {error}") from error

    def call_later(self, nanoseconds: int, callback: Callable[[], None]) -> Timer:
        """For backends (`CallLater`): real time, which goes on while the device is stopped."""
        return self._timers.call_at(self._timers.clock() + nanoseconds, callback)

    def counters(self) -> Mapping[str, int]:
        """The device's figures, its network's (`net_...`), the DMA's and ours, by name."""
        wire = self.device.port.counters() if isinstance(self.device, NetDevice) else {}
        net = {f"net_{name}": value for name, value in wire.items()}
        return {**self._figures(), **net, **self.host.counters(), "clients_served": self.clients_served}

    def _figures(self) -> Mapping[str, int]:
        if self.device is None:
            return {}
        try:
            return self.device.counters()
        except Exception:
            logger.exception("the device failed to give its counters")
            return {}

    # Clients

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        self._await_client()

    def _await_client(self) -> None:
        if self._listener is not None:
            self.poller.register(self._listener.socket.fileno(), self._accept)

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
        self._session = Session(self.device, self.host, self._channel, self.settings.version())
        self.poller.register(self._channel.fileno(), self._receive)
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
        self._channel = self._session = None
        logger.info("client %d left", self.clients_served)
        self._await_client()
        if self.client_left is not None:
            self.client_left()

    # The loop

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
            _log_failure(error)
            self._detach()

    def _drop(self, error: VfioUserError) -> None:
        """A client that was killed is nothing to warn of; one that talks nonsense is."""
        level = logging.INFO if isinstance(error, PeerGone) else logging.WARNING
        logger.log(level, "client %d dropped: %s", self.clients_served, error.reason)
        self._detach()

    def _send_owed(self) -> None:
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
                self.poller.register(channel.fileno(), self._receive)
                return
        self.poller.watch_writable(channel.fileno(), self._send_owed)
        if channel.congested:
            self.poller.unregister(channel.fileno())

    def turn(self) -> bool:
        """Do once all that can be done without waiting. Returns whether there was anything to do."""
        host = self.host
        busy = self.poller.poll()
        if host.timers.pending:
            host.timers.run_due()
        if self._timers.pending:
            self._timers.run_due()
        if host.tasks.ready:
            host.tasks.run_ready()
            self._send_owed()
            return True
        if self._channel is not None and self._channel.pending:
            self._send_owed()
        return busy

    def _work(self) -> bool:
        """Take turns until nothing has come for a spin's length. False: a slice of time is over first."""
        start = idle_since = time.monotonic_ns()
        while idle_since - start < SLICE:
            if self.turn():
                idle_since = time.monotonic_ns()
            elif not self._spin.look_again(idle_since):
                return True
        return False

    async def run(self) -> None:
        """Serve until cancelled, or until an adopted connection (`--fd`) has ended."""
        while True:
            idle = self._work()
            if self._listener is None and self._channel is None:
                return
            if idle:
                await self._sleep()
            else:
                await trio.lowlevel.checkpoint()

    async def _sleep(self) -> None:
        deadlines = [
            deadline
            for timers in (self.host.timers, self._timers)
            if (deadline := timers.next_deadline()) is not None
        ]
        if not deadlines:
            await trio.lowlevel.wait_readable(self.poller.fileno())
            return
        wait = (min(deadlines) - time.monotonic_ns()) / NANOSECONDS
        with trio.move_on_after(max(0.0, wait)):
            await trio.lowlevel.wait_readable(self.poller.fileno())
