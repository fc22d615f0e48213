# SPDX-License-Identifier: BSD-3-Clause
"""The host that the libvfio-user engine gives to a device."""

from vfio_user.device_models.device import Device
from vfio_user.protocol.constants import MigrationState
from vfio_user.server.engines.libvfio_user_context import Context
from vfio_user.server.engines.libvfio_user_dma import MESSAGE_SIZE, LibraryDma, LibraryTable
from vfio_user.server.engines.libvfio_user_irqs import LibraryIrqs
from vfio_user.server.engines.libvfio_user_migration import LibraryMigration
from vfio_user.server.host import EngineHost
from vfio_user.server.ioeventfds import Ioeventfds
from vfio_user.server.message_dma import MessageDma
from vfio_user.server.migration.engine import MigrationEngine
from vfio_user.transport.poller import Poller


class LibraryHost(EngineHost):
    """`irqs` is there once `install` was called, memory and interrupts work once `connect` was."""

    irqs: LibraryIrqs
    ioeventfds: Ioeventfds
    """Unlike the native engine's they are the context's, not a client's."""
    library_dma: LibraryDma
    migration: MigrationEngine

    def __init__(self, poller: Poller) -> None:
        self._table = LibraryTable(max_regions=1 << 20)
        super().__init__(self._table)
        self._poller = poller
        self._context: Context | None = None

    def install(self, device: Device) -> None:
        self.irqs = LibraryIrqs(self._fire, device.irqs, device.irq_unmasked)
        self.ioeventfds = Ioeventfds(self._poller, device.regions)
        self.migration = MigrationEngine(device, self)
        super().install(device)

    def connect(self, context: Context) -> None:
        """The context is there. It must not be realized yet."""
        self._context = context
        self.library_dma = LibraryDma(self._table, context)
        self._library_migration = LibraryMigration(context, self.migration)
        if self.migration.available:
            self._library_migration.set_up()

    @property
    def left_in_migration(self) -> bool:
        """Whether the library's last state of migration is another than running."""
        return self._library_migration.state is not MigrationState.RUNNING

    def stop(self) -> None:
        self.ioeventfds.ring_all()
        super().stop()

    def attach(self) -> None:
        """A client has come."""
        self.dma.messages = MessageDma(self.library_dma, MESSAGE_SIZE, self.gate)

    def detach(self) -> None:
        super().detach()
        self.migration.client_left()

    def close(self) -> None:
        self._context = None
        if hasattr(self, "ioeventfds"):  # a device has been made
            self.ioeventfds.release()
        super().close()

    def _fire(self, vector: int) -> bool:
        return self._context is not None and self._context.trigger(vector)
