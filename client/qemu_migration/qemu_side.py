# SPDX-License-Identifier: BSD-3-Clause
"""One QEMU during a migration: its monitor, and what its events have said so far."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trio

from vfio_user.client.qemu_migration.qmp import Event, Events, Qmp, QmpLost
from vfio_user.client.qemu_migration.report import MoveError, Where

EVENTS = ("MIGRATION", "MIGRATION_PASS", "STOP", "RESUME")
ENDED = frozenset({"completed", "failed", "cancelled"})
"""States of a migration that nothing follows."""


@dataclass(frozen=True, slots=True)
class Heard:
    """An event, and when it came here (seconds of `time.perf_counter`)."""

    event: Event
    at: float


class QemuSide:
    """`follow` has to run beside whoever uses the rest."""

    qmp: Qmp

    def __init__(self, where: Where) -> None:
        self.where = where
        self.status = "none"
        """Of its migration."""
        self.heard: list[Heard] = []
        self.ending = False
        """It was told to end."""
        self.monitor = trio.Lock()
        """For who needs several of its lines in a row: the port 0xcf8 is one for all devices."""
        self._lot = trio.lowlevel.ParkingLot()

    async def follow(self, events: Events) -> None:
        """Take events until the connection ends."""
        try:
            async for event in events:
                self.heard.append(Heard(event, time.perf_counter()))
                if event.name == "MIGRATION":
                    self.status = str(event.data["status"])
                self._lot.unpark_all()
        except QmpLost:
            self._lot.unpark_all()

    def when(self, name: str) -> float | None:
        """When the last event of this name came."""
        return next((one.at for one in reversed(self.heard) if one.event.name == name), None)

    def lost(self) -> bool:
        return self.qmp.lost.is_set()

    async def news(self, seconds: float) -> None:
        """Returns at the next event, or when the time is up."""
        with trio.move_on_after(seconds):
            await self._lot.park()
            return

    async def until(self, *wanted: str) -> str:
        """The state of the migration, once it is one of these. MoveError when it ends otherwise; QmpLost."""
        while self.status not in wanted:
            if self.lost():
                raise QmpLost(self.qmp.lost_reason)
            if self.status in ENDED:
                raise MoveError(f"QEMU's migration {self.status}{await self._why()}", self.where)
            await self._lot.park()
        return self.status

    async def query(self) -> Mapping[str, Any]:
        """QEMU's `query-migrate`; its state is taken over, in case that an event was missed. QmpLost."""
        answer: Mapping[str, Any] = await self.qmp.execute("query-migrate")
        status = str(answer.get("status", self.status))
        if status != self.status:
            self.status = status
            self._lot.unpark_all()
        return answer

    async def run_state(self) -> str:
        """QEMU's `query-status`: running, paused, postmigrate, … QmpLost."""
        return str((await self.qmp.execute("query-status"))["status"])

    async def _why(self) -> str:
        reason = (await self.query()).get("error-desc")
        return f": {reason}" if reason else ""
