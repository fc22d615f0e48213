# SPDX-License-Identifier: BSD-3-Clause
"""Whether to look for work once more or to sleep: latency against CPU time.

An idle CPU needs tens of microseconds to wake, so a loop that sleeps between two messages of a busy client
pays that for each of them. A loop that spins answers at once, but only while nobody else wants its CPU:
it yields on every look, and when a yield took long, somebody with much to do was there. Then it sleeps, for
a sleeper that wakes is scheduled before such a neighbour, and one that yields is scheduled after it.
"""

import os
import time

CROWDED = 200_000  # ns: a client on our CPU needs a few microseconds for its next request
WANTED = 20_000  # ns: somebody had something to do
RETREAT = 2_000_000  # ns without spinning on a crowded CPU


class Spin:
    """Decides for one loop. `length_ns` is how long to look for work after the last that came."""

    def __init__(self, length_ns: int) -> None:
        self._length = length_ns
        self._crowded_until = 0
        self.crowded = False
        """The last look gave the CPU to somebody who needed it."""

    def look_again(self, idle_since: int) -> bool:
        """Let others run for a moment and say True, or say False: sleep. Times are of `monotonic_ns`."""
        now = time.monotonic_ns()
        if now - idle_since >= self._length or now < self._crowded_until:
            return False
        os.sched_yield()
        back = time.monotonic_ns()
        self.crowded = back - now > WANTED
        if back - now > CROWDED:
            self._crowded_until = back + RETREAT
        return True
