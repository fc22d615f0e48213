# SPDX-License-Identifier: BSD-3-Clause
"""The device of tests/qemu/models_msix.py in a guest without a driver for it, as its shell reaches it."""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from vfio_user.client.qemu.command import MachineOptions
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.moving import Model

HERE = str(Path(__file__).parents[1] / "qemu")
NOBODYS = 0x0A00_0000
"""Guest memory that its kernel has been told not to use: vectors point there."""
GUEST = MachineOptions(memory_mib=192, kernel_words="mem=128M nodrivers")
VECTORS, FIRE, MARK, NOTE = 16, 0x0, 0x8, 0x4
PENDING, SILENT, HELD = 3, 4, 5
"""A vector that is masked and was fired, one that is masked, and one that was in use, was masked, and was
fired then: QEMU holds its message."""


def model(name: str = "Vectors", **place: Any) -> Model:
    return Model(f"models_msix:{name}", "dev", environment=os.environ | {"PYTHONPATH": HERE}, **place)


@dataclass(frozen=True, slots=True)
class Guest:
    """The device as the guest's shell reaches it."""

    machine: Machine
    place: str
    bars: tuple[int, ...]

    async def words(self, *addresses: int) -> list[int]:
        reads = "; ".join(f"devmem {address:#x}" for address in addresses)
        return [int(line, 16) for line in (await self.machine.check(reads)).split()]

    async def write(self, *pairs: tuple[int, int]) -> None:
        await self.machine.check(" && ".join(f"devmem {place:#x} 32 {value:#x}" for place, value in pairs))

    async def configure(self, *words: str) -> None:
        """Writes to the configuration space, in setpci's words."""
        await self.machine.check(f"setpci -s {self.place} {' '.join(words)}")

    async def space(self) -> str:
        return await self.machine.check(f"lspci -xxxx -s {self.place}")

    async def note(self, value: int | None = None) -> int:
        """The word at an I/O port, written first."""
        port = self.bars[2] + NOTE
        if value is not None:
            text = "".join(f"\\x{byte:02x}" for byte in value.to_bytes(4, "little"))
            await self.machine.check(f"printf '{text}' | dd of=/dev/port bs=4 seek={port} oflag=seek_bytes")
        read = f"dd if=/dev/port bs=4 count=1 skip={port} iflag=skip_bytes 2>/dev/null | od -An -tx4"
        return int(await self.machine.check(read), 16)

    async def require_words(self, words: Mapping[int, int], seconds: float = 60.0) -> None:
        """Waits until there are these words at the addresses: writes are posted, and a signal goes through
        QEMU's main loop. AssertionError when they do not come."""
        found: list[int] = []
        with trio.move_on_after(seconds):
            while found != list(words.values()):
                found = await self.words(*words)
        assert dict(zip(words, found, strict=False)) == words

    async def require_fired(self, messages: Mapping[int, int], seconds: float = 60.0) -> None:
        """Fires vectors. Each sends its message to the guest's memory, where it is forgotten; 0: none. The
        silent ones go first: theirs would be there when that of a later one is."""
        vectors = sorted(messages, key=messages.__getitem__)
        assert messages[vectors[-1]]
        await self.write(*((self.bars[0] + FIRE, vector) for vector in vectors))
        await self.require_words({NOBODYS + 4 * vector: messages[vector] for vector in vectors}, seconds)
        await self.write(*((NOBODYS + 4 * vector, 0) for vector in vectors))

    def table(self, vector: int) -> int:
        return self.bars[3] + 16 * vector


async def set_up(machine: Machine) -> Guest:
    """The guest's side: device on, marks in its registers."""
    path = (await machine.check("dirname $(grep -l 0x5c7b /sys/bus/pci/devices/*/device)")).strip()
    rows = (await machine.check(f"echo 1 > {path}/enable; cat {path}/resource")).splitlines()[:6]
    guest = Guest(machine, path.rpartition("/")[2], tuple(int(row.split()[0], 16) for row in rows))
    await guest.configure("COMMAND=7", "CACHE_LINE_SIZE=10", "INTERRUPT_LINE=5a")
    await guest.write((guest.bars[0] + MARK, 0xCAFE))
    assert await guest.note(0xBEEF) == 0xBEEF
    return guest


async def use_vectors(guest: Guest) -> None:
    """MSI-X with all vectors, one of them pending."""
    entries = (
        struct.pack("<QII", NOBODYS + 4 * vector, 0x1000 + vector, vector in (PENDING, SILENT))
        for vector in range(VECTORS)
    )
    words = struct.unpack(f"<{4 * VECTORS}I", b"".join(entries))
    await guest.configure("CAP_MSIX+2.w=0")
    await guest.write(*((guest.table(0) + 4 * number, word) for number, word in enumerate(words)))
    await guest.configure("CAP_MSIX+2.w=8000")
    await guest.require_fired({0: 0x1000, PENDING: 0, VECTORS - 1: 0x100F})
    await guest.require_fired({HELD: 0x1000 + HELD})
    await guest.write((guest.table(HELD) + 12, 1))
    await guest.require_fired({0: 0x1000, HELD: 0})


async def mask_all(guest: Guest) -> None:
    """By MSI-X's function mask."""
    await guest.configure("CAP_MSIX+2.w=c000")


async def require_all_masked(guest: Guest) -> None:
    """What is fired under the mask comes once it is taken away, which it is then."""
    place = NOBODYS + 4
    await guest.write((guest.bars[0] + FIRE, 1))
    assert await guest.words(place) == [0]
    await guest.configure("CAP_MSIX+2.w=8000")
    await guest.require_words({place: 0x1001})
    # Of those in use, one each may be too many: nobody can tell whether QEMU held them.
    await guest.require_fired({0: 0x1000, 1: 0x1001, VECTORS - 1: 0x100F})


async def require_marks(guest: Guest) -> None:
    assert await guest.words(guest.bars[0] + MARK) == [0xCAFE]
    assert await guest.note() == 0xBEEF


async def require_vectors(guest: Guest, seconds: float = 60.0) -> None:
    """All that `use_vectors` has left is there, and works."""
    await guest.require_fired({0: 0x1000, 1: 0x1001, SILENT: 0, 15: 0x100F}, seconds)
    for vector in (PENDING, HELD):
        place = NOBODYS + 4 * vector
        assert await guest.words(guest.table(vector) + 12, place) == [1, 0]
        await guest.write((guest.table(vector) + 12, 0))
        await guest.require_words({place: 0x1000 + vector})
        await guest.write((place, 0), (guest.table(vector) + 12, 1), (guest.table(vector) + 12, 0))
        await guest.require_fired({0: 0x1000})
        assert await guest.words(place) == [0]  # it came once
