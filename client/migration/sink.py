# SPDX-License-Identifier: BSD-3-Clause
"""Where the source's side of a migration puts what it sends: another VM, or a file."""

from collections.abc import Sequence
from typing import Protocol

from vfio_user.client.vmm_state import VmmState
from vfio_user.protocol.values import Payload


class Sink(Protocol):
    """Called in this order: `open`, `memory` and `state` in turns, `setup`, `complete`; or `abandon`, at
    any time. What a call raises ends the migration, and `abandon` follows."""

    async def open(self, ranges: Sequence[tuple[int, int]], devices: int) -> None:
        """Get ready: address and size in bytes of each range of memory, and the number of devices."""

    async def memory(self, address: int, data: memoryview) -> None:
        """Bytes at a guest address; a later call for the same address replaces them."""

    async def state(self, device: int, data: Payload) -> None:
        """The next piece of a device's state; never empty."""

    async def setup(self, states: Sequence[VmmState]) -> None:
        """What the VMM knows of each device; the guest stands still now."""

    async def complete(self) -> None:
        """That was all. It is whole and usable when this returns."""

    async def abandon(self) -> None:
        """Nothing that was given may be used. Does its best, and raises nothing but what `complete` does."""
