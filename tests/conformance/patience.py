# SPDX-License-Identifier: BSD-3-Clause
"""How long a test waits for what must come at once; less where it is known not to come."""

from contextlib import AbstractContextManager

import trio

LONG, SHORT = 10.0, 0.3
seconds = LONG


def in_time() -> AbstractContextManager[trio.CancelScope]:
    """Raises trio.TooSlowError when what is in it takes longer."""
    return trio.fail_after(seconds)
