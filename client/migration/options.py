# SPDX-License-Identifier: BSD-3-Clause
"""How a guest is to be moved."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vfio_user.client.memory import PAGE
from vfio_user.client.migration.report import Limits, Progress
from vfio_user.client.migration.sink import Sink


async def _nothing() -> None:
    """No network has to be told."""


def _direct(sink: Sink) -> Sink:
    return sink


def silent(_progress: Progress) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Options:
    """`source` and `destination` are "v1" or "v2"; None: what the server has, v2 first.

    `page_size` (bytes) is that of the dirty log. `mapped` reaches v1's data area through a mapping.
    `irqs_first`: interrupts before the devices run, as from QEMU. `verify`: compare the two memories before
    the destination runs. `alone`: move several devices even if some have no P2P states. `link` is what lies
    between the hosts: it may slow down, count or spoil what passes. `switch` is called when the source
    stands still and before the destination runs: the time to move the wire.
    """

    source: str | None = None
    destination: str | None = None
    page_size: int = PAGE
    mapped: bool = False
    irqs_first: bool = True
    verify: bool = True
    alone: bool = False
    link: Callable[[Sink], Sink] = _direct
    switch: Callable[[], Awaitable[None]] = _nothing


DEFAULT_OPTIONS = Options()
DEFAULT_LIMITS = Limits()
