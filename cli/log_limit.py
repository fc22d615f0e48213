# SPDX-License-Identifier: BSD-3-Clause
"""A bound on what the log grows by, whatever a client or a guest does to cause messages."""

import logging
import time
from collections.abc import Callable

BURST = 50
"""Messages that may come at once."""

INTERVAL = 10.0
"""Seconds until a further one may come: with tracebacks, some 10 MB a day."""


class LogLimit(logging.Filter):
    """For a handler: lets `BURST` warnings and errors through, then one each `INTERVAL` seconds.

    What was left out is counted, and the next message that gets through says so. Messages below WARNING
    are let through: an operator has asked for them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._allowance = float(BURST)
        self._last = clock()
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now = self._clock()
        self._allowance = min(BURST, self._allowance + (now - self._last) / INTERVAL)
        self._last = now
        if self._allowance < 1:
            self._left_out += 1
            return False
        self._allowance -= 1
        if self._left_out:
            record.msg = f"{record.getMessage()} ({self._left_out} messages before it were left out)"
            record.args, self._left_out = (), 0
        return True
