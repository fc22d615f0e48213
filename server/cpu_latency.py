# SPDX-License-Identifier: BSD-3-Clause
"""How fast idle CPUs wake: a request to the kernel (its documentation: "PM Quality Of Service Interface").

A register access puts two threads of a VMM to sleep and wakes them again, on a CPU that was idle in between.
Leaving a deep idle state, or the halt of a virtual machine's CPU, costs more than the access itself. While
a client keeps us busy the request asks all CPUs of the machine to stay in states that they leave within the
limit; at 0 they poll. That costs power, and a neighbour on the same core its share: so it is an option, and
holds only while there is work.
"""

import os
import struct
from collections.abc import Callable

from vfio_user.protocol.errors import DeviceError

PATH = "/dev/cpu_dma_latency"
NO_LIMIT = 2_000_000_000
"""Microseconds: what the kernel assumes without a request."""
LINGER = 100_000_000
"""ns without work until the request is withdrawn."""

CallLater = Callable[[int, Callable[[], None]], object]


class CpuLatency:
    """One request. Nothing is asked until `note_work`; it is withdrawn when no work was noted for a while."""

    def __init__(self, limit_us: int, call_later: CallLater, path: str = PATH) -> None:
        """`limit_us`: the longest wake-up in microseconds. DeviceError when the kernel gives no access."""
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError(
                f"no access to {path} ({error.strerror}): run as root, or leave --cpu-latency away"
            ) from None
        self._limit_us = limit_us
        self._call_later = call_later
        self._noted = False
        self.held = False
        """Whether the limit holds now."""

    def note_work(self) -> None:
        """There is, or was a moment ago, something to do."""
        self._noted = True
        if not self.held:
            self._ask(self._limit_us)
            self._call_later(LINGER, self._look)

    def _look(self) -> None:
        if self._fd < 0:
            return
        if self._noted:
            self._noted = False
            self._call_later(LINGER, self._look)
        else:
            self._ask(NO_LIMIT)

    def _ask(self, microseconds: int) -> None:
        os.write(self._fd, struct.pack("=i", microseconds))
        self.held = microseconds != NO_LIMIT

    def close(self) -> None:
        """Withdraw the request for good; harmless the second time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self.held = -1, False
