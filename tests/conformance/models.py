# SPDX-License-Identifier: BSD-3-Clause
"""Device models for the conformance tests: what the models of the package do not show."""

import contextlib
import os
import signal

from vfio_user.device_models.device import Host, pause
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.interrupts import Interrupts
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Area, Buffer, Doorbell, RamRegion, Region
from vfio_user.device_models.scratch import Scratch

PAGE = 4096
LARGE = 8 << 20


class Mappable(PciDevice):
    """BAR0 can be mapped as a whole, BAR2 only in its second and fourth page."""

    model = "mappable"
    summary = "regions that a client may map"
    identity = Identity(vendor_id=0x1234, device_id=0x0001, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        self.whole = RamRegion(2 * PAGE, host.allocate_memory(2 * PAGE))
        self.sparse = RamRegion(4 * PAGE, host.allocate_memory(4 * PAGE))
        self.sparse.mmap_areas = (Area(PAGE, PAGE), Area(3 * PAGE, PAGE))
        super().__init__(host, {0: Bar(self.whole), 2: Bar(self.sparse)})


class _Bells(Region):
    """Counts the writes to each doorbell; reading a place gives the count of its last writes."""

    doorbells = tuple(Doorbell(8 * i, 4, value=i or None) for i in range(20))

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.rung: dict[int, list[bytes]] = {}

    def read(self, offset: int, count: int) -> bytes:
        return len(self.rung.get(offset, ())).to_bytes(count, "little")

    def write(self, offset: int, data: Buffer) -> None:
        self.rung.setdefault(offset, []).append(bytes(data))


class Bells(PciDevice):
    """20 doorbells in BAR0, of which the first takes any value, the others one value each."""

    model = "bells"
    summary = "doorbells that an eventfd can ring"
    identity = Identity(vendor_id=0x1234, device_id=0x0002, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        self.bells = _Bells()
        super().__init__(host, {0: Bar(self.bells), 1: Bar(RamRegion(PAGE))})

    def reset_state(self) -> None:
        self.bells.rung.clear()


class _Fire(Region):
    """A write at 0 sets the INTx level, one at 4 sends the message of this vector."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.interrupts: Interrupts | None = None

    def read(self, offset: int, count: int) -> bytes:
        return bytes(count)

    def write(self, offset: int, data: Buffer) -> None:
        assert self.interrupts is not None
        if offset:
            self.interrupts.notify(data[0])
        else:
            self.interrupts.set_level(bool(data[0]))


class Vectors(PciDevice):
    """An INTx pin, 4 MSI and 8 MSI-X vectors, fired by writes to BAR0."""

    model = "vectors"
    summary = "interrupts on demand"
    identity = Identity(vendor_id=0x1234, device_id=0x0005, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        fire = _Fire()
        super().__init__(host, {0: Bar(fire)}, msi_vectors=4, msix_vectors=8)
        fire.interrupts = self.interrupts

    def reset_state(self) -> None:
        pass


class OneWay(PciDevice):
    """BAR0 can only be read, BAR1 only be written; BAR2 is larger than any message."""

    model = "oneway"
    summary = "regions that refuse one direction, and a large one"
    identity = Identity(vendor_id=0x1234, device_id=0x0003, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        bars = [RamRegion(PAGE), RamRegion(PAGE), RamRegion(LARGE)]
        bars[0].writable = False
        bars[1].readable = False
        super().__init__(host, {i: Bar(region) for i, region in enumerate(bars)})

    def reset_state(self) -> None:
        pass


class Blind(Scratch):
    """Writes guest memory, and says that it cannot tell where."""

    model = "blind"
    precise_dirty = False


class _Nonsense(Region):
    """What a model must not give; the offset says which."""

    ANSWERS = (None, "text", b"", bytes(PAGE + 2), 7, [1, 2, 3, 4])

    def read(self, offset: int, count: int) -> bytes:
        return self.ANSWERS[offset // 8]  # type: ignore[return-value]  # that is the point

    def write(self, offset: int, data: Buffer) -> None:
        raise SystemError("writes fail too")


class Nonsense(PciDevice):
    """Breaks the contract: wrong types from BAR0, coroutines that fail where they must not."""

    model = "nonsense"
    summary = "breaks the device contract"
    identity = Identity(vendor_id=0x1234, device_id=0x0004, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        super().__init__(host, {0: Bar(_Nonsense(2 * PAGE)), 1: Bar(_Starter(self))})

    def reset_state(self) -> None:
        pass

    async def _fails_at_its_end(self) -> None:
        try:
            while True:
                await pause()
        finally:
            raise ValueError("a task fails while it is being cut")

    async def _clings_to_life(self) -> None:
        for _ in range(2):
            with contextlib.suppress(GeneratorExit):
                while True:
                    await pause()

    def not_a_coroutine(self) -> None:
        """Started like a task."""

    def raises(self) -> None:
        raise ValueError("it cannot even be started")

    async def _awaits_anything(self) -> None:
        await _Strange()

    def start(self, number: int) -> None:
        works = (
            self._fails_at_its_end,
            self.not_a_coroutine,
            self.raises,
            self._awaits_anything,
            self._clings_to_life,
        )
        self.host.start(number, works[number])  # type: ignore[arg-type]  # that is the point


class _Strange:
    def __await__(self):  # type: ignore[no-untyped-def]
        yield "something that no runner knows"


class _Starter(Region):
    """A write starts the task of this number; it can be read to see that the device lives."""

    def __init__(self, device: Nonsense) -> None:
        super().__init__(PAGE)
        self._device = device

    def read(self, offset: int, count: int) -> bytes:
        return bytes(count)

    def write(self, offset: int, data: Buffer) -> None:
        self._device.start(data[0])


class Armed(Faulty):
    """Fails where `fail` says only while WORD is not 0: not while it is made."""

    model = "armed"

    def _fail_at(self, place: str) -> None:
        registers = getattr(self, "registers", None)
        if registers is not None and registers.cell("WORD").value:
            super()._fail_at(place)


class EndsSIGTERM(OneWay):
    """Is interrupted while it is being made."""

    model = "ends"
    number = signal.SIGTERM

    def __init__(self, host: Host) -> None:
        os.kill(os.getpid(), self.number)
        super().__init__(host)


class EndsSIGINT(EndsSIGTERM):
    number = signal.SIGINT
