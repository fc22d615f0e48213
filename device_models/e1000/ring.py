# SPDX-License-Identifier: BSD-3-Clause
"""A descriptor ring: base, length, head and tail registers (Software Developer's Manual, 3.2.6 and 3.4)."""

from vfio_user.device_models.device import Dma
from vfio_user.device_models.e1000.descriptors import SIZE
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.registers import RegisterFile


class Ring:
    """The registers of one ring. Whatever the guest writes into them, an index stays inside the ring."""

    def __init__(self, file: RegisterFile, prefix: str) -> None:
        """`prefix` is RD or TD."""
        self._low, self._high = file.cell(prefix + "BAL"), file.cell(prefix + "BAH")
        self._length = file.cell(prefix + "LEN")
        self.head, self.tail = file.cell(prefix + "H"), file.cell(prefix + "T")
        self.generation = 0
        """Grows when the guest moves the ring or its head: what was read before is void then."""

    @property
    def base(self) -> int:
        """Guest address of the first descriptor."""
        return self._high.value << 32 | self._low.value

    @property
    def count(self) -> int:
        """Descriptors in the ring."""
        return self._length.value // SIZE

    @property
    def owned(self) -> int:
        """Descriptors that are the device's; 0 also if head or tail lie outside of the ring."""
        count = self._length.value // SIZE
        head, tail = self.head.value, self.tail.value
        return (tail - head) % count if head < count and tail < count else 0

    def address(self, step: int) -> int:
        """Guest address of the descriptor `step` behind the head."""
        return self.base + (self.head.value + step) % self.count * SIZE

    def advance(self, steps: int) -> None:
        """Move the head."""
        self.head.value = (self.head.value + steps) % self.count

    def pieces(self, steps: int) -> list[tuple[int, int]]:
        """Address and bytes of the next `steps` descriptors: two pieces where the ring wraps."""
        head = self.head.value
        first = min(steps, self.count - head)
        pieces = [(self.base + head * SIZE, first * SIZE)]
        if steps > first:
            pieces.append((self.base, (steps - first) * SIZE))
        return pieces

    async def read(self, dma: Dma, most: int) -> Buffer:
        """The next descriptors, at most `most`, of those that are the device's. Raises DmaError."""
        pieces = self.pieces(min(most, self.owned))
        if len(pieces) == 1:
            return await dma.read(*pieces[0])
        return b"".join(await dma.read_many(pieces))

    def write_back(self, descriptors: bytes, steps: int) -> list[tuple[int, Buffer]]:
        """What to write in order to put back the next `steps` descriptors.

        Where the ring wraps, the later ones go first: the guest looks at the first ones first, so that as
        soon as it can see any, all are there. A write that was cut in between can be done again unseen.
        """
        segments: list[tuple[int, Buffer]] = []
        place = 0
        for address, length in self.pieces(steps) if steps else ():
            segments.append((address, memoryview(descriptors)[place : place + length]))
            place += length
        segments.reverse()
        return segments
