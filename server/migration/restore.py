# SPDX-License-Identifier: BSD-3-Clause
"""A state that has arrived is put into the device, all of it or nothing."""

import logging
from collections.abc import Sequence
from typing import Protocol

from vfio_user.device_models.device import Device
from vfio_user.device_models.state import Apply, SavedSections, load_sections, save_sections
from vfio_user.device_models.state_memory import StateMemory
from vfio_user.server.migration.reader import Staged

logger = logging.getLogger(__name__)

_Before = Sequence[tuple[StateMemory, memoryview]]


class Stoppable(Protocol):
    """What the engine needs of a host: `device_models.host.HostBase` and all that derive from it."""

    @property
    def running(self) -> bool:
        """Whether tasks and device time go on."""

    def settle(self) -> None:
        """Let tasks take note of the replies that have come, and begin no DMA if the device is stopped."""

    def stop(self) -> None:
        """Freeze tasks and device time, fire no interrupt; remember what is started."""

    def resume(self) -> None:
        """Go on."""

    def reset(self) -> None:
        """Forget tasks and timers."""


class NotUndone(Exception):
    """A state could not be restored, for `reason`, and the one of before is lost as well."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self._reason = reason

    def take_reason(self) -> Exception:
        """The reason, which may be raised in place of this: no circle of the two holds what was staged."""
        reason = self._reason
        del self._reason
        self.__cause__ = self.__context__ = None
        return reason


def restore(device: Device, host: Stoppable, staged: Staged) -> None:
    """Swap the new state in.

    StateError, or whatever the model raises: the device has the state of before. NotUndone: it has not.
    """
    sections, memories = device.sections(), device.memories()
    applies = load_sections(sections, staged.sections)
    saved = save_sections(sections)
    host.reset()  # tasks and timers of the state that goes
    before: list[tuple[StateMemory, memoryview]] = []
    try:
        _apply_all(applies)
        for name, memory in memories.items():
            before.append((memory, memory.adopt(staged.memories[name], staged.used[name])))
        device.restored()
    except Exception as error:
        host.reset()
        if not _undo(device, saved, before):
            raise NotUndone(error) from error
        raise


def _undo(device: Device, saved: SavedSections, memories: _Before) -> bool:
    try:
        for memory, before in memories:
            memory.adopt(before, ())  # all that it used still counts as used
        _apply_all(load_sections(device.sections(), saved))
        device.restored()
    except Exception:
        logger.exception("%s cannot go back to the state of before", device.model)
        return False
    return True


def _apply_all(applies: Sequence[Apply]) -> None:
    for apply in applies:
        apply()
