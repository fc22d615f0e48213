# SPDX-License-Identifier: BSD-3-Clause
"""The second engine: libvfio-user, a library in C, speaks the protocol; our devices serve it unchanged.

The library serves one request at a time, synchronously, and calls back for accesses, memory, interrupts and
reset. Its descriptor is in our poller, so that trio waits for it like for everything else. Tasks run between
requests, so a device is quiescent in every callback. What the library cannot do is in
`libvfio_user_limits`.
"""

import errno
import logging
import os
from pathlib import Path

from vfio_user.protocol.errors import DeviceError
from vfio_user.server.engines.engine import Engine, Settings, log_failure
from vfio_user.server.engines.libvfio_user_callbacks import Callbacks
from vfio_user.server.engines.libvfio_user_context import Context
from vfio_user.server.engines.libvfio_user_host import LibraryHost
from vfio_user.server.engines.libvfio_user_library import Library
from vfio_user.transport.listener import ListenError, SocketFile, clear_path, listen_unseen
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)

BATCH = 64
"""Requests between two looks at everything else."""


class LibvfioUserServer(Engine[LibraryHost]):
    """A device and its socket, which is the library's."""

    def __init__(self, library: Library, settings: Settings | None = None) -> None:
        poller = Poller(log_failure)
        super().__init__(LibraryHost(poller), poller, settings or Settings())
        self._library = library
        self._context: Context | None = None
        self._file: SocketFile | None = None
        self._client_fd: int | None = None

    def close(self) -> None:
        self._close_context()
        super().close()

    def _close_context(self) -> None:
        if self._context is not None and self._file is not None:
            self._context.destroy()
            self._file.remove()
        self._context = self._file = None

    @property
    def ended(self) -> bool:
        return self._context is None

    # Clients

    def listen_at(self, path: Path) -> None:
        assert self.device is not None
        clear_path(path)
        try:
            # The library of v2 removes the file of the name that it was given, whosever it is by then.
            context = listen_unseen(path, lambda path: Context(self._library, path), Context.destroy)
        except OSError as error:
            raise ListenError.at(path, error) from error
        self._context, self._file = context, SocketFile(path)
        self.host.connect(context)
        Callbacks(context, self.host, self.device, self._client_lost).set_up(self.settings.max_dma_maps)
        self._await_client(context)

    def adopt_fd(self, fd: int) -> None:
        raise DeviceError("libvfio-user makes its own socket: give --socket-path, or take --engine native")

    def _await_next_client(self, context: Context) -> None:
        """Where the library would take the state of a migration over to the next client, and no function
        changes that, the next client gets another context, at the same path."""
        if self._file is None or not self.host.left_in_migration:
            self._await_client(context)
            return
        path = self._file.path
        self._close_context()
        self.listen_at(path)

    def _await_client(self, context: Context) -> None:
        fd = context.poll_fd()

        def attach() -> None:
            if self._attach(context):
                self.poller.unregister(fd)

        self.poller.register(fd, attach)

    def _attach(self, context: Context) -> bool:
        """Whether a client has come. While it negotiates, the library waits for it."""
        try:
            if not context.attach():
                return False
        except OSError as error:
            silent = error.errno == errno.EINTR
            logger.log(
                logging.WARNING if silent else logging.INFO, "a client has been refused: %s", error.strerror
            )
            return False
        self.clients_served += 1
        self._client_fd = context.poll_fd()
        self.host.attach()
        self.poller.register(self._client_fd, self._serve, urgent=True)
        logger.info("client %d attached", self.clients_served)
        return True

    def _client_lost(self) -> None:
        """The library lets go of its client, and closes the descriptor next. The device keeps its state."""
        if self._client_fd is None:
            return
        self.poller.unregister(self._client_fd)
        self._client_fd = None
        self.host.detach()
        logger.info("client %d left", self.clients_served)
        if self.client_left is not None:
            self.client_left()

    # The loop

    def _serve(self) -> None:
        """Serve the requests that are there; none of them lets a task run before it is answered."""
        context = self._context
        assert context is not None
        try:
            for _ in range(BATCH):
                if not context.run() or self._client_fd is None:
                    break
                self.host.irqs.retry()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                self._drop(context, error.errno or errno.EIO)
        if self._client_fd is None:
            self._await_next_client(context)

    def _drop(self, context: Context, error: int) -> None:
        if self._client_fd is None:
            return
        logger.warning("client %d dropped: %s", self.clients_served, os.strerror(error))
        context.drop_client()

    def turn(self) -> bool:
        tasks = self.host.tasks
        busy = self.poller.poll()
        self.run_timers()
        if tasks.ready:
            tasks.run_ready()
            self._check_stream()
            return True
        return busy

    def _check_stream(self) -> None:
        """A DMA by message may have lost the client, or taken another message for its reply."""
        context = self._context
        assert context is not None
        lost = self.host.library_dma.take_lost()
        if self._client_fd is None:
            self._await_next_client(context)
        elif lost:
            self._drop(context, lost)
