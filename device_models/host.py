# SPDX-License-Identifier: BSD-3-Clause
"""The part of a host that is the same under every engine: tasks, device time, running and stopped."""

import logging
from collections.abc import Callable, Hashable

from vfio_user.device_models.tasks import Gate, TaskRunner
from vfio_user.device_models.timers import Timer, Timers

logger = logging.getLogger(__name__)


def log_task_error(key: Hashable, error: Exception) -> None:
    """The default `ErrorHook`: the log gets the traceback, the device goes on."""
    logger.error("task %r of the device failed: %s", key, error, exc_info=error)


def log_timer_error(error: Exception) -> None:
    """For an engine, which must not end with a device's callback."""
    logger.error("a timer of the device failed: %s", error, exc_info=error)


class HostBase:
    """Tasks and time of one device. An engine adds memory and interrupts and becomes a `device.Host`."""

    def __init__(
        self, now: Callable[[], int], on_timer_error: Callable[[Exception], None] | None = None
    ) -> None:
        self.tasks = TaskRunner(log_task_error)
        self.timers = Timers(now, on_timer_error)
        self.start = self.tasks.start
        self.cancel = self.tasks.cancel
        self.clock = self.timers.clock
        self.gate = Gate()
        """Passed before each DMA; closed while the device is stopped."""
        self.running = True
        """Plain, because it is asked for each frame that comes."""

    def call_at(self, deadline: int, callback: Callable[[], None]) -> Timer:
        return self.timers.call_at(deadline, callback)

    def settle(self) -> None:
        """Let tasks take note of the replies that have come: before a stop that is asked for, and before the
        state is saved. No DMA is begun while the device is stopped."""
        self.tasks.settle()

    def stop(self) -> None:
        """Let tasks and device time stand still until `resume`."""
        self.running = False
        self.gate.close()
        self.tasks.stop()
        self.timers.freeze()

    def resume(self) -> None:
        self.running = True
        self.timers.thaw()
        self.tasks.resume()
        self.gate.open()

    def reset(self) -> None:
        """Forget tasks and timers, as a device reset does; to be followed by `Device.reset`."""
        self.tasks.cancel_all()
        self.timers.clear()
