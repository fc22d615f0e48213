# SPDX-License-Identifier: BSD-3-Clause
"""Which QEMU will do, and the words it is started with."""

import json
from pathlib import Path

import pytest

from vfio_user.client.qemu.command import (
    MachineOptions,
    MachinePaths,
    VfioUserDevice,
    device_words,
    qemu_words,
)
from vfio_user.client.qemu.shell import LabError
from vfio_user.client.qemu.suite import examine, parse_version

PATHS = MachinePaths(Path("/q"), Path("/k"), Path("/i"), Path("/c"), Path("/m"))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright", (11, 1, 3)),
        ("QEMU emulator version 10.1.1", (10, 1, 1)),
        ("QEMU emulator version 10.2.50 (v10.2.0-1-gabc)", (10, 2, 50)),
    ],
)
def test_versions(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_no_version() -> None:
    with pytest.raises(LabError, match="no version in 'hello'"):
        parse_version("hello")


def _program(folder: Path, version: str, devices: str) -> Path:
    program = folder / "qemu"
    program.write_text(f"#!/bin/sh\ncase $1 in --version) echo '{version}';; *) echo '{devices}';; esac\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("version", "devices", "problem"),
    [
        ("QEMU emulator version 7.2.22", 'name "vfio-user-pci"', "older than 10.1.1"),
        ("QEMU emulator version 10.1.0", 'name "vfio-user-pci"', "older than 10.1.1"),
        ("QEMU emulator version 11.0.0", 'name "vfio-pci"', "without vfio-user-pci"),
    ],
)
def test_what_will_not_do(tmp_path: Path, version: str, devices: str, problem: str) -> None:
    with pytest.raises(LabError, match=problem):
        examine(_program(tmp_path, version, devices), "PATH")


def test_what_will_do_and_what_does_not_run(tmp_path: Path) -> None:
    found = examine(
        _program(tmp_path, "QEMU emulator version 10.1.1", 'name "vfio-user-pci", bus PCI'), "PATH"
    )
    assert str(found) == f"10.1.1 (PATH: {tmp_path}/qemu)"
    with pytest.raises(LabError, match="does not run"):
        examine(tmp_path / "none", "PATH")


def test_mapped_and_message_only_memory_differ_in_the_backend() -> None:
    mapped = qemu_words(MachineOptions(memory_mib=128), PATHS, 5)
    assert "memory-backend-memfd,id=memory,size=128M,share=on" in mapped
    assert "q35,memory-backend=memory" in mapped
    messages = qemu_words(MachineOptions(chipset="i440fx", mapped=False, memory_mib=128), PATHS, 5)
    assert "-object" not in messages
    assert messages[messages.index("-machine") + 1] == "pc"
    assert "socket,id=agent,fd=5" in messages


def test_never_kvm_and_no_default_devices() -> None:
    words = qemu_words(MachineOptions(), PATHS, 5)
    assert words[words.index("-accel") + 1] == "tcg"
    assert "-nodefaults" in words


def test_words_for_the_kernel_and_the_rest_go_through() -> None:
    options = MachineOptions(kernel_words="nodrivers mem=128M", extra=["-S"], reboot=False, cpus=2)
    words = qemu_words(options, PATHS, 5)
    assert words[words.index("-append") + 1].endswith(" quiet nodrivers mem=128M")
    assert words[words.index("-smp") + 1] == "2"
    assert words[-2:] == ["-no-reboot", "-S"]


def test_devices_take_default_slots_in_turn() -> None:
    devices = [VfioUserDevice(Path("/a")), VfioUserDevice(Path("/b"), addr="9"), VfioUserDevice(Path("/c"))]
    shapes = [json.loads(w) for w in device_words(MachineOptions("i440fx", devices=devices))[1::2]]
    assert [(s["id"], s["bus"], s["addr"]) for s in shapes] == [
        ("vfu0", "pci.0", "4"),
        ("vfu1", "pci.0", "9"),
        ("vfu2", "pci.0", "6"),
    ]
    assert shapes[0]["socket"] == {"path": "/a", "type": "unix"}
    assert shapes[0]["driver"] == "vfio-user-pci"


def test_behind_a_root_port() -> None:
    device = VfioUserDevice(Path("/a"), id="nic", root_port=True, options={"x-msg-timeout": 9})
    port, nic = (json.loads(w) for w in device_words(MachineOptions(devices=[device]))[1::2])
    assert (port["driver"], port["bus"], port["addr"]) == ("pcie-root-port", "pcie.0", "4")
    assert (nic["bus"], nic["addr"], nic["x-msg-timeout"]) == (port["id"], "0", 9)
    with pytest.raises(ValueError, match="no root ports"):
        device_words(MachineOptions("i440fx", devices=[device]))


def test_too_many_devices_without_addresses() -> None:
    with pytest.raises(ValueError, match="give their addresses"):
        device_words(MachineOptions(devices=[VfioUserDevice(Path("/a"))] * 5))
