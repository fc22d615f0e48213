# SPDX-License-Identifier: BSD-3-Clause
"""What a VMM that does not move this device has to be told of it: its configuration, read from the bytes.

For any model: BARs and capabilities are found in the configuration space as a guest finds them (PCI Local Bus
3.0, 6.2.5, 6.7, 6.8). What can be written, and what a reset leaves, only the model's own `ConfigSpace` knows.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from vfio_user.device_models.device import Device, IrqIndex, RegionIndex
from vfio_user.device_models.pci import (
    BAR0,
    CAP_MSI,
    CAP_MSIX,
    CAPABILITIES,
    INTERRUPT_PIN,
    STATUS,
    STATUS_CAPABILITIES,
    ConfigSpace,
)
from vfio_user.device_models.regions import Region
from vfio_user.protocol.json_rpc import FAILED, RpcError
from vfio_user.server.host import IrqLines

logger = logging.getLogger(__name__)

HEADER_END, SPACE_END = 0x40, 0x100


def describe(device: Device, irqs: IrqLines) -> Any:
    """For `configuration`: as the guest reads it at this moment. RpcError when the model fails."""
    region = device.regions[RegionIndex.CONFIG]
    space = _read(region)
    capabilities = dict(find_capabilities(space))
    return {
        "space": space.hex(),
        **_masks(region),
        "bars": list(_bars(space, device.regions)),
        "rom_size": device.regions[RegionIndex.ROM].size if RegionIndex.ROM in device.regions else 0,
        "msix": _msix(space, capabilities.get(CAP_MSIX), irqs.fired_vectors(IrqIndex.MSIX)),
        "msi": _msi(space, capabilities.get(CAP_MSI), irqs.fired_vectors(IrqIndex.MSI)),
        "intx": {"pin": space[INTERRUPT_PIN], "level": irqs.level, "unanswered": irqs.unanswered},
    }


def _read(region: Region) -> bytes:
    try:
        data = bytes(region.read(0, region.size))
    except Exception as error:
        logger.exception("the model's configuration space failed")
        reason = f"the model's configuration space failed: {type(error).__name__}: {error}"
        raise RpcError(FAILED, reason) from error
    if len(data) != region.size or region.size < SPACE_END:
        raise RpcError(FAILED, f"the model's configuration space gave {len(data)} of {region.size} bytes")
    return data


def _masks(region: Region) -> dict[str, str | None]:
    if not isinstance(region, ConfigSpace):
        return {"power_on": None, "writable": None, "write_1_to_clear": None}
    return {
        "power_on": region.power_on.hex(),
        "writable": region.writable_bits.hex(),
        "write_1_to_clear": region.write_1_to_clear_bits.hex(),
    }


def find_capabilities(space: bytes) -> Iterator[tuple[int, int]]:
    """Id and offset of each, in the order of the list; a list that bites its tail ends there."""
    if not space[STATUS] & STATUS_CAPABILITIES:
        return
    place, seen = space[CAPABILITIES] & ~3, set[int]()
    while place >= HEADER_END and place not in seen:
        seen.add(place)
        yield space[place], place
        place = space[place + 1] & ~3


def _bars(space: bytes, regions: Mapping[int, Region]) -> Iterator[dict[str, Any]]:
    for index in range(RegionIndex.BAR5 + 1):
        region = regions.get(index)
        if region is None or not region.size:
            continue
        low = _number(space, BAR0 + 4 * index, 4)
        io = bool(low & 1)
        wide = not io and low & 6 == 4 and index < RegionIndex.BAR5
        high = _number(space, BAR0 + 4 * (index + 1), 4) if wide else 0
        yield {
            "index": index,
            "size": region.size,
            "io": io,
            "wide": wide,
            "prefetchable": not io and bool(low & 8),
            "address": high << 32 | low & ~(3 if io else 15),
        }


def _msix(space: bytes, place: int | None, fired: int) -> Any:
    """6.8.2; None without the capability."""
    if place is None or place + 12 > SPACE_END:
        return None
    control = _number(space, place + 2, 2)
    vectors = (control & 0x7FF) + 1
    return {
        "vectors": vectors,
        "enabled": bool(control & 0x8000),
        "masked": bool(control & 0x4000),
        "table": _in_bar(_number(space, place + 4, 4)),
        "pba": _in_bar(_number(space, place + 8, 4)),
        "fired": _mask(fired, vectors),
    }


def _in_bar(value: int) -> dict[str, int]:
    return {"bar": value & 7, "offset": value & ~7}


def _msi(space: bytes, place: int | None, fired: int) -> Any:
    """6.8.1; None without the capability."""
    if place is None or place + 4 > SPACE_END:
        return None
    control = _number(space, place + 2, 2)
    vectors = 1 << (control >> 1 & 7)
    return {"vectors": vectors, "enabled": bool(control & 1), "fired": _mask(fired, vectors)}


def _mask(bits: int, count: int) -> str:
    """A bit for each of `count` vectors, as the method `pend` takes it."""
    return (bits & (1 << count) - 1).to_bytes((count + 7) // 8, "little").hex()


def _number(space: bytes, offset: int, size: int) -> int:
    return int.from_bytes(space[offset : offset + size], "little")
