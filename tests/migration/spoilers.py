# SPDX-License-Identifier: BSD-3-Clause
"""What may happen to a state on its way between two hosts."""

import random
from collections.abc import Callable, Mapping, Sequence

from sealed import FOREIGN

from vfio_user.client.migration.sink import Sink
from vfio_user.client.vmm_state import VmmState
from vfio_user.protocol.values import Payload

PIECE = 4096

Spoil = Callable[[list[bytes], random.Random], list[bytes]]
"""The pieces of a state as they arrive, from those that were sent."""


class Spoiler:
    """A `Sink` before another one. It keeps the state of each device back until all of it is there."""

    def __init__(self, sink: Sink, spoil: Spoil, chance: random.Random) -> None:
        self._sink = sink
        self._spoil = spoil
        self._chance = chance
        self._pieces: list[bytes] = []

    async def open(self, ranges: Sequence[tuple[int, int]], devices: int) -> None:
        assert devices == 1
        await self._sink.open(ranges, devices)

    async def memory(self, address: int, data: memoryview) -> None:
        await self._sink.memory(address, data)

    async def state(self, device: int, data: Payload) -> None:
        self._pieces += [bytes(data[begin : begin + PIECE]) for begin in range(0, len(data), PIECE)]

    async def setup(self, states: Sequence[VmmState]) -> None:
        arriving = self._spoil(list(self._pieces), self._chance)
        assert b"".join(arriving) != b"".join(self._pieces)
        for piece in arriving:
            if piece:
                await self._sink.state(0, piece)
        await self._sink.setup(states)

    async def complete(self) -> None:
        await self._sink.complete()

    async def abandon(self) -> None:
        await self._sink.abandon()


def truncated(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    data = b"".join(pieces)
    return [data[: chance.randrange(len(data))]]


def without_the_last_byte(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    return [*pieces[:-1], pieces[-1][:-1]]


def corrupted(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    index = chance.randrange(len(pieces))
    piece = bytearray(pieces[index])
    piece[chance.randrange(len(piece))] ^= 1 << chance.randrange(8)
    return [*pieces[:index], bytes(piece), *pieces[index + 1 :]]


def reordered(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    """Two different pieces change places."""
    first = chance.randrange(len(pieces))
    second = chance.choice([i for i, piece in enumerate(pieces) if piece != pieces[first]])
    pieces[first], pieces[second] = pieces[second], pieces[first]
    return pieces


def replayed(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    index = chance.randrange(len(pieces))
    return [*pieces[: index + 1], pieces[index], *pieces[index + 1 :]]


def replayed_whole(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    return [*pieces, *pieces]


def lost(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    index = chance.randrange(len(pieces))
    return [*pieces[:index], *pieces[index + 1 :]]


def nothing(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    return []


def followed_by_more(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    return [*pieces, b"\0"]


def noise(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    return [chance.randbytes(len(piece)) for piece in pieces]


def _foreign(make: Callable[[bytes], bytes]) -> Spoil:
    """Nothing is wrong with it but that: its digest fits."""
    return lambda pieces, _: [make(b"".join(pieces))]


SPOILERS: Mapping[str, Spoil] = {
    spoil.__name__: spoil
    for spoil in (
        truncated,
        without_the_last_byte,
        corrupted,
        reordered,
        replayed,
        replayed_whole,
        lost,
        nothing,
        followed_by_more,
        noise,
    )
} | {make.__name__: _foreign(make) for make in FOREIGN}

REASONS: Mapping[str, str] = {
    "truncated": "it ends after",
    "without_the_last_byte": "it ends after",
    "replayed_whole": "bytes follow the end",
    "nothing": "it ends after 0 bytes",
    "followed_by_more": "1 bytes follow the end",
    "noise": "this is no saved state of a device",
} | {make.__name__: reason for make, reason in FOREIGN.items()}
"""What a server says of them, where that does not depend on chance."""
