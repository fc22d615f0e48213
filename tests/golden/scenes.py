# SPDX-License-Identifier: BSD-3-Clause
"""Devices at eventful moments, whose saved states are kept in this folder as files.

A file is never changed once it is published: it stands for all the streams of its time. When a section's
version grows, `cd tests && python -m golden.scenes` writes the next file of the model, and beside it the
stream that carries it (`streams`), and their digests (`digests`), by which a change of a file is noticed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfio_user.device_models.device import Device, IrqIndex
from vfio_user.device_models.e1000.bench import DATA, IDE, IFCS, RS, TSE, Bench, RecordingPort
from vfio_user.device_models.e1000.bits import Cause, Ctrl, Eecd, Rctl
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.fake_migration import SavedDevice, save_device
from vfio_user.device_models.faulty import ENDLESS, Faulty
from vfio_user.device_models.regions import Region
from vfio_user.device_models.scratch import Scratch

FOLDER = Path(__file__).parent
MAC = bytes.fromhex("525400123456")
PARTNER = bytes.fromhex("525400000001")


def e1000() -> SavedDevice:
    """A card with something in every part: frames that wait, a pause, delays, causes, owed reports."""
    bench = Bench(mapped=False)
    _configure(bench)
    _leave_eeprom_in_a_command(bench)
    _exchange(bench)
    bench.host.advance(300_000)
    bench.host.dma.waiting.clear()  # this VMM answers no more
    return save_device(bench.host, bench.device)


def _configure(bench: Bench) -> None:
    bench.start(tx=32, rx=8, rctl=Rctl.BAM | Rctl.MPE)
    bench.write("CTRL", bench.read("CTRL") | Ctrl.RFCE | Ctrl.TFCE)
    for name, value in (("FCAL", 0x00C28001), ("FCAH", 0x0100), ("FCT", 0x8808), ("FCTTV", 0x100)):
        bench.write(name, value)
    for name, value in (("RDTR", 2000), ("RADV", 3000), ("TIDV", 2000), ("TADV", 4000), ("ITR", 8000)):
        bench.write(name, value)
    bench.write("VFTA", 1 << 5, 3)
    bench.write("PBA", 0x20)
    bench.write("IMS", Cause.RXT0 | Cause.TXDW | Cause.LSC | Cause.MDAC)
    bench.device.regions[2].write(0, (0xC0).to_bytes(4, "little"))
    bench.write_phy(29, 7)
    bench.write_phy(30, 0x1234)
    bench.write("ICS", Cause.LSC)


def _leave_eeprom_in_a_command(bench: Bench) -> None:
    bench.write_eeprom(0x20, 0xCAFE)
    bench.eeprom_begin()
    for pins in (Eecd.DI, Eecd.DI | Eecd.SK, Eecd.DI, Eecd.DI | Eecd.SK):
        bench.write("EECD", Eecd.REQ | Eecd.CS | pins)


def _exchange(bench: Bench) -> None:
    """Frames both ways; then a pause, a segmented packet, and reports that the VMM has not answered."""
    bench.deliver(*(_frame(number, 60 + number) for number in range(5)))
    bench.transmit([PARTNER + MAC + b"\x08\x00" + bytes([number]) * 80 for number in range(3)])
    bench.put_data(PARTNER + MAC + b"\x08\x00" + bytes(50), command=IFCS | RS | IDE)
    bench.ring_bell()
    bench.put_context(14, 24, 33, 34, 50, 0, 3 << 24, 54, 1000)
    bench.put_data(PARTNER + MAC + b"\x08\x00" + bytes(200), command=IFCS | RS | DATA)
    bench.write("TDT", bench.tail)
    bench.host.answer(2)  # the descriptors and the data; the report is owed
    bench.put(0x10_0000, 1000 | DATA | TSE)  # a packet that has no end yet
    bench.write("TDT", bench.tail)
    for number in range(5, 9):
        bench.port.offer(_frame(number, 100))
    bench.port.offer(b"\xff" * 6 + PARTNER + b"\x08\x06" + bytes(46))
    bench.port.offer(bytes.fromhex("0180c2000001") + PARTNER + b"\x88\x08\x00\x01\xff\xff" + bytes(42))


def _frame(number: int, length: int) -> bytes:
    return MAC + PARTNER + b"\x08\x00" + bytes([number]) * (length - 14)


def scratch() -> SavedDevice:
    """A copy half done, words, memory in two places, and a message that was masked."""
    host = FakeHost(mapped=False)
    device = Scratch(host, memory=1 << 20)
    host.enabled_irqs, host.masked = {IrqIndex.MSIX}, {(IrqIndex.MSIX, 0)}
    registers, memory = device.regions[0], device.regions[2]
    device.config.write(4, b"\x06\x00")
    device.config.write(0x10, (0xFEBF_0000).to_bytes(4, "little"))
    device.config.write(0x18, (0x38_0000_0000).to_bytes(8, "little"))
    device.regions[4].write(0, (0xFEE0_0000).to_bytes(8, "little") + (0x4021).to_bytes(4, "little"))
    for offset, data in ((0x0, b"words"), (0x7F0, b"\x01\x02\x03")):
        registers.write(offset, data)
    _copy(registers, 4)
    host.answer()
    _copy(registers, 200_000)
    host.answer(2)
    for offset, data in ((0, b"first"), (0xF_FFF0, bytes(range(16)))):
        memory.write(offset, data)
    return save_device(host, device)


def faulty() -> SavedDevice:
    """In the middle of an endless task, with a message that was masked."""
    host = FakeHost()
    device = Faulty(host, memory=4096)
    host.enabled_irqs, host.masked = {IrqIndex.MSI}, {(IrqIndex.MSI, 0)}
    device.regions[0].write(0x00, b"word")
    device.regions[2].write(4090, b"memory")
    device.interrupts.notify(0)
    device.regions[0].write(0x0C, ENDLESS.to_bytes(4, "little"))
    for _ in range(3):
        host.tasks.run_ready()
    return save_device(host, device)


def _copy(registers: Region, length: int) -> None:
    """From 0 to 0x40000."""
    registers.write(0xFE0, bytes(8) + (0x4_0000).to_bytes(8, "little") + length.to_bytes(4, "little"))
    registers.write(0xFF8, bytes(4))


def _fresh_e1000() -> tuple[FakeHost, Device]:
    host = FakeHost()
    return host, E1000(host, RecordingPort())


def _fresh_faulty() -> tuple[FakeHost, Device]:
    host = FakeHost()
    return host, Faulty(host, memory=4096)


def _fresh_scratch() -> tuple[FakeHost, Device]:
    host = FakeHost()
    return host, Scratch(host, memory=1 << 20)


SCENES: dict[str, tuple[Callable[[], SavedDevice], Callable[[], tuple[FakeHost, Device]]]] = {
    "e1000": (e1000, _fresh_e1000),
    "scratch": (scratch, _fresh_scratch),
    "faulty": (faulty, _fresh_faulty),
}
"""By model: what makes the state, and a device that has just been made to take it."""


def files(model: str) -> list[Path]:
    """The files of a model, oldest first."""
    return sorted(FOLDER.glob(f"{model}-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))


def read(path: Path) -> SavedDevice:
    content = json.loads(path.read_text())
    memories = {name: _unpack(parts) for name, parts in content["memories"].items()}
    return SavedDevice(
        content["model"], content["version"], json.dumps(content["sections"], indent=1), memories
    )


def text(saved: SavedDevice) -> str:
    """The content of a file: JSON that a person can read, memories as their pieces that are not zero."""
    content = {
        "model": saved.model,
        "version": saved.version,
        "sections": saved.sections,
        "memories": {name: _pack(data) for name, data in saved.memories.items()},
    }
    return json.dumps(content, indent=1) + "\n"


def _pack(memory: bytes) -> dict[str, Any]:
    lines = {place: memory[place : place + 16] for place in range(0, len(memory), 16)}
    return {"size": len(memory), **{f"{place:#x}": line.hex() for place, line in lines.items() if any(line)}}


def _unpack(parts: dict[str, Any]) -> bytes:
    memory = bytearray(parts.pop("size"))
    for place, line in parts.items():
        data = bytes.fromhex(line)
        memory[int(place, 16) : int(place, 16) + len(data)] = data
    return bytes(memory)


def versions(saved: SavedDevice) -> dict[str, int]:
    """Of all sections."""
    return {name: version for name, (version, _) in saved.sections.items()}


def renew() -> None:
    """Write the newest file of each model, or the next one if a version has grown since."""
    for model, (make, _) in SCENES.items():
        saved, number = make(), len(files(model))
        if not number or versions(read(files(model)[-1])) != versions(saved):
            number += 1
        (FOLDER / f"{model}-{number}.json").write_text(text(saved))


if __name__ == "__main__":
    from golden import digests, streams  # which read what this has written

    renew()
    streams.renew()
    digests.renew()
