# SPDX-License-Identifier: BSD-3-Clause
"""What a migration does with one device, whatever the protocol: the interface of the drivers for v1 and v2.

The same driver serves as source and as destination. A method raises what `Client` raises (`RemoteError`,
`ReplyTimeout`, `PeerGone`, ...), and `MigrationError` when the device does not do as it must.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from vfio_user.client.client import Client
from vfio_user.client.errors import RemoteError
from vfio_user.client.memory import RamRange
from vfio_user.client.migration.pages import PageSet
from vfio_user.client.migration.report import MigrationError
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.values import Payload

LEAST_TRANSFER = 4096
STANDING = frozenset(
    {MigrationState.ERROR, MigrationState.STOP, MigrationState.STOP_COPY, MigrationState.RESUMING}
)
"""States in which a device does nothing."""


class DeviceLost(MigrationError):
    """The device can only be reset, and has then lost its state."""


class Driver(ABC):
    """One device of a VM. `page_size` (bytes) is the one in which dirty pages are asked for."""

    protocol: ClassVar[str]
    p2p: bool = False
    """The device has the P2P states."""
    pre_copy: bool = False
    """The device may be saved while it runs."""

    def __init__(self, client: Client, page_size: int = 4096) -> None:
        self.client = client
        self.page_size = page_size
        self.ranges: tuple[RamRange, ...] = ()
        """Of which the dirty log is asked: those that the server can write without our seeing it."""

    @classmethod
    @abstractmethod
    async def open(cls, client: Client, page_size: int = 4096) -> "Driver | None":
        """The driver, or None when the server does not speak this protocol for the device."""

    @property
    def transfer(self) -> int:
        """Bytes that go in one message."""
        session = self.client.session
        return max(session.max_data_xfer_size if session else 0, LEAST_TRANSFER)

    # Both sides

    def close(self) -> None:
        """Give back what the driver holds besides the connection, which is not its own."""
        self.ranges = ()

    @abstractmethod
    async def state(self) -> MigrationState:
        """The state that the device is in."""

    @abstractmethod
    async def enter(self, state: MigrationState) -> None:
        """Bring the device into a state; harmless when it is there. Only states that the protocol has."""

    async def reset(self) -> None:
        """DEVICE_RESET: out of every state, to RUNNING, with the device as after power-on."""
        await self.client.reset()

    # Source

    @abstractmethod
    async def start_log(self, ranges: tuple[RamRange, ...]) -> None:
        """Log what the device writes to these ranges; those without a descriptor are our own affair."""

    @abstractmethod
    async def stop_log(self) -> None: ...

    @abstractmethod
    async def read_log(self, pages: PageSet) -> None:
        """Add what was written since the last call (or the start) to `pages`."""

    @abstractmethod
    async def read_state(self) -> Payload | None:
        """The next piece of the device's state. None: nothing more, in PRE_COPY: now."""

    async def quiet(self) -> None:
        """Out of a state in which the device stands still, as far as to where it takes doorbells."""
        if self.p2p and await self.state() in STANDING - {MigrationState.ERROR}:
            await self.enter(MigrationState.RUNNING_P2P)

    async def resume(self) -> None:
        """Let the device run again, from whatever state an aborted migration left it in.

        DeviceLost when it is in the ERROR state.
        """
        match await self.state():
            case MigrationState.RUNNING:
                return
            case MigrationState.ERROR:
                raise DeviceLost("it is in the ERROR state: only a reset ends that, and loses its state")
        await self.enter(MigrationState.RUNNING)

    # Destination

    async def prepare(self) -> None:
        """RESUMING, for a device that nobody uses; what it had before is lost."""
        if await self.state() is not MigrationState.RUNNING:
            await self.reset()
        await self.enter(MigrationState.RESUMING)

    @abstractmethod
    async def write_state(self, data: Payload) -> None:
        """Give one piece of state to a device in RESUMING, in the order and size in which it was read."""

    @abstractmethod
    async def load(self) -> None:
        """All is written: the device takes it over, as far as it can do so without running."""

    async def discard(self) -> None:
        """Make sure that the device does not run with anything that was written to it."""
        try:
            await self.reset()
        except RemoteError:
            # libvfio-user refuses RESET where the device stands still; then that has to do.
            if await self.state() not in STANDING:
                raise

    def _logged(self, ranges: tuple[RamRange, ...]) -> None:
        self.ranges = tuple(part for part in ranges if part.fd is not None)


def pieces(size: int, longest: int) -> list[tuple[int, int]]:
    """Begin and length of the parts of `size`, each at most `longest`."""
    return [(begin, min(longest, size - begin)) for begin in range(0, size, longest)]


def reason(error: BaseException) -> str:
    """What to say of an error."""
    return error.reason if isinstance(error, VfioUserError) else f"{type(error).__name__}: {error}"
