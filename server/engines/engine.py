# SPDX-License-Identifier: BSD-3-Clause
"""What every engine has: one device, its host, real time, and the loop on trio.

Everything that a device waits for (its client, network backends, eventfds, the listening socket) is in
one `Poller`. The loop asks it without waiting while there is work, and for a short spin after; then it
sleeps in trio on the poller's one descriptor. What a message costs is in docs/performance.md: no lock, no
task, no cancel scope and no checkpoint per message.
"""

import logging
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from termios import FIONREAD
from types import TracebackType
from typing import Generic, Self, TypeVar

import trio

from vfio_user.device_models.device import Device, OptionError
from vfio_user.device_models.net import NetDevice
from vfio_user.device_models.timers import NANOSECONDS, Timer, Timers
from vfio_user.protocol import capabilities
from vfio_user.protocol.bitmaps import MIN_PAGE_SIZE, is_page_size
from vfio_user.protocol.errors import DeviceError, VfioUserError
from vfio_user.server.cpu_latency import CpuLatency
from vfio_user.server.engines.spin import Spin
from vfio_user.server.host import EngineHost
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)

SLICE = 1_000_000  # ns of work before trio's other tasks get a turn

H = TypeVar("H", bound=EngineHost)


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may choose."""

    spin_us: int = 200
    """How long to look for work before sleeping."""
    trust_client_memory: bool = False
    """Map files that the client could shrink under us (SIGBUS) instead of reading and writing them."""
    cpu_latency_us: int | None = None
    """Ask the kernel that idle CPUs wake within so many microseconds while there is work; None: do not."""
    max_dma_maps: int = 65535
    max_msg_fds: int = 16
    max_data_xfer_size: int = 1 << 20
    pgsize: int = MIN_PAGE_SIZE
    """v1: dirty pages are logged in pages of so many bytes, unless the client wants smaller ones. A power of
    two from 4 KiB up; larger ones take less memory."""

    def __post_init__(self) -> None:
        if not is_page_size(self.pgsize):
            raise ValueError(f"pgsize {self.pgsize} is not a power of two of at least {MIN_PAGE_SIZE}")

    def version(self) -> capabilities.Version:
        return capabilities.Version(
            capabilities=capabilities.Capabilities(
                max_msg_fds=self.max_msg_fds,
                max_data_xfer_size=self.max_data_xfer_size,
                max_dma_maps=self.max_dma_maps,
                migration=capabilities.Migration(self.pgsize),
            )
        )


def log_failure(error: Exception) -> None:
    """For callbacks whose exceptions must not end the server."""
    logger.error("a callback failed: %s", error, exc_info=error)


class Engine(Generic[H]):
    """A device and its socket. One client at a time; others wait in the socket's backlog.

    A subclass says how to listen (`listen_at`), what a turn is, and when there is nobody left to serve.
    """

    def __init__(self, host: H, poller: Poller, settings: Settings) -> None:
        self.settings = settings
        self.poller = poller
        self.host = host
        self.device: Device | None = None
        self._timers = Timers(time.monotonic_ns, log_failure)
        self._spin = Spin(settings.spin_us * 1000)
        self._worked = False
        limit = settings.cpu_latency_us
        self._latency = None if limit is None else CpuLatency(limit, self.call_later)
        self._client_fd: int | None = None
        """The client's socket, once it is there."""
        self.clients_served = 0
        self.client_left: Callable[[], None] | None = None
        """Called when a client has left and what was its own is released."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the client, the memory and every descriptor."""
        if self._latency is not None:
            self._latency.close()
        self.host.close()
        self.poller.close()

    def install(self, make: Callable[[H], Device]) -> None:
        """Make the device; before listening. DeviceError when the model fails; others are `make`'s own."""
        try:
            self.device = make(self.host)
            self.host.install(self.device)
            self.device.reset()
        except (VfioUserError, OptionError):
            raise
        except Exception as error:
            logger.info("making the device failed", exc_info=True)
            raise DeviceError(f"the device cannot be made: {type(error).__name__}: {error}") from error

    def listen_at(self, path: Path) -> None:
        """Listen at `path`; the socket file goes with `close`. OSError with what to do when that fails."""
        raise NotImplementedError

    def adopt_fd(self, fd: int) -> None:
        """Serve an inherited socket (`--fd`). OSError or DeviceError when that cannot be."""
        raise NotImplementedError

    @property
    def attached(self) -> bool:
        """Whether there is a client, and it has negotiated."""
        return self.host.dma.messages is not None

    @property
    def outstanding(self) -> int:
        """DMA messages that the client has not answered yet."""
        return 0

    @property
    def unread(self) -> int:
        """Bytes that the client has sent and that are not served yet; 0 also when it has left."""
        if self._client_fd is None:
            return 0
        count = array("i", (0,))
        ioctl(self._client_fd, FIONREAD, count)  # unix(7): SIOCINQ, all that is in the queue
        return count[0]

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

    # The loop

    @property
    def ended(self) -> bool:
        """Whether nobody is left to serve: an adopted connection (`--fd`) has ended."""
        raise NotImplementedError

    def turn(self) -> bool:
        """Do once all that can be done without waiting. Returns whether there was anything to do."""
        raise NotImplementedError

    def while_idle(self) -> None:
        """Something short that will be wanted: nothing has come for a moment, and nobody wants the CPU."""

    def run_timers(self) -> None:
        """For `turn`: fire what is due."""
        if self.host.timers.pending:
            self.host.timers.run_due()
        if self._timers.pending:
            self._timers.run_due()

    def _work(self) -> bool:
        """Take turns until nothing has come for a spin's length. False: a slice of time is over first."""
        start = idle_since = time.monotonic_ns()
        while idle_since - start < SLICE:
            if self.turn():
                idle_since = time.monotonic_ns()
                self._worked = True
            elif not self._spin.look_again(idle_since):
                return True
            elif not self._spin.crowded:
                self.while_idle()
        return False

    async def run(self) -> None:
        """Serve until cancelled, or until `ended`."""
        while True:
            idle = self._work()
            if self.ended:
                return
            if self._worked and self._latency is not None:
                self._latency.note_work()
            self._worked = False
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
