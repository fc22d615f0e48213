# SPDX-License-Identifier: BSD-3-Clause
"""How long a test waits for what must come at once; less where it is known not to come."""

from contextlib import AbstractContextManager

import trio

LONG, SHORT = 10.0, 0.3
STARTS = 6
"""On a busy machine nothing comes at once, and what comes late must not be taken for what does not come: so
the short wait is no shorter than this many starts of a server (20 ms each on an idle machine)."""
seconds = LONG


def short(start: float) -> float:
    """How long to wait for what is known not to come, where the server has taken `start` seconds to start."""
    return min(LONG, max(SHORT, STARTS * start))


def in_time() -> AbstractContextManager[trio.CancelScope]:
    """Raises trio.TooSlowError when what is in it takes longer."""
    return trio.fail_after(seconds)
