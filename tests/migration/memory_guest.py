# SPDX-License-Identifier: BSD-3-Clause
"""A guest that writes to the large memory of `scratch` all the time, and reads what it wrote before."""

import random

import trio

from vfio_user.client.guest import GuestDevice

REGION, WORD = 2, 8


class ScribbleError(Exception):
    """The memory is not what was written."""


class Scribbler:
    """`written` counts words that were written. Once it is not `going` any more, it looks at every place
    that was ever written, and has `ended`."""

    def __init__(self, device: GuestDevice, size: int, chance: random.Random) -> None:
        self.device = device
        self.written = 0
        self.going = True
        self.ended = False
        self._size = size
        self._chance = chance
        self._known: dict[int, int] = {}
        self._places: list[int] = []

    async def run(self) -> None:
        while self.going:
            for _ in range(8):
                await self.write()
            await trio.sleep(0.01)  # with v1 a page takes more messages to read than to write
            for _ in range(2):
                await self.look(self._chance.choice(self._places))
        for place in self._places:
            await self.look(place)
        self.ended = True

    async def write(self) -> None:
        """Anywhere; often where something was before, and sometimes zero."""
        chance = self._chance
        fresh = len(self._places) < 2 or chance.random() < 0.3
        place = chance.randrange(self._size // WORD) * WORD if fresh else chance.choice(self._places)
        value = chance.choice([0, chance.getrandbits(64)])
        if place not in self._known:
            self._places.append(place)
        self._known[place] = value
        await self.device.write(REGION, place, value, WORD)
        self.written += 1

    async def look(self, place: int) -> None:
        found = await self.device.read(REGION, place, WORD)
        if found != self._known[place]:
            raise ScribbleError(f"{found:#x} at {place:#x}, {self._known[place]:#x} was written there")
