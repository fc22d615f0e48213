# SPDX-License-Identifier: BSD-3-Clause
"""OwnedFd: one owner, closed exactly once, and a warning when it is lost."""

import os

import pytest

from vfio_user.transport.fds import OwnedFd, close_all, own


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def new_fd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def test_close_closes_once() -> None:
    number = new_fd()
    fd = OwnedFd(number)
    assert fd.fileno() == number
    assert not fd.closed
    fd.close()
    assert fd.closed
    assert not is_open(number)
    other = new_fd()  # the kernel gives the same number again
    assert other == number
    fd.close()
    assert is_open(other)
    os.close(other)


def test_fileno_of_a_closed_one_is_an_error() -> None:
    fd = OwnedFd(new_fd())
    fd.close()
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()
    assert repr(fd) == "<OwnedFd closed>"


def test_detach_gives_the_descriptor_away() -> None:
    fd = OwnedFd(new_fd())
    number = fd.detach()
    assert fd.closed
    assert is_open(number)
    os.close(number)


def test_context_manager_closes() -> None:
    with OwnedFd(new_fd()) as fd:
        number = fd.fileno()
    assert not is_open(number)


def test_duplicate_has_its_own_owner() -> None:
    with OwnedFd(new_fd()) as fd, fd.duplicate() as second:
        assert second.fileno() != fd.fileno()
        assert os.path.sameopenfile(second.fileno(), fd.fileno())
        assert not os.get_inheritable(second.fileno())


def test_a_lost_one_is_closed_with_a_warning() -> None:
    number = new_fd()
    fd = OwnedFd(number)
    with pytest.warns(ResourceWarning, match=f"unclosed <OwnedFd {number}>"):
        del fd  # the last reference
    assert not is_open(number)


def test_own_and_close_all() -> None:
    numbers = [new_fd(), new_fd()]
    fds = own(numbers)
    assert [fd.fileno() for fd in fds] == numbers
    close_all(fds)
    assert not any(is_open(number) for number in numbers)
