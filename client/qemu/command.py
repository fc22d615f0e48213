# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's command line for a lab guest. Pure: options in, words out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Chipset = Literal["q35", "i440fx"]
_MACHINES: Mapping[Chipset, str] = {"q35": "q35", "i440fx": "pc"}
# Slots (device numbers on the root bus) in the order in which devices without an address take them. With
# -nodefaults nothing else is on their interrupt lines. On q35 the four have GSI 20 to 23, one each; i440fx
# has two lines for all slots (11, 10, 10, 11 here), so that a third device shares one.
DEFAULT_SLOTS: Mapping[Chipset, Sequence[int]] = {"q35": (4, 5, 6, 7), "i440fx": (4, 6, 5, 7)}
# An end instead of a hang on a panic, and a shorter boot under TCG: no tests of what QEMU provides, and
# none of the guards that the kernel has against bad programs and bad modules.
_KERNEL_WORDS = (
    "console=ttyS0 panic=-1 mitigations=off tsc=reliable no_timer_check cryptomgr.notests"
    " rodata=off init_on_alloc=0 lsm= audit=0"
)


@dataclass(frozen=True, slots=True)
class VfioUserDevice:
    """A device served on the UNIX socket `socket`; `options` are further properties of vfio-user-pci."""

    socket: Path
    id: str = ""
    addr: str = ""
    root_port: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """A guest and its machine.

    `mapped`: guest memory is a shared memfd that servers can map; otherwise all DMA goes by message.
    `memory_mib` is the size of guest memory. `files` maps a path in the guest to contents or to a file here.
    `netns` names a network namespace (`ip netns`) that QEMU is to run in. `quiet` keeps the kernel's
    messages off the console; `kernel_words` go to the kernel's command line (`nodrivers`: load none).
    `incoming` is `defer` or a URI of QEMU's: the machine waits for a guest that is moved to it; with
    `keep_stopped` (QEMU's -S) it is not for QEMU alone to start that guest.
    """

    chipset: Chipset = "q35"
    mapped: bool = True
    memory_mib: int = 256
    cpus: int = 1
    devices: Sequence[VfioUserDevice] = ()
    extra: Sequence[str] = ()
    netns: str = ""
    kernel_words: str = ""
    quiet: bool = True
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    reboot: bool = True
    incoming: str = ""
    keep_stopped: bool = True


@dataclass(frozen=True, slots=True)
class MachinePaths:
    """Files of one run: QEMU and guest, the console's log and the QMP socket."""

    qemu: Path
    kernel: Path
    initrd: Path
    console: Path
    qmp: Path


def qemu_words(options: MachineOptions, paths: MachinePaths, agent_fd: int) -> list[str]:
    """The command that starts QEMU; `agent_fd` is a connected socket that becomes the second serial port."""
    return [
        str(paths.qemu),
        *("-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"),
        *_memory_words(options),
        *("-smp", str(options.cpus)),
        *("-kernel", str(paths.kernel), "-initrd", str(paths.initrd)),
        *("-append", _kernel_line(options)),
        *("-serial", f"file:{paths.console}"),
        *("-chardev", f"socket,id=agent,fd={agent_fd}", "-serial", "chardev:agent"),
        *("-qmp", f"unix:{paths.qmp},server=on,wait=off"),
        *([] if options.reboot else ["-no-reboot"]),
        *_incoming_words(options),
        *device_words(options),
        *options.extra,
    ]


def _incoming_words(options: MachineOptions) -> list[str]:
    if not options.incoming:
        return []
    return ["-incoming", options.incoming, *(["-S"] if options.keep_stopped else [])]


def _kernel_line(options: MachineOptions) -> str:
    words = [_KERNEL_WORDS, "quiet" if options.quiet else "ignore_loglevel", options.kernel_words]
    return " ".join(word for word in words if word)


def _memory_words(options: MachineOptions) -> list[str]:
    machine, size = _MACHINES[options.chipset], f"{options.memory_mib}M"
    if not options.mapped:
        return ["-machine", machine, "-m", size]
    memory = f"memory-backend-memfd,id=memory,size={size},share=on"
    return ["-object", memory, "-machine", f"{machine},memory-backend=memory", "-m", size]


def device_words(options: MachineOptions) -> list[str]:
    """The -device arguments; devices without an address take DEFAULT_SLOTS in turn.

    Raises ValueError for a root port on i440fx and for more devices than there are such slots.
    """
    slots = iter(f"{slot:x}" for slot in DEFAULT_SLOTS[options.chipset])
    words: list[str] = []
    for number, device in enumerate(options.devices):
        place = device.addr or next(slots, "")
        if not place:
            raise ValueError("more devices than default slots: give their addresses")
        words += _device(options.chipset, device, number, place)
    return words


def _device(chipset: Chipset, device: VfioUserDevice, number: int, place: str) -> list[str]:
    name = device.id or f"vfu{number}"
    where: dict[str, object] = {"bus": "pcie.0" if chipset == "q35" else "pci.0", "addr": place}
    words: list[str] = []
    if device.root_port:
        if chipset != "q35":
            raise ValueError("i440fx has no root ports")
        port = {"driver": "pcie-root-port", "id": f"port-{name}", "chassis": number + 1, "slot": number}
        words, where = ["-device", json.dumps(port | where)], {"bus": f"port-{name}", "addr": "0"}
    socket = {"path": str(device.socket), "type": "unix"}
    shape = {"driver": "vfio-user-pci", "socket": socket, "id": name, **where, **device.options}
    return [*words, "-device", json.dumps(shape)]
