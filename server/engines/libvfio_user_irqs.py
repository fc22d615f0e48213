# SPDX-License-Identifier: BSD-3-Clause
"""Interrupts under libvfio-user, which holds the eventfds and tells of MASK and UNMASK only.

It does not tell when a client gives or takes an eventfd. So what could not be delivered is tried again after
each request. It announces INTx without automatic mask, so a client need not unmask: INTx fires each time
that its level rises, and once more when it is unmasked while the level is high.
"""

import logging
from collections.abc import Callable, Mapping

from vfio_user.device_models.device import IrqIndex

logger = logging.getLogger(__name__)

MESSAGES = (IrqIndex.MSI, IrqIndex.MSIX)

Vector = tuple[IrqIndex, int]


class LibraryIrqs:
    """`IrqLines` over `fire(vector)`, which is the library's: False when there is no eventfd."""

    def __init__(
        self,
        fire: Callable[[int], bool],
        counts: Mapping[IrqIndex, int],
        on_unmasked: Callable[[IrqIndex, int], None],
    ) -> None:
        self._fire = fire
        self._counts = counts
        self._on_unmasked = on_unmasked
        self._masked: set[Vector] = set()
        self._owed: set[Vector] = set()
        """What found no eventfd."""
        self.level = False
        self.unanswered: bool | None = None  # a client need not unmask, so nothing follows from its silence
        self.stopped = False
        self.fired = dict.fromkeys(IrqIndex, 0)
        self._fired: set[Vector] = set()
        """Since the client came."""

    # What the device does

    def set_level(self, level: bool) -> None:
        rises, self.level = level and not self.level, level
        if rises:
            self._fire_intx()

    def trigger(self, index: IrqIndex, vector: int) -> bool:
        if self.stopped or not 0 <= vector < self._counts.get(index, 0) or (index, vector) in self._masked:
            return False
        return self._signal((index, vector))

    def enabled(self, index: IrqIndex) -> bool:
        """The library does not say: the configuration space has to."""
        return False

    # What the engine does

    def stop(self) -> None:
        self.stopped = True

    def resume(self) -> None:
        self.stopped = False
        self._fire_intx()
        for index in MESSAGES:
            for vector in range(self._counts.get(index, 0)):
                self._announce((index, vector))

    def release(self) -> None:
        self._masked.clear()
        self._owed.clear()
        self._fired.clear()

    def fired_vectors(self, index: IrqIndex) -> int:
        """See `IrqLines`."""
        return sum(1 << number for known, number in self._fired if known is index)

    def retry(self) -> None:
        """A request has been served, which may have brought an eventfd."""
        if self._owed and not self.stopped:
            for vector in sorted(self._owed):
                self._deliver(vector)

    def change_state(self, index: IrqIndex, start: int, count: int, masked: bool) -> None:
        """The client has masked or unmasked vectors; v1 lets a sum of start and count pass that wraps."""
        end = min(start + count, self._counts.get(index, 0))
        vectors = {(index, vector) for vector in range(start, end)}
        if masked:
            self._masked |= vectors
            return
        self._masked -= vectors
        for vector in sorted(vectors):
            self._deliver(vector)

    def _deliver(self, vector: Vector) -> None:
        if vector[0] is IrqIndex.INTX:
            self._fire_intx()
        else:
            self._announce(vector)

    def _announce(self, vector: Vector) -> None:
        """Let the device fire what is pending; what still finds no eventfd is owed again."""
        self._owed.discard(vector)
        if vector in self._masked or self.stopped:
            return
        try:
            self._on_unmasked(*vector)
        except Exception:
            # What the client asked has been done; a broken model must not make it look refused.
            logger.exception("the device failed when %s vector %d was unmasked", vector[0].name, vector[1])

    def _fire_intx(self) -> None:
        vector = (IrqIndex.INTX, 0)
        self._owed.discard(vector)
        if self.level and not self.stopped and self._counts.get(IrqIndex.INTX) and vector not in self._masked:
            self._signal(vector)

    def _signal(self, vector: Vector) -> bool:
        if not self._fire(vector[1]):
            self._owed.add(vector)
            return False
        self.fired[vector[0]] += 1
        self._fired.add(vector)
        return True
