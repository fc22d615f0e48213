# SPDX-License-Identifier: BSD-3-Clause
"""A guest that lets `scratch` copy memory all the time, and looks at every byte of it."""

import random

from vfio_user.client.guest import GuestDevice

ADDRESS, LENGTH, DOORBELL, STATUS = 0xFE0, 0xFF0, 0xFF8, 0xFFC
BUSY, DONE, FAILED = 1, 2, 4
LARGEST = 512 * 1024
SOURCE, TARGET = 0x100000, 1 << 32


class CopyError(Exception):
    """The device did not do what it was asked, or did it twice, or said so twice."""


class Copier:
    """`copies` counts those that were done and found right."""

    def __init__(self, device: GuestDevice, chance: random.Random) -> None:
        self.device = device
        self.copies = 0
        self._chance = chance
        self._noise = chance.randbytes(LARGEST)
        self._number = 0

    async def run(self) -> None:
        while True:
            await self.copy(self._chance.choice((1, 4096, 70_000, LARGEST)))

    async def copy(self, length: int) -> None:
        """One copy: other data each time, with a canary behind the target."""
        device, ram = self.device, self.device.ram
        self._number += 1
        data = self._number.to_bytes(8, "little") + self._noise
        ram.write(SOURCE, data[:length])
        ram.write(TARGET, bytes(length) + b"canary")
        await device.write(0, ADDRESS, SOURCE, 8)
        await device.write(0, ADDRESS + 8, TARGET, 8)
        await device.write(0, LENGTH, length)
        await device.write(0, DOORBELL, 1)
        await self._done()
        if device.ram.read(TARGET, length + 6) != data[:length] + b"canary":
            raise CopyError(f"copy {self._number} of {length} bytes is not what was to be copied")
        self.copies += 1

    async def _done(self) -> None:
        """INTx is a level: a signal may come with nothing behind it."""
        while True:
            await self.device.intx.wait()
            status = await self.device.read(0, STATUS)
            if status == DONE:
                break
            if status & FAILED:
                raise CopyError(f"copy {self._number}: status {status:#x}")
            await self.device.intx.acknowledge()
        await self.device.write(0, STATUS, DONE)
        if await self.device.read(0, STATUS):
            raise CopyError(f"copy {self._number}: the status comes again")
        await self.device.intx.acknowledge()
