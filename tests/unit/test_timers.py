# SPDX-License-Identifier: BSD-3-Clause
"""Device time, and callbacks that fail."""

import pytest

from vfio_user.device_models.timers import Timers


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


def fail() -> None:
    raise LookupError("by intention")


def test_timers_fire_in_the_order_of_their_deadlines() -> None:
    clock, fired = Clock(), list[int]()
    timers = Timers(clock)
    for deadline in (30, 10, 20, 10):
        timers.call_at(deadline, lambda deadline=deadline: fired.append(deadline))  # type: ignore[misc]
    assert timers.next_deadline() == 10
    timers.run_due()
    assert fired == []
    clock.now = 25
    timers.run_due()
    assert fired == [10, 10, 20]
    assert timers.next_deadline() == 30


def test_time_stands_still_while_frozen() -> None:
    clock, fired = Clock(), list[int]()
    timers = Timers(clock)
    timers.call_at(10, lambda: fired.append(timers.clock()))
    clock.now = 4
    timers.freeze()
    clock.now = 1000
    timers.run_due()
    assert (fired, timers.clock(), timers.next_deadline()) == ([], 4, None)
    timers.thaw()
    assert timers.next_deadline() == 1006
    clock.now = 1006
    timers.run_due()
    assert fired == [10]


def test_a_cancelled_timer_is_not_waited_for() -> None:
    timers = Timers(Clock())
    timer = timers.call_at(10, fail)
    timer.cancel()
    assert not timer.active
    assert timers.next_deadline() is None


def test_one_set_by_a_callback_waits_for_the_next_call() -> None:
    clock, fired = Clock(), list[int]()
    timers = Timers(clock)

    def again() -> None:
        fired.append(len(fired))
        timers.call_at(0, again)

    timers.call_at(0, again)
    timers.run_due()
    assert fired == [0]
    timers.run_due()
    assert fired == [0, 1]


def test_without_a_hook_an_exception_comes_out() -> None:
    timers = Timers(Clock())
    timers.call_at(0, fail)
    with pytest.raises(LookupError):
        timers.run_due()


def test_with_a_hook_the_other_timers_fire() -> None:
    errors, fired = list[Exception](), list[int]()
    timers = Timers(Clock(), errors.append)
    for callback in (fail, lambda: fired.append(1), fail, lambda: fired.append(2)):
        timers.call_at(0, callback)
    timers.run_due()
    assert fired == [1, 2]
    assert [str(error) for error in errors] == ["by intention"] * 2
    assert timers.next_deadline() is None
