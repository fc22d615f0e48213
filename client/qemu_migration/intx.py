# SPDX-License-Identifier: BSD-3-Clause
"""INTx low before the switch.

QEMU moves the bus's count of interrupts, but does not know that a device of another process is behind one: a
pin that is high when the guest stops would be counted at the destination for ever. Without KVM every read of
a BAR tells QEMU that the interrupt was served; it lowers the pin, and sends UNMASK.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vfio_user.client.qemu_migration.monitor import read_memory_line, read_port_line
from vfio_user.client.qemu_migration.move import MovingDevice
from vfio_user.client.qemu_migration.qmp import Qmp
from vfio_user.client.qemu_migration.report import MoveError, Where

MOST_READS = 64
"""One does; a second when QEMU had not yet taken the interrupt; three when another device shares the line."""
_COMMAND = 4
_IO, _MEMORY = 1, 2


async def lower_intx(device: MovingDevice, qmp: Qmp) -> bool:
    """Whether there was anything to do. The device is stopped; meanwhile its BARs answer zeros, so that these
    reads change nothing. MoveError when it stays high."""
    configuration = device.stopped["configuration"]
    if not configuration["intx"]["unanswered"]:
        return False
    line = reading(configuration)
    await device.source.call("blank", on=True, lease=True)
    for _ in range(MOST_READS):
        await qmp.hmp(line)
        configuration = await device.source.call("configuration")
        if not configuration["intx"]["unanswered"]:
            # At once: when the last pass fails, QEMU starts the CPUs by itself, and their writes must count.
            await device.source.call("blank", on=False)
            return True
    raise MoveError(f"{device.id}: its interrupt stays high after {MOST_READS} reads of a BAR", Where.SOURCE)


def reading(configuration: Mapping[str, Any]) -> str:
    """The monitor's command for a read that reaches the device. MoveError: there is none."""
    command = bytes.fromhex(configuration["space"][: 2 * _COMMAND + 4])[_COMMAND]
    for bar in configuration["bars"]:
        if not bar["address"] or not command & (_IO if bar["io"] else _MEMORY):
            continue
        for offset in _open_offsets(bar, configuration["msix"]):
            address = bar["address"] + offset
            return read_port_line(address, 4) if bar["io"] else read_memory_line(address, 4)
    raise MoveError("the interrupt cannot be lowered: the guest has switched all BARs off", Where.SOURCE)


def _open_offsets(bar: Mapping[str, Any], msix: Mapping[str, Any] | None) -> Iterator[int]:
    """Words of a BAR that QEMU does not answer itself, as it does the MSI-X table."""
    taken = _taken(bar["index"], msix)
    for offset in (0, *(end for _, end in taken)):
        inside = any(begin < offset + 4 and offset < end for begin, end in taken)
        if offset + 4 <= bar["size"] and not inside:
            yield offset


def _taken(index: int, msix: Mapping[str, Any] | None) -> Sequence[tuple[int, int]]:
    if msix is None:
        return ()
    sizes = {"table": 16 * msix["vectors"], "pba": -(-msix["vectors"] // 64) * 8}
    places = ((msix[name], size) for name, size in sizes.items())
    return [(place["offset"], place["offset"] + size) for place, size in places if place["bar"] == index]
