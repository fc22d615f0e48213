# SPDX-License-Identifier: BSD-3-Clause
"""Where QEMU has a PCI device, in the words of its query-pci."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vfio_user.client.qemu_migration.capabilities import CannotRestore
from vfio_user.client.qemu_migration.monitor import Function

Place = tuple[Function, Mapping[int, int]]
"""A function, and the addresses of its BARs by index (the option ROM is 6)."""


@dataclass(frozen=True, slots=True)
class Places:
    """QEMU's answer to query-pci, and the port 0xcf8."""

    devices: Any
    address_register: int


def find(devices: Any, qdev_id: str) -> Place:
    """A device in the answer of query-pci: bus numbers are the guest's, and may change while it runs."""
    for device in _all_devices(row for bus in devices for row in bus["devices"]):
        if device["qdev_id"] == qdev_id != "":
            function = Function(device["bus"], device["slot"], device["function"])
            return function, {region["bar"]: region["address"] for region in device["regions"]}
    raise CannotRestore(f"QEMU has no PCI device with the id {qdev_id!r}")


def _all_devices(devices: Iterable[Any]) -> Iterator[Any]:
    for device in devices:
        yield device
        yield from _all_devices(device.get("pci_bridge", {}).get("devices", ()))


def compare(before: Place, after: Place) -> None:
    """CannotRestore: they differ."""
    (was_at, had), (is_at, has) = before, after
    if is_at != was_at:
        raise CannotRestore(f"it was at {was_at}, and is at {is_at} at the destination")
    for index in sorted(had.keys() | has.keys()):
        was, now = had.get(index), has.get(index)
        if was != now:
            raise CannotRestore(f"BAR {index} was mapped at {_text(was)}, and is at {_text(now)}")


def _text(address: int | None) -> str:
    return "no address" if address is None or not 0 <= address < 1 << 63 else f"{address:#x}"
