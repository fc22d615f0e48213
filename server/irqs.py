# SPDX-License-Identifier: BSD-3-Clause
"""Interrupts of one device: what SET_IRQS sets up, and how they are fired.

Eventfds, masks and the automatic mask belong to the connection and go with the client (`release`). The
level of INTx belongs to the device and stays.

INTx masks itself when it fires. The client, when the guest has served it, unmasks by message or by the
unmask eventfd (KVM's resample fd), and it fires again if the level is still high. The meaning of the
request is that of `struct vfio_irq_set` in linux/vfio.h, also for the eventfds of MASK and UNMASK, which
go from the client to us (the specification's prose has it the other way round; no client does that).
"""

import logging
from collections.abc import Callable, Mapping, Sequence

from vfio_user.device_models.device import IrqIndex
from vfio_user.protocol.constants import (
    IRQ_SET_ACTION_TYPE_MASK,
    IRQ_SET_DATA_TYPE_MASK,
    IrqInfoFlags,
    IrqSetFlags,
)
from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.server.eventfds import Eventfd
from vfio_user.server.irq_vectors import IrqVector
from vfio_user.transport.fds import OwnedFd, close_all
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)

_EVENTFD, _MASKABLE = IrqInfoFlags.EVENTFD, IrqInfoFlags.MASKABLE

INFO_FLAGS: Mapping[IrqIndex, IrqInfoFlags] = {
    IrqIndex.INTX: _EVENTFD | _MASKABLE | IrqInfoFlags.AUTOMASKED,
    IrqIndex.MSI: _EVENTFD | _MASKABLE | IrqInfoFlags.NORESIZE,
    IrqIndex.MSIX: _EVENTFD | _MASKABLE,  # vectors can be added at any time, as with recent kernels
    IrqIndex.ERR: _EVENTFD | IrqInfoFlags.NORESIZE,
    IrqIndex.REQ: _EVENTFD | IrqInfoFlags.NORESIZE,
}


class Irqs:
    """The interrupt indexes of a device. `counts`: vectors of each index; an index without any has 0.

    `on_unmasked(index, vector)` is called when an MSI or MSI-X vector can be delivered again, so that the
    device fires what is pending: `Device.irq_unmasked`.
    """

    def __init__(
        self,
        poller: Poller,
        counts: Mapping[IrqIndex, int],
        on_unmasked: Callable[[IrqIndex, int], None],
    ) -> None:
        self._on_unmasked = on_unmasked
        self._vectors = {
            index: [
                IrqVector(poller, self._masker(index, vector), self._unmasker(index, vector))
                for vector in range(counts.get(index, 0))
            ]
            for index in IrqIndex
        }
        self._enabled = dict.fromkeys(IrqIndex, 0)
        self.level = False
        """The INTx pin."""
        self.stopped = False
        self.fired = dict.fromkeys(IrqIndex, 0)
        """How often an eventfd has been signalled, by index."""

    # What the device does

    def set_level(self, level: bool) -> None:
        """Drive the INTx pin; fires when it is high, unmasked, has an eventfd and the device runs."""
        self.level = level
        if level:
            self._fire_intx()

    def trigger(self, index: IrqIndex, vector: int) -> bool:
        """Fire a message interrupt. False: masked, without an eventfd, or stopped; it was not fired."""
        vectors = self._vectors[index]
        if self.stopped or not 0 <= vector < len(vectors) or not vectors[vector].deliverable:
            return False
        self._signal(index, vectors[vector])
        return True

    def enabled(self, index: IrqIndex) -> bool:
        """Whether at least one vector of the index has an eventfd to trigger."""
        return self._enabled[index] > 0

    @property
    def unanswered(self) -> bool:
        """Whether INTx has been fired and the client has not unmasked it since: it holds its own pin high."""
        return any(vector.unanswered for vector in self._vectors[IrqIndex.INTX])

    # What the engine does

    def stop(self) -> None:
        """Fire nothing until `resume`; SET_IRQS is still obeyed."""
        self.stopped = True

    def resume(self) -> None:
        """Fire INTx if its level is high, and tell the device of every deliverable vector."""
        self.stopped = False
        self._fire_intx()
        for index in (IrqIndex.MSI, IrqIndex.MSIX):
            for vector in range(len(self._vectors[index])):
                self._announce(index, vector)

    def release(self) -> None:
        """The client has gone: close its eventfds, forget its masks. The level of INTx stays."""
        for index in IrqIndex:
            self._disable(index)
            for vector in self._vectors[index]:
                vector.fired = False

    def fired_vectors(self, index: IrqIndex) -> int:
        """A mask of the vectors that have been signalled since the client came.

        What the client does with a signal nobody sees: QEMU keeps that of a vector whose mask is in its own
        table. It also disables and enables an index only to add vectors, and so nothing is forgotten then.
        """
        return sum(1 << number for number, vector in enumerate(self._vectors[index]) if vector.fired)

    def unmask_intx(self) -> None:
        """SET_IRQS with DATA_NONE, ACTION_UNMASK for INTx: what the hot loop takes itself."""
        self._unmask(IrqIndex.INTX, 0)

    # What the client asks

    def info(self, index: int) -> tuple[IrqInfoFlags, int]:
        """Flags and number of vectors (specification: "VFIO_USER_DEVICE_GET_IRQ_INFO"). EINVAL: no index."""
        known = self._index(index)
        return INFO_FLAGS[known], len(self._vectors[known])

    def set_irqs(
        self,
        flags: int,
        index: int,
        start: int,
        count: int,
        data: Sequence[bool] = (),
        fds: Sequence[OwnedFd] = (),
    ) -> None:
        """Obey VFIO_USER_DEVICE_SET_IRQS. Takes ownership of `fds` in any case.

        `data` has `count` values with DATA_BOOL. With DATA_EVENTFD there are `count` descriptors, or none
        to take the eventfds of the range away. RemoteProtocolError (EINVAL): nothing has changed.
        """
        try:
            known, action = self._check(flags, index, start, count, len(data), len(fds))
            eventfds = [Eventfd(fd) for fd in fds]
        except BaseException:
            close_all(fds)
            raise
        if count == 0:
            self._disable(known)
        elif flags & IrqSetFlags.DATA_EVENTFD:
            self._set_eventfds(known, action, range(start, start + count), eventfds)
        else:
            chosen = data if flags & IrqSetFlags.DATA_BOOL else [True] * count
            self._act(known, action, [start + i for i in range(count) if chosen[i]])

    def _check(
        self, flags: int, index: int, start: int, count: int, values: int, fds: int
    ) -> tuple[IrqIndex, IrqSetFlags]:
        known = self._index(index)
        kind = flags & IRQ_SET_DATA_TYPE_MASK
        action = flags & IRQ_SET_ACTION_TYPE_MASK
        if kind.bit_count() != 1 or action.bit_count() != 1 or flags != kind | action:
            raise RemoteProtocolError(f"SET_IRQS flags {flags:#x} are not one DATA and one ACTION flag")
        disable = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
        if count == 0 and (start != 0 or flags != disable):
            raise RemoteProtocolError("SET_IRQS with count 0 is not the request that disables an index")
        if start + count > len(self._vectors[known]):
            raise RemoteProtocolError(f"{known.name} has no vectors {start} to {start + count - 1}")
        if values != (count if kind == IrqSetFlags.DATA_BOOL else 0):
            raise RemoteProtocolError(f"SET_IRQS has {values} values for {count} vectors")
        if fds not in ((0, count) if kind == IrqSetFlags.DATA_EVENTFD else (0,)):
            raise RemoteProtocolError(f"SET_IRQS has {fds} file descriptors for {count} vectors")
        return known, IrqSetFlags(action)

    def _index(self, index: int) -> IrqIndex:
        try:
            return IrqIndex(index)
        except ValueError:
            raise RemoteProtocolError(f"there is no interrupt index {index}") from None

    def _disable(self, index: IrqIndex) -> None:
        for vector in self._vectors[index]:
            vector.release()
        self._enabled[index] = 0

    def _set_eventfds(
        self, index: IrqIndex, action: IrqSetFlags, vectors: range, eventfds: Sequence[Eventfd]
    ) -> None:
        for i, vector in enumerate(vectors):
            self._vectors[index][vector].set_eventfd(action, eventfds[i] if eventfds else None)
        if action is IrqSetFlags.ACTION_TRIGGER:
            self._enabled[index] = sum(vector.trigger is not None for vector in self._vectors[index])
            for vector in vectors:
                self._deliver(index, vector)

    def _act(self, index: IrqIndex, action: IrqSetFlags, vectors: Sequence[int]) -> None:
        if action is IrqSetFlags.ACTION_TRIGGER and not self._enabled[index]:
            raise RemoteProtocolError(f"{index.name} has no eventfd to trigger")
        perform = {
            IrqSetFlags.ACTION_MASK: self._mask,
            IrqSetFlags.ACTION_UNMASK: self._unmask,
            IrqSetFlags.ACTION_TRIGGER: self._loop_back,
        }[action]
        for vector in vectors:
            perform(index, vector)

    def _mask(self, index: IrqIndex, vector: int) -> None:
        self._vectors[index][vector].masked = True

    def _unmask(self, index: IrqIndex, vector: int) -> None:
        unmasked = self._vectors[index][vector]
        unmasked.masked = unmasked.unanswered = False
        self._deliver(index, vector)

    def _loop_back(self, index: IrqIndex, vector: int) -> None:
        """Fire as if the device had, whatever its state (linux/vfio.h: "loopback testing")."""
        if self._vectors[index][vector].trigger is not None:
            self._signal(index, self._vectors[index][vector])

    def _masker(self, index: IrqIndex, vector: int) -> Callable[[], None]:
        return lambda: self._mask(index, vector)

    def _unmasker(self, index: IrqIndex, vector: int) -> Callable[[], None]:
        return lambda: self._unmask(index, vector)

    def _deliver(self, index: IrqIndex, vector: int) -> None:
        """The vector may have become deliverable."""
        if index is IrqIndex.INTX:
            self._fire_intx()
        else:
            self._announce(index, vector)

    def _announce(self, index: IrqIndex, vector: int) -> None:
        if not self._vectors[index][vector].deliverable:
            return
        try:
            self._on_unmasked(index, vector)
        except Exception:
            # What the client asked has been done; a broken model must not make it look refused.
            logger.exception("the device failed when %s vector %d was unmasked", index.name, vector)

    def _fire_intx(self) -> None:
        for vector in self._vectors[IrqIndex.INTX]:
            if self.level and not self.stopped and vector.deliverable:
                vector.masked = vector.unanswered = True
                self._signal(IrqIndex.INTX, vector)

    def _signal(self, index: IrqIndex, vector: IrqVector) -> None:
        assert vector.trigger is not None
        self.fired[index] += 1
        vector.fired = True
        vector.trigger.signal()
