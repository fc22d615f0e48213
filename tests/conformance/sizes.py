# SPDX-License-Identifier: BSD-3-Clause
"""What a server's process holds and how large it is, for tests that it does not grow."""

from collections import Counter
from pathlib import Path

import trio

from conformance import patience
from conformance.holdings import expect_holdings, holdings

NOISE = 384
"""KiB that a process may grow at first: the allocator's, and log lines."""
STEADY = 192
"""KiB by which the second half of a test may let it grow more than the first half did: what comes of itself
ends, a leak goes on."""


class Size:
    """What a process holds, and how its memory has grown since. Call `half` in the middle."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.held = holdings(pid)
        self.mappings, self.memory = self._now()
        self.middle = 0

    def half(self) -> None:
        """As much is to come as there was."""
        _, self.middle = self._now()

    @classmethod
    async def of_idle(cls, pid: int) -> "Size":
        """As it is once its last client has left: what it holds does not change any more."""
        held: Counter[str] | None = None
        with trio.move_on_after(patience.seconds):
            while (now := holdings(pid)) != held:
                held = now
                await trio.sleep(0.02)
        return cls(pid)

    def _now(self) -> tuple[int, int]:
        mappings = len(Path(f"/proc/{self.pid}/maps").read_text().splitlines())
        status = Path(f"/proc/{self.pid}/status").read_text()
        return mappings, int(status.partition("RssAnon:")[2].split()[0])

    async def expect_unchanged(self) -> None:
        await expect_holdings(self.pid, self.held)
        mappings, memory = self._now()
        assert mappings <= self.mappings + 4
        grown = f"grown from {self.memory} over {self.middle} to {memory} KiB"
        print(grown)
        assert self.middle
        assert memory <= self.memory + NOISE, grown
        assert memory <= self.middle + STEADY, grown
