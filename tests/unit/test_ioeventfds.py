# SPDX-License-Identifier: BSD-3-Clause
"""Doorbells by eventfd: what is offered, what a ring does, and what is left when the client has gone."""

import os
from collections.abc import Iterator

import pytest

from vfio_user.device_models.regions import Buffer, Doorbell, Region
from vfio_user.protocol.constants import IoeventfdFlags
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.messages import Ioeventfd
from vfio_user.server.ioeventfds import Ioeventfds
from vfio_user.transport.poller import Poller


class Recorder(Region):
    """A region with three doorbells that notes what is written; writes at 16 fail."""

    doorbells = (Doorbell(0, 4), Doorbell(8, 2, 0x1234), Doorbell(16, 8, 2**64 - 1))

    def __init__(self) -> None:
        super().__init__(4096)
        self.writes: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: Buffer) -> None:
        self.writes.append((offset, bytes(data)))
        if offset == 16:
            raise RuntimeError("a broken model")


class Plain(Region):
    def __init__(self) -> None:
        super().__init__(4096)


class Setup:
    def __init__(self) -> None:
        self.poller = Poller()
        self.region = Recorder()
        self.ioeventfds = Ioeventfds(self.poller, {0: self.region, 1: Plain()})


@pytest.fixture
def setup() -> Iterator[Setup]:
    before = len(os.listdir("/proc/self/fd"))
    setup = Setup()
    yield setup
    setup.ioeventfds.release()
    setup.poller.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def test_what_is_offered(setup: Setup) -> None:
    offered = setup.ioeventfds.offer(0, 16)
    datamatch = IoeventfdFlags.DATAMATCH
    assert offered.sub_regions == (
        Ioeventfd(0, 4, 0),
        Ioeventfd(8, 2, 1, datamatch, 0x1234),
        Ioeventfd(16, 8, 2, datamatch, 2**64 - 1),
    )
    assert len(set(offered.fds)) == 3


def test_asking_again_gives_the_same(setup: Setup) -> None:
    assert setup.ioeventfds.offer(0, 16) == setup.ioeventfds.offer(0, 16)


def test_a_ring_is_one_write_however_often(setup: Setup) -> None:
    fds = setup.ioeventfds.offer(0, 16).fds
    os.eventfd_write(fds[1], 5)
    assert setup.poller.poll()
    assert setup.region.writes == [(8, b"\x34\x12")]
    os.eventfd_write(fds[0], 1)
    setup.poller.poll()
    assert setup.region.writes[1:] == [(0, bytes(4))]
    assert not setup.poller.poll()


def test_a_count_that_the_client_has_taken_rings_nothing(setup: Setup) -> None:
    """Even if the client has made the shared eventfd blocking."""
    fd = setup.ioeventfds.offer(0, 16).fds[0]
    os.set_blocking(fd, True)
    setup.poller._readable[fd]()  # as if the poller had seen a count that is gone
    assert setup.region.writes == []


def test_a_model_that_fails_does_not_end_the_loop(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    fds = setup.ioeventfds.offer(0, 16).fds
    for _ in range(2):
        os.eventfd_write(fds[2], 1)
        setup.poller.poll()
    assert setup.region.writes == 2 * [(16, b"\xff" * 8)]
    assert "the doorbell at 0x10 failed" in caplog.text


def test_ringing_all_takes_what_the_poller_has_not_seen_yet(setup: Setup) -> None:
    fds = setup.ioeventfds.offer(0, 16).fds
    for fd in (fds[0], fds[1], fds[1]):
        os.eventfd_write(fd, 1)
    setup.ioeventfds.ring_all()
    assert setup.region.writes == [(0, bytes(4)), (8, b"\x34\x12")]
    setup.ioeventfds.ring_all()
    assert not setup.poller.poll()
    assert len(setup.region.writes) == 2
    setup.ioeventfds.release()
    setup.ioeventfds.ring_all()


def test_no_more_than_a_message_carries(setup: Setup) -> None:
    offered = setup.ioeventfds.offer(0, 2)
    assert (len(offered.sub_regions), len(offered.fds)) == (2, 2)
    assert setup.ioeventfds.offer(0, 16).fds[:2] == offered.fds
    assert setup.ioeventfds.offer(0, 0).fds == ()


def test_a_region_without_doorbells(setup: Setup) -> None:
    offered = setup.ioeventfds.offer(1, 16)
    assert (offered.sub_regions, offered.fds) == ((), ())


def test_a_region_that_is_not_there(setup: Setup) -> None:
    with pytest.raises(VfioUserError, match="no region 7"):
        setup.ioeventfds.offer(7, 16)


def test_after_release_a_signal_rings_nothing(setup: Setup) -> None:
    copy = os.dup(setup.ioeventfds.offer(0, 16).fds[0])  # as KVM holds it
    setup.ioeventfds.release()
    os.eventfd_write(copy, 1)
    assert not setup.poller.poll()
    assert setup.region.writes == []
    assert len(setup.ioeventfds.offer(0, 16).fds) == 3
    os.close(copy)
