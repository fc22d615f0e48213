# SPDX-License-Identifier: BSD-3-Clause
"""The tasks of a device, in particular those that break the rules: none ends the runner."""

from collections.abc import Callable, Generator, Hashable
from functools import partial
from typing import Any

import pytest

from vfio_user.device_models.tasks import Completion, TaskRunner, pause


class Runner(TaskRunner):
    """Keeps the errors."""

    def __init__(self) -> None:
        self.errors: list[tuple[Hashable, str]] = []
        super().__init__(lambda key, error: self.errors.append((key, str(error))))


@pytest.fixture
def runner() -> Runner:
    return Runner()


def run(runner: Runner) -> None:
    for _ in range(20):
        runner.run_ready()


async def raises() -> None:
    await pause()
    raise ValueError("after a pause")


async def raises_at_its_end() -> None:
    try:
        await pause()
        await pause()
    finally:
        raise ValueError("while it is cut")


class Strange:
    def __await__(self) -> Generator[Any, None, None]:
        yield "no completion"


def works() -> dict[str, tuple[Callable[[], Any], str]]:
    def cannot_start() -> Any:
        raise ValueError("at its start")

    async def strange() -> None:
        await Strange()

    return {
        "raises": (raises, "after a pause"),
        "cannot start": (cannot_start, "at its start"),
        "no coroutine": (lambda: None, "'NoneType' object has no attribute 'send'"),
        "awaits what it may not": (strange, "'no completion'"),
    }


@pytest.mark.parametrize(("work", "reason"), works().values(), ids=works().keys())
def test_a_task_that_fails_is_reported_and_can_be_started_again(
    runner: Runner, work: Callable[[], Any], reason: str
) -> None:
    for number in range(1, 3):
        runner.start("key", work)
        run(runner)
        assert runner.idle
        assert len(runner.errors) == number
    assert all(key == "key" and reason in text for key, text in runner.errors)


def test_the_other_tasks_of_the_turn_are_run(runner: Runner) -> None:
    done: list[int] = []

    async def good() -> None:
        done.append(1)

    for key in range(6):
        runner.start(key, good if key % 2 else lambda: None)  # type: ignore[arg-type, return-value]
    run(runner)
    assert done == [1, 1, 1]
    assert [key for key, _ in runner.errors] == [0, 2, 4]


@pytest.mark.parametrize("cut", ["cancel", "cancel_all", "cut"])
def test_a_task_that_fails_while_it_is_cut_is_reported(runner: Runner, cut: str) -> None:
    runner.start("key", raises_at_its_end)
    runner.run_ready()
    runner.stop()
    {"cancel": lambda: runner.cancel("key"), "cancel_all": runner.cancel_all, "cut": runner.cut}[cut]()
    assert runner.errors == [("key", "while it is cut")]
    assert runner.idle == (cut != "cut")


def test_a_stop_lets_tasks_stand_still_and_a_cut_lets_them_begin_anew(runner: Runner) -> None:
    answers = [Completion[int](), Completion[int]()]
    seen: list[object] = []

    async def work() -> None:
        seen.append("begun")
        for answer in answers:
            seen.append(await answer)

    runner.start("key", work)
    run(runner)
    runner.stop()
    answers[0].finish(1)
    run(runner)
    assert seen == ["begun"]
    runner.resume()
    run(runner)
    assert seen == ["begun", 1]
    runner.stop()
    runner.cut()
    answers[1].finish(2)
    run(runner)
    assert seen == ["begun", 1]
    runner.resume()
    run(runner)
    assert seen == ["begun", 1, "begun", 1, 2]
    assert runner.idle


def test_an_answer_that_has_come_is_taken_note_of_before_a_stop(runner: Runner) -> None:
    answers = {key: Completion[int]() for key in ("answered", "waiting")}
    seen: list[str] = []

    async def wait_for(key: str) -> None:
        await answers[key]
        seen.append(key)
        await pause()
        seen.append("too much")

    async def not_yet_begun() -> None:
        seen.append("begun")

    for key in answers:
        runner.start(key, partial(wait_for, key))
    run(runner)
    runner.start("new", not_yet_begun)
    answers["answered"].finish(1)
    runner.settle()
    runner.stop()
    assert seen == ["answered"]
    runner.resume()
    run(runner)
    assert seen == ["answered", "begun", "too much"]


def test_a_resume_of_what_runs_changes_nothing(runner: Runner) -> None:
    answer: Completion[int] = Completion()

    async def work() -> None:
        await answer

    runner.start("key", work)
    run(runner)
    runner.resume()
    assert not runner.ready
    answer.finish(1)
    run(runner)
    assert runner.idle


def test_a_task_that_cancels_itself_and_then_fails_at_its_end(runner: Runner) -> None:
    async def work() -> None:
        runner.cancel("key")
        try:
            await pause()
        finally:
            raise ValueError("while it is cut")

    runner.start("key", work)
    run(runner)
    assert runner.errors == [("key", "while it is cut")]
    assert runner.idle


def test_a_start_while_the_failing_task_runs_is_not_forgotten(runner: Runner) -> None:
    runner.start("key", raises)
    runner.run_ready()
    runner.start("key", raises)
    run(runner)
    assert len(runner.errors) == 2


def test_a_reply_that_comes_after_the_cut_wakes_nobody(runner: Runner) -> None:
    completion: Completion[int] = Completion()
    results: list[int] = []

    async def work() -> None:
        results.append(await completion)

    runner.start("key", work)
    runner.run_ready()
    runner.cancel("key")
    completion.finish(7)
    run(runner)
    assert results == []
    assert runner.idle


def test_the_rest_is_not_run_once_a_task_has_stopped_the_runner(runner: Runner) -> None:
    done: list[str] = []

    async def stops() -> None:
        runner.stop()

    async def late() -> None:
        done.append("late")

    runner.start(1, stops)
    runner.start(2, late)
    run(runner)
    assert done == []
    runner.resume()
    runner.cancel(1)
    run(runner)
    assert done == ["late"]
