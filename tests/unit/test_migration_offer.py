# SPDX-License-Identifier: BSD-3-Clause
"""The migration region of v1 and what its client has read: by messages, or unseen through a mapping."""

from collections.abc import Callable

import pytest

from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.scratch import Scratch
from vfio_user.server.migration.engine import MigrationEngine
from vfio_user.server.migration.offer import Offer
from vfio_user.server.migration.region import DATA_OFFSET, MigrationRegion

STATE, PENDING, OFFSET, SIZE = 0, 8, 16, 24
PRE_COPY, SAVING = b"\3\0\0\0", b"\2\0\0\0"
HEAD = b"vfiouser"


class Client:
    """Of a region; `lent`: it has asked for the descriptor of the data area."""

    def __init__(self, region: MigrationRegion, *, lent: bool) -> None:
        self.region = region
        self.memory = region.memory if lent else None

    def number(self, offset: int) -> int:
        return int.from_bytes(self.region.read(offset, 8), "little")

    def offered(self) -> int:
        """Begin an iteration; bytes."""
        assert self.number(PENDING)
        assert self.number(OFFSET) == DATA_OFFSET
        return self.number(SIZE)

    def read(self, count: int) -> bytes:
        return self.region.read(DATA_OFFSET, count)

    def is_offered_again(self) -> bool:
        """Whether, in stop-and-copy now, the stream's head comes once more."""
        self.region.write(STATE, SAVING)
        self.offered()
        return self.read(len(HEAD)) == HEAD


@pytest.fixture
def open_client() -> Callable[..., Client]:
    def make(*, lent: bool) -> Client:
        host = FakeHost()
        device = Scratch(host, memory=4096)
        device.regions[2].write(0, b"x")
        region = MigrationRegion(MigrationEngine(device, host))
        region.write(STATE, PRE_COPY)
        return Client(region, lent=lent)

    return make


def test_who_cannot_have_mapped_it_has_read_what_was_read(open_client: Callable[..., Client]) -> None:
    client = open_client(lent=False)
    client.offered()
    assert client.is_offered_again()
    client = open_client(lent=False)
    client.read(client.offered())
    assert not client.is_offered_again()


def test_who_may_have_mapped_it_has_read_what_was_measured(open_client: Callable[..., Client]) -> None:
    client = open_client(lent=True)
    client.offered()
    assert not client.is_offered_again()
    client = open_client(lent=True)
    client.number(PENDING)
    client.number(OFFSET)
    assert client.is_offered_again(), "not measured"


def test_who_began_to_read_by_messages_has_not_finished(open_client: Callable[..., Client]) -> None:
    client = open_client(lent=True)
    client.read(client.offered() - 1)
    assert client.is_offered_again()


def test_who_reads_by_messages_does_so_in_the_next_iteration_too(open_client: Callable[..., Client]) -> None:
    client = open_client(lent=True)
    client.read(client.offered())
    assert not client.is_offered_again()
    size = client.offered()
    assert client.number(PENDING) >= size > 0
    assert client.offered() == size


def test_who_maps_it_and_reads_the_end_by_messages_gets_on(open_client: Callable[..., Client]) -> None:
    client = open_client(lent=True)
    size = client.offered()
    client.region.read(DATA_OFFSET + size - 5, 5)
    assert not client.is_offered_again()


def test_an_offer_is_whole_once_every_byte_was_read() -> None:
    offer = Offer(10)
    for offset, count in ((5, 5), (0, 3), (2, 2), (4, 0)):
        offer.read(offset, count)
        assert (offer.whole, offer.broken_off) == (False, False)
    offer.read(4, 1)
    assert (offer.whole, offer.broken_off) == (True, False)
    assert (Offer(0).whole, Offer(0).broken_off) == (True, False)
