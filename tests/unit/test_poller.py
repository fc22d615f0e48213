# SPDX-License-Identifier: BSD-3-Clause
"""Many descriptors behind one."""

import os
import select
from collections.abc import Iterator
from contextlib import closing

import pytest

from vfio_user.transport.poller import Poller


@pytest.fixture
def events() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3)]
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def poller() -> Iterator[Poller]:
    with closing(Poller()) as poller:
        yield poller


def drain(fd: int) -> None:
    os.eventfd_read(fd)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_its_descriptor_is_readable_while_there_is_something_to_do(poller: Poller, events: list[int]) -> None:
    poller.register(events[0], lambda: drain(events[0]))
    assert not readable(poller.fileno())
    assert not poller.poll()
    os.eventfd_write(events[0], 1)
    assert readable(poller.fileno())
    assert poller.poll()
    assert not readable(poller.fileno())


def test_only_what_is_ready_is_called(poller: Poller, events: list[int]) -> None:
    called: list[int] = []
    for fd in events:
        poller.register(fd, lambda fd=fd: called.append(os.eventfd_read(fd) and fd))  # type: ignore[misc]
    for fd in (events[2], events[0]):
        os.eventfd_write(fd, 1)
    poller.poll()
    assert sorted(called) == sorted([events[0], events[2]])


def test_reading_and_writing_are_watched_apart(poller: Poller, events: list[int]) -> None:
    called: list[str] = []
    poller.register(events[0], lambda: called.append("read"))
    poller.watch_writable(events[0], lambda: called.append("write"))
    poller.poll()
    assert called == ["write"]
    poller.watch_writable(events[0], None)
    assert not poller.poll()
    os.eventfd_write(events[0], 1)
    poller.poll()
    assert called == ["write", "read"]
    poller.unregister(events[0])
    assert not poller.poll()


def test_unregistering_twice_is_harmless(poller: Poller, events: list[int]) -> None:
    poller.unregister(events[0])
    poller.register(events[0], lambda: None)
    poller.unregister(events[0])
    poller.unregister(events[0])
    poller.watch_writable(events[0], None)


def test_a_callback_may_remove_another_of_the_same_turn(poller: Poller, events: list[int]) -> None:
    called: list[int] = []

    def alone(fd: int) -> None:
        called.append(fd)
        for other in events:
            poller.unregister(other)

    for fd in events:
        poller.register(fd, lambda fd=fd: alone(fd))  # type: ignore[misc]
        os.eventfd_write(fd, 1)
    poller.poll()
    assert len(called) == 1


def test_a_peer_that_hangs_up_is_told_to_whoever_watches(poller: Poller) -> None:
    called: list[str] = []
    reading, writing = os.pipe()
    poller.watch_writable(writing, lambda: called.append("write"))
    os.close(reading)
    poller.poll()
    assert called == ["write"]
    poller.watch_writable(writing, None)
    os.close(writing)


def fail() -> None:
    raise LookupError("by intention")


def test_without_a_hook_an_exception_comes_out(poller: Poller, events: list[int]) -> None:
    poller.register(events[0], fail)
    os.eventfd_write(events[0], 1)
    with pytest.raises(LookupError):
        poller.poll()


def test_with_a_hook_the_others_are_served(events: list[int]) -> None:
    errors: list[Exception] = []
    called: list[int] = []
    with closing(Poller(errors.append)) as poller:
        for fd in events:
            poller.register(fd, fail if fd == events[0] else lambda: called.append(1))
            os.eventfd_write(fd, 1)
        assert poller.poll()
    assert [str(error) for error in errors] == ["by intention"]
    assert called == [1, 1]


def test_urgent_ones_are_served_between_pieces_of_other_work(poller: Poller, events: list[int]) -> None:
    called: list[str] = []

    def long_work() -> None:
        drain(events[0])
        os.eventfd_write(events[1], 1)
        os.eventfd_write(events[2], 1)
        poller.poll_urgent()
        called.append("work")

    def urgent() -> None:
        drain(events[1])
        called.append("urgent")

    poller.register(events[0], long_work)
    poller.register(events[1], urgent, urgent=True)
    poller.register(events[2], lambda: called.append("other"))
    os.eventfd_write(events[0], 1)
    poller.poll()
    assert called == ["urgent", "work"]


def test_an_urgent_one_that_is_unregistered_is_not_served_any_more(poller: Poller, events: list[int]) -> None:
    poller.register(events[0], lambda: pytest.fail("it was unregistered"), urgent=True)
    poller.unregister(events[0])
    os.eventfd_write(events[0], 1)
    poller.poll_urgent()
    assert not poller.poll()
