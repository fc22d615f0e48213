# SPDX-License-Identifier: BSD-3-Clause
"""Moving a running guest with its vfio-user devices between two QEMUs that know nothing of it.

    report = await migrate_guest(request, print)

What each step does, and what a failure leaves, is in docs/qemu-migration.md.
"""

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from vfio_user.client.background import background
from vfio_user.client.qemu_migration import precopy, switch
from vfio_user.client.qemu_migration.closing import finish, write_report
from vfio_user.client.qemu_migration.move import Move, open_move, within
from vfio_user.client.qemu_migration.report import (
    Failure,
    MoveError,
    Outcome,
    Progress,
    Report,
    Step,
    Where,
)
from vfio_user.client.qemu_migration.request import Request
from vfio_user.client.qemu_migration.together import shielded, side_by_side
from vfio_user.client.qemu_migration.trail import TROUBLE, Trail, reason
from vfio_user.client.qemu_migration.way_back import lead_back
from vfio_user.client.qemu_migration.whose import Guest, runs_there, whose

T = TypeVar("T")


class GuestMigration:
    """One move. `run` may be called once; `cancel` from anywhere in the same event loop, also twice."""

    def __init__(self, request: Request, tell: Callable[[Progress], None]) -> None:
        self._request = request
        self._trail = Trail(tell)
        self._scope = trio.CancelScope()
        self._cancelled = False
        self._deadline = math.inf

    def cancel(self) -> None:
        """Give up: `run` leads back, if the guest does not run at the destination by then."""
        self._cancelled = True
        self._scope.cancel()

    async def run(self) -> Report:
        """The move and, if it fails, the way back. Refused: nothing has been touched. MoveError: nobody was
        there. Being cancelled from outside leads back too, and is raised again."""
        self._deadline = trio.current_time() + self._request.limits.timeout
        self._trail.begin(Step.CONNECT)
        report = None
        async with background() as nursery:
            move = await self._answered(open_move(self._request, self._trail, nursery))
            await self._answered(precopy.check(move))
            report = await self._move_or_lead_back(move)
        assert report is not None
        return report

    async def _answered(self, work: Awaitable[T]) -> T:
        """Before anything is touched. Refused, or MoveError when somebody does not answer as he should, or
        not in time."""
        with self._new_scope():
            try:
                return await work
            except MoveError:
                raise
            except TROUBLE as error:
                raise MoveError(reason(error)) from error
        raise MoveError(self._why_cut())

    def _new_scope(self) -> trio.CancelScope:
        """What `cancel` and the time-out cut from now on."""
        self._scope = trio.CancelScope(deadline=self._deadline)
        if self._cancelled:
            self._scope.cancel()
        return self._scope

    def _why_cut(self) -> str:
        return "cancelled" if self._cancelled else f"not done within {self._request.limits.timeout:g} s"

    async def _move_or_lead_back(self, move: Move) -> Report:
        try:
            return await self._move(move)
        except BaseException as error:
            await shielded(self._abandon(move, self._trail.failure(error)))
            raise

    async def _abandon(self, move: Move, failure: Failure) -> None:
        """Cancelled from outside, or a fault of our own: nobody will see the report."""
        if move.started:
            return
        if move.continued and not self._trail.has(Step.RESTORE):
            await self._unclear(move, failure)
        else:
            await self._give_up(move, failure)

    async def _move(self, move: Move) -> Report:
        failure = await self._guarded(self._until_completed, move)
        if failure is None:
            return await shielded(self._arrive(move))
        return await shielded(
            self._unclear(move, failure) if move.continued else self._give_up(move, failure)
        )

    async def _guarded(self, work: Callable[[Move], Awaitable[None]], move: Move) -> Failure | None:
        """Why `work` was not done: trouble with a peer, time-out, or cancel."""
        try:
            with self._new_scope():
                await work(move)
                return None
        except TROUBLE as error:
            return self._trail.failure(error)
        return self._trail.failure(MoveError(self._why_cut()))

    async def _until_completed(self, move: Move) -> None:
        limit = self._request.limits.standstill
        complaint = f"the devices were not handed over within {limit:g} s"
        async with side_by_side() as nursery:
            await precopy.prepare(move, nursery)
            await precopy.copy(move)
            await within(limit, self._hand_over(move), complaint, Where.HERE)
            await switch.last_pass(move)

    async def _hand_over(self, move: Move) -> None:
        await switch.stop_devices(move)
        await switch.hand_over(move)

    # After migrate-continue

    async def _unclear(self, move: Move, failure: Failure) -> Report:
        """Something went wrong after QEMU was told to go on: first of all, who has the guest?"""
        guest, limit = Guest.UNKNOWN, self._request.limits.recovery
        with trio.move_on_after(limit) as scope:
            try:
                guest = await whose(move)
            except TROUBLE as error:
                self._trail.note(f"nobody can say who has the guest: {reason(error)}")
        if scope.cancelled_caught:
            self._trail.note(f"nobody has said within {limit:g} s who has the guest")
        if guest is Guest.DESTINATION:
            self._trail.note(f"in spite of this the guest arrived: {failure.reason}")
            return await self._arrive(move)
        return await self._give_up(move, failure, guest)

    async def _arrive(self, move: Move) -> Report:
        """The destination has the guest; nothing is cancelled any more. If it cannot start there, the source
        gets it back."""
        failure = None
        with trio.move_on_after(self._request.limits.standstill) as scope:
            try:
                await switch.restore(move)
                await switch.start(move)
            except TROUBLE as error:
                failure = self._trail.failure(error)
        if scope.cancelled_caught:
            seconds = self._request.limits.standstill
            text = f"the destination does not start the guest within {seconds:g} s"
            failure = self._trail.failure(MoveError(text, Where.DESTINATION))
        if failure is not None:
            running = await self._has_started(move)
            if running is not True:
                return await self._give_up(move, failure, Guest.UNKNOWN if running is None else Guest.SOURCE)
        await finish(move)
        self._trail.begin(Step.DONE)
        return await write_report(move, Outcome.COMPLETED, None, Guest.DESTINATION)

    async def _has_started(self, move: Move) -> bool | None:
        """Whether the guest runs at the destination; None: nobody can say."""
        if not move.started:
            return False
        running = None
        with trio.move_on_after(self._request.limits.recovery):
            try:
                running = await runs_there(move)
            except TROUBLE as error:
                self._trail.note(f"nobody can say whether the guest runs at the destination: {reason(error)}")
        if running is None:
            self._trail.note(
                "the destination's QEMU was told to start the guest, and has not answered since: the guest "
                "is there, or lost; the source is kept stopped, for two must never run"
            )
        move.started = running is not False
        return running

    async def _give_up(self, move: Move, failure: Failure, guest: Guest = Guest.SOURCE) -> Report:
        outcome = Outcome.CANCELLED if self._cancelled else Outcome.FAILED
        if guest is Guest.SOURCE:
            await lead_back(move)
        return await write_report(move, outcome, failure, guest)


async def migrate_guest(request: Request, tell: Callable[[Progress], None] = lambda progress: None) -> Report:
    """Move a guest. `tell` is called at every step, and several times a second while memory is copied."""
    return await GuestMigration(request, tell).run()
