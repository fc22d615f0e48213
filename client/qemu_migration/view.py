# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's own view of a vfio-user device, which it does not move: taken at the source, restored at the
destination.

    reasons = check(await control.call("configuration"), await ask_chipset(qmp))  # nothing is stopped yet
    view = await take_view(qmp, await ask_places(qmp), await control.call("configuration"), "nic")  # stopped
    await restore(qmp, control, "nic", view)  # destination: state loaded, QEMU paused

The MSI-X table is inside QEMU. It is read by the monitor, and written by the device itself: QEMU carries out
a server's DMA message wherever it goes, to the table as well.

One thing nobody can read: a vector that was in use, is masked, and is fired after that has its pending bit
inside QEMU, where the guest's own look at the PBA does not find it either. `View.owed` has the vectors that
this may concern, and the destination's device is made to owe them: an interrupt too many is harmless.
"""

import contextlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vfio_user.client.control import ControlClient
from vfio_user.client.qemu_migration import monitor
from vfio_user.client.qemu_migration.capabilities import (
    CAP_MSIX,
    COMMAND,
    COMMAND_BUS_MASTER,
    COMMAND_MEMORY,
    MSIX_ENABLE,
    MSIX_MASK_ALL,
    CannotRestore,
    Chipset,
    Configuration,
    bar_writes,
    blank_table,
    check,
    command_write,
    interrupt_writes,
    parse_configuration,
    power_writes,
    reasons_against,
)
from vfio_user.client.qemu_migration.monitor import Function, MonitorError, Write
from vfio_user.client.qemu_migration.places import Place, Places, compare, find
from vfio_user.client.qemu_migration.qmp import Qmp, QmpError
from vfio_user.device_models.device import IrqIndex
from vfio_user.protocol.json_rpc import RpcError

__all__ = ["CannotRestore", "Chipset", "View", "ask_chipset", "check", "restore"]

MAX_WRITE = 4096
"""Bytes of one `guest-write`."""
_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")


@dataclass(frozen=True, slots=True)
class View:
    """Of one device: where it is, what its configuration space has, where QEMU maps its BARs (by index, the
    option ROM is 6), the MSI-X table (None: there is none, or the guest cannot have anything in it), and the
    port 0xcf8 of the machine (None: not asked for)."""

    function: Function
    configuration: Configuration
    regions: Mapping[int, int]
    table: bytes | None
    address_register: int | None

    @property
    def place(self) -> Place:
        return self.function, self.regions

    @property
    def masked(self) -> tuple[int, ...]:
        """The vectors of enabled MSI-X that have an address and are masked, by themselves or all at once."""
        control = self.configuration.control(CAP_MSIX)
        if self.table is None or not control & MSIX_ENABLE:
            return ()
        entries = enumerate(struct.iter_unpack("<QII", self.table))
        return tuple(n for n, (to, _, mask) in entries if to and (mask & 1 or control & MSIX_MASK_ALL))

    @property
    def owed(self) -> Mapping[IrqIndex, int]:
        """By index a mask of the vectors that are masked and were fired: QEMU may hold their messages."""
        masked = {
            IrqIndex.MSI: self.configuration.masked_msi,
            IrqIndex.MSIX: sum(1 << n for n in self.masked),
        }
        return {index: bits & self.configuration.fired.get(index, 0) for index, bits in masked.items()}


async def ask_chipset(qmp: Qmp) -> Chipset:
    """For `check`. QmpError, QmpLost."""
    machine = await qmp.execute("qom-get", path="/machine", property="type")
    types: list[str] = []
    for folder in _FOLDERS:
        with contextlib.suppress(QmpError):  # a machine without such devices may lack the folder
            types += [row["type"] for row in await qmp.execute("qom-list", path=folder)]
    found = (kind.removeprefix("child<").removesuffix(">") for kind in types if "iommu" in kind)
    return Chipset(str(machine), next(found, ""))


async def ask_places(qmp: Qmp) -> Places:
    """Once the CPUs are stopped, for all devices. CannotRestore, QmpLost."""
    with _complaints():
        devices, register = await qmp.execute_all(
            [("query-pci", {}), _command(monitor.read_port_line(monitor.ADDRESS_PORT, 4))]
        )
        return Places(devices, monitor.parse_port(register))


async def take_view(qmp: Qmp, places: Places, answer: Mapping[str, Any], qdev_id: str) -> View:
    """The view at the source, whose CPUs and device are stopped; QEMU and device are as they were after it.

    `answer` is what the source's server says (`configuration`). CannotRestore with the reasons; QmpLost.
    """
    with _complaints():
        configuration = _restorable(answer)
        function, regions = find(places.devices, qdev_id)
        view = View(function, configuration, regions, None, places.address_register)
        return replace(view, table=await _read_table(qmp, view))


async def glance(qmp: Qmp, control: ControlClient, qdev_id: str) -> View:
    """What can be had of the view while the guest runs, and disturbs nothing: no table, no port 0xcf8.

    CannotRestore, QmpLost, ControlLost.
    """
    with _complaints():
        function, regions = find(await qmp.execute("query-pci"), qdev_id)
        configuration = parse_configuration(await control.call("configuration"))
        return View(function, configuration, regions, None, None)


def same_view(early: View | None, answer: Mapping[str, Any]) -> View | None:
    """The view at the source of a stopped device, from a `glance` and what its server says of it now
    (`configuration`). None: QEMU has to be asked again, for the guest has changed something since, or the
    device has more than can be had without. CannotRestore."""
    if early is None:
        return None
    configuration = _restorable(answer)
    view = replace(early, configuration=configuration)
    alike = places_alike(early, view) and _table_place(configuration) is None and may_be_placed(view)
    return view if alike else None


def _restorable(answer: Mapping[str, Any]) -> Configuration:
    configuration = parse_configuration(answer)
    if reasons := reasons_against(configuration):
        raise CannotRestore(*reasons)
    return configuration


def places_alike(one: View, other: View) -> bool:
    """Whether `place` does the same with both."""
    return one.function == other.function and _plain_writes(one.configuration) == _plain_writes(
        other.configuration
    )


def in_full(view: View) -> View:
    """The same view for a QEMU whose registers are those of power-on no longer: all of them are written."""
    return replace(view, configuration=replace(view.configuration, power_on=None))


async def place(qmp: Qmp, view: View) -> None:
    """Give the destination's QEMU the view while it still waits for the last pages, where `may_be_placed`.

    QEMU takes its devices from the stream at the very end, and this one is not among them. Port 0xcf8 comes
    with them too, so that no device may be on its way meanwhile. CannotRestore, QmpLost.
    """
    with _complaints():
        await _write(qmp, view, _plain_writes(view.configuration))


def may_be_placed(view: View) -> bool:
    """Not behind a bridge, whose bus number comes with the last pages; and not with MSI or MSI-X, which has a
    server set up for interrupts while it still takes in the device's state."""
    plain = _table_to_write(view) is None and not interrupt_writes(view.configuration)
    return view.function.bus == 0 and plain


def _plain_writes(configuration: Configuration) -> list[Write]:
    command = [command_write(configuration.command)] if configuration.changed(COMMAND, 2) else []
    return [*bar_writes(configuration), *command, *power_writes(configuration)]


async def is_placed(qmp: Qmp, qdev_id: str, view: View) -> bool:
    """Whether what `place` did stands, now that QEMU has the guest. QmpError, QmpLost."""
    try:
        compare(view.place, find(await qmp.execute("query-pci"), qdev_id))
    except CannotRestore:
        return False
    return True


async def has_bars(control: ControlClient, view: View) -> bool:
    """Whether the device of a server has its BARs where the view has them. RpcError, ControlLost."""
    space = bytes.fromhex((await control.call("configuration"))["space"])
    return space[_BARS] == view.configuration.space[_BARS]


_BARS = slice(0x10, 0x28)


async def restore(qmp: Qmp, control: ControlClient, qdev_id: str, view: View) -> None:
    """Give the view to the destination's QEMU, which has taken the guest and is paused.

    `control` is the destination's server, whose device has the state and is stopped. The device's registers
    see no access but to the configuration space. CannotRestore: the view is not restored, or only in part;
    QmpLost, ControlLost.
    """
    configuration, command = view.configuration, view.configuration.command
    now = command if configuration.changed(COMMAND, 2) else None
    with _complaints():
        writes, table = bar_writes(configuration), _table_to_write(view)
        if table is not None:
            now = command | COMMAND_MEMORY | COMMAND_BUS_MASTER
            await _write(qmp, view, [*writes, command_write(now)])
            await _write_table(control, table)
            await _compare_table(qmp, table)
            writes, now = [], None if now == command else command
        last = [] if now is None else [command_write(now)]
        writes += [*interrupt_writes(configuration), *last, *power_writes(configuration)]
        devices = await _write(qmp, view, writes, ("query-pci", {}))
        compare(view.place, find(devices, qdev_id))
        await _pend(control, view)


@contextlib.contextmanager
def _complaints() -> Iterator[None]:
    """Whatever QEMU or the server refuses is a reason why the view cannot be restored."""
    try:
        yield
    except (MonitorError, QmpError, RpcError) as error:
        raise CannotRestore(str(error)) from error


def _command(line: str) -> tuple[str, Mapping[str, Any]]:
    return "human-monitor-command", {"command-line": line}


async def _write(qmp: Qmp, view: View, writes: Sequence[Write], *then: tuple[str, Mapping[str, Any]]) -> Any:
    """Writes to the configuration space, and port 0xcf8 put back; the answer to the command `then`.

    All goes to QEMU at once: the guest waits.
    """
    lines = monitor.write_lines(view.function, writes)
    if lines and view.address_register is not None:
        lines.append(monitor.address_line(view.address_register))
    answers = await qmp.execute_all([*map(_command, lines), *then])
    monitor.require_silence(lines, answers[: len(lines)])
    return answers[-1] if then else None


# MSI-X table


def _table_place(configuration: Configuration) -> tuple[int, int] | None:
    """Guest address and size of the table; None where QEMU does not map it, whatever the command register
    says."""
    if configuration.table is None or configuration.sleeps:
        return None
    index, offset, size = configuration.table
    (base,) = (configuration.bar_address(bar) for bar in configuration.bars if bar.index == index)
    if base:
        return base + offset, size
    if configuration.control(CAP_MSIX) & MSIX_ENABLE:
        raise CannotRestore(f"MSI-X is enabled, and its table is in BAR {index}, which has no address")
    return None


async def _read_table(qmp: Qmp, view: View) -> bytes | None:
    if (place := _table_place(view.configuration)) is None:
        return None
    command = view.configuration.command
    assert view.address_register is not None
    lines, back = [monitor.read_memory_line(*place)], list[str]()
    if not command & COMMAND_MEMORY:
        on, off = command_write(command | COMMAND_MEMORY), command_write(command)
        lines = [*monitor.write_lines(view.function, [on]), *lines]
        back = [*monitor.write_lines(view.function, [off]), monitor.address_line(view.address_register)]
    answers = await qmp.hmp_all([*lines, *back])
    table = answers.pop(len(lines) - 1)
    monitor.require_silence([*lines[:-1], *back], answers)
    return monitor.parse_memory(table, place[1])


def _table_to_write(view: View) -> tuple[int, bytes] | None:
    """Address and contents, unless it is as after a reset."""
    place = _table_place(view.configuration)
    if place is None or view.table is None or view.table == blank_table(place[1]):
        return None
    return place[0], view.table


async def _write_table(control: ControlClient, table: tuple[int, bytes]) -> None:
    address, data = table
    for offset in range(0, len(data), MAX_WRITE):
        piece = data[offset : offset + MAX_WRITE]
        await control.call("guest-write", address=address + offset, data=piece.hex())


async def _pend(control: ControlClient, view: View) -> None:
    for index, bits in view.owed.items():
        if bits:
            mask = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
            await control.call("pend", index=index.value, vectors=mask.hex())


async def _compare_table(qmp: Qmp, table: tuple[int, bytes]) -> None:
    address, data = table
    if await monitor.read_memory(qmp, address, len(data)) != data:
        raise CannotRestore(f"the MSI-X table at {address:#x} has not taken what was written to it")
