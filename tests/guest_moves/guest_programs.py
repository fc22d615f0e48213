# SPDX-License-Identifier: BSD-3-Clause
"""Programs in C for the guest, compiled statically by this machine's gcc."""

from collections.abc import Mapping
from pathlib import Path

from needs import compile_c
from vfio_user.client.qemu.command import MachineOptions
from vfio_user.client.qemu.machine import Machine

SCRIBBLE = "usr/bin/scribble"
_RESOURCE = "/sys/bus/pci/devices/$(cat /tmp/scribbler)"


def compiled(name: str, folder: Path) -> Path:
    """`NAME.c` of this folder as a program in `folder`; CalledProcessError when it does not compile."""
    return compile_c(Path(__file__).with_name(f"{name}.c"), folder / name, "-O2", "-static")


def scribble_options(program: Path, files: Mapping[str, bytes | Path] | None = None) -> MachineOptions:
    """A guest that can run scribble.c."""
    return MachineOptions(
        memory_mib=448, kernel_words="hugepages=129", files={**(files or {}), SCRIBBLE: program}
    )


async def begin_scribbling(guest: Machine, rate: int) -> list[int]:
    """The device writes `rate` MB/s, and a process beside it; the addresses of the buffer's huge pages."""
    await guest.check("[ -e /huge ] || { mkdir /huge && mount -t hugetlbfs none /huge; }")
    await guest.check("basename $(dirname $(grep -l 0x5c81 /sys/bus/pci/devices/*/device)) > /tmp/scribbler")
    await guest.check(f"echo 1 > {_RESOURCE}/enable && setpci -s $(cat /tmp/scribbler) COMMAND=6")
    return [int(line, 16) for line in (await guest.check(f"scribble begin {_RESOURCE} {rate}", 300)).split()]


async def check_scribbling(guest: Machine) -> dict[str, int]:
    """Ends both. Pages that were written, and of all pages those without what the records say."""
    _, text = await guest.run(f"scribble check {_RESOURCE}", 300)
    words = text.split()
    assert words[:1] == ["pages"], text
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))
