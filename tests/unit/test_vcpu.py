# SPDX-License-Identifier: BSD-3-Clause
"""Processors that stop: guest code goes on exactly where it was, and not before."""

import pytest
import trio
import trio.testing

from vfio_user.client.background import background
from vfio_user.client.vcpu import Vcpus


class Busy:
    """Something with requests under way, as a `Link` has."""

    def __init__(self) -> None:
        self.under_way = 0


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_code_runs_and_gives_its_result() -> None:
    async def add(first: int, second: int) -> int:
        await trio.lowlevel.checkpoint()
        return first + second

    assert await Vcpus().run(add, 1, 2) == 3


async def test_an_exception_comes_out() -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("guest")

    with pytest.raises(KeyError, match="guest"):
        await Vcpus().run(fail)


async def test_what_has_come_waits_for_the_processor() -> None:
    vcpus, steps = Vcpus(), list[int]()
    send, receive = trio.open_memory_channel[int](10)

    async def guest() -> None:
        async for value in receive:
            steps.append(value)

    async with background() as nursery:
        nursery.start_soon(vcpus.run, guest)
        await send.send(1)
        await settle()
        await vcpus.pause([])
        await send.send(2)
        await send.send(3)
        await settle()
        assert steps == [1]
        vcpus.resume()
        await settle()
        assert steps == [1, 2, 3]


async def test_what_is_begun_while_they_stand_still_waits() -> None:
    vcpus, steps = Vcpus(), list[str]()

    async def guest() -> None:
        steps.append("ran")

    await vcpus.pause([])
    async with background() as nursery:
        nursery.start_soon(vcpus.run, guest)
        await settle()
        assert steps == []
        vcpus.resume()
        await settle()
        assert steps == ["ran"]


async def test_paused_twice_one_resume_is_enough() -> None:
    vcpus, steps = Vcpus(), list[int]()
    send, receive = trio.open_memory_channel[int](1)

    async def guest() -> None:
        steps.append(await receive.receive())

    async with background() as nursery:
        nursery.start_soon(vcpus.run, guest)
        await settle()
        await vcpus.pause([])
        await send.send(1)
        await settle()
        await vcpus.pause([])
        vcpus.resume()
        await settle()
        assert steps == [1]


async def test_a_time_out_of_the_guest_does_not_let_it_run() -> None:
    vcpus, steps = Vcpus(), list[str]()

    async def guest() -> None:
        with trio.move_on_after(0.01):
            await trio.sleep_forever()
        steps.append("timed out")

    async with background() as nursery:
        nursery.start_soon(vcpus.run, guest)
        await settle()
        await vcpus.pause([])
        await trio.sleep(0.03)
        assert steps == []
        vcpus.resume()
        await trio.sleep(0.03)
        assert steps == ["timed out"]


async def test_pause_waits_for_accesses_under_way() -> None:
    vcpus, link, paused = Vcpus(), Busy(), trio.Event()
    link.under_way = 1

    async def pause() -> None:
        await vcpus.pause([link])  # type: ignore[list-item]
        paused.set()

    async with background() as nursery:
        nursery.start_soon(pause)
        await trio.sleep(0.005)
        assert not paused.is_set()
        link.under_way = 0
        with trio.fail_after(20):
            await paused.wait()


async def test_a_guest_that_stands_still_can_be_ended() -> None:
    vcpus = Vcpus()
    with trio.fail_after(20):
        async with background() as nursery:
            nursery.start_soon(vcpus.run, trio.sleep_forever)
            await settle()
            await vcpus.pause([])
            vcpus.end()
        await vcpus.pause([])  # has no effect any more
        assert vcpus.running
