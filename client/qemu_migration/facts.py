# SPDX-License-Identifier: BSD-3-Clause
"""What both sides are at before anything is touched: asked for here, judged in `preflight`."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfio_user.client.qemu_migration.qmp import Qmp, QmpError

DRIVER = "vfio-user-pci"
_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")
_CHILD = re.compile(r"child<(.+)>")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device sits: QEMU's path of its bus, and slot and function there. `id` is empty for a device
    without `id=`."""

    id: str
    bus: str
    address: str


@dataclass(frozen=True, slots=True)
class QemuFacts:
    """Answers of one QEMU, by the commands' own words."""

    status: str
    migration: Mapping[str, Any] = field(default_factory=dict)
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    version: tuple[int, int, int] = (0, 0, 0)
    machine: str = ""
    memory: int = 0
    devices: tuple[Place, ...] = ()
    """All vfio-user devices of the guest."""
    bars: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Where QEMU maps them: the address of each BAR, by the device's id."""

    def place(self, id: str) -> Place | None:
        return next((place for place in self.devices if place.id == id), None)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """`state` and `configuration` of a device's two servers."""

    id: str
    source: Mapping[str, Any]
    destination: Mapping[str, Any]
    source_configuration: Mapping[str, Any]
    destination_configuration: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Facts:
    source: QemuFacts
    destination: QemuFacts
    devices: tuple[DeviceFacts, ...]


def _version(answer: Any) -> tuple[int, int, int]:
    numbers = answer["qemu"]
    return numbers["major"], numbers["minor"], numbers["micro"]


def _bars(devices: Iterable[Any]) -> Iterator[tuple[str, Mapping[int, int]]]:
    for device in devices:
        if id := device["qdev_id"]:
            yield id, {row["bar"]: row["address"] for row in device["regions"]}
        yield from _bars(device.get("pci_bridge", {}).get("devices", ()))


_Read = Callable[[Any], Any]
_QUESTIONS: Mapping[str, tuple[str, Mapping[str, Any], _Read]] = {
    "status": ("query-status", {}, lambda a: a["status"]),
    "migration": ("query-migrate", {}, lambda a: a),
    "capabilities": (
        "query-migrate-capabilities",
        {},
        lambda a: {row["capability"]: row["state"] for row in a},
    ),
    "parameters": ("query-migrate-parameters", {}, lambda a: a),
    "version": ("query-version", {}, _version),
    "machine": ("qom-get", {"path": "/machine", "property": "type"}, str),
    "bars": ("query-pci", {}, lambda a: dict(_bars(row for bus in a for row in bus["devices"]))),
    "memory": ("query-memory-size-summary", {}, lambda a: a["base-memory"] + a.get("plugged-memory", 0)),
}
"""Field of `QemuFacts` -> command, its arguments, and what is taken of the answer."""


async def ask_qemu(qmp: Qmp) -> QemuFacts:
    """QmpError, QmpLost."""
    answers = await qmp.execute_all([(name, args) for name, args, _ in _QUESTIONS.values()])
    values = {name: row[2](answer) for (name, row), answer in zip(_QUESTIONS.items(), answers, strict=True)}
    return QemuFacts(**values, devices=await _find_devices(qmp))


async def _find_devices(qmp: Qmp) -> tuple[Place, ...]:
    places = []
    for folder in _FOLDERS:
        for row in await _list(qmp, folder):
            found = _CHILD.fullmatch(row["type"])
            if found and found[1] == DRIVER:
                id = row["name"] if folder == _FOLDERS[0] else ""
                places.append(await _place(qmp, id, f"{folder}/{row['name']}"))
    return tuple(places)


async def _list(qmp: Qmp, path: str) -> Sequence[Mapping[str, Any]]:
    with contextlib.suppress(QmpError):  # a machine without such devices may lack the folder
        rows: Sequence[Mapping[str, Any]] = await qmp.execute("qom-list", path=path)
        return rows
    return ()


async def _place(qmp: Qmp, id: str, path: str) -> Place:
    bus, number = await qmp.execute_all(
        [("qom-get", {"path": path, "property": name}) for name in ("parent_bus", "addr")]
    )
    return Place(id, str(bus), _slot(number))


def _slot(number: Any) -> str:
    """QEMU gives slot and function as one number; of releases that give text, the text."""
    return f"{number >> 3:02x}.{number & 7}" if isinstance(number, int) else str(number)
