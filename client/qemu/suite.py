# SPDX-License-Identifier: BSD-3-Clause
"""The lab's QEMU: Debian's package of a newer suite, unpacked, with a script that starts it.

Why not a debootstrap and chroot: unpacked packages run by their own loader, as any user, and see the
machine's files, sockets and devices at their own paths; nothing has to be mounted or unmounted, and the
process that is started is QEMU itself. It takes seconds, and needs no root.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.client.qemu.apt import LIBRARIES, LOADER, PrivateApt, unpack, versions
from vfio_user.client.qemu.shell import LabError, Shell

# QEMU 10.1.0 has a regression in its vfio-user client.
OLDEST = (10, 1, 1)
PROGRAM = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
# Tried in turn: suites, and apt's options to choose among them.
SUITES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("trixie", "trixie-backports"), ("--target-release", "trixie-backports")),
    (("testing",), ()),
)
_DATA = ("qemu", "seabios")
_FIRMWARE = ("seabios/bios-256k.bin", "qemu/efi-e1000.rom", "qemu/efi-virtio.rom", "qemu/linuxboot_dma.bin")
_VERSION = re.compile(r"version (\d+)\.(\d+)\.(\d+)")
_SCRIPT = """#!/bin/sh
# Runs the unpacked QEMU with its own loader, libraries and firmware. `exec`: the process is QEMU itself.
root=$(dirname "$(readlink -f "$0")")/../root
exec "$root/{loader}" --inhibit-cache --library-path "$root/{libraries}" "$root/usr/bin/{program}" {data} "$@"
"""

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU that can be started, with the vfio-user-pci device in it."""

    program: Path
    version: Version
    origin: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.version))} ({self.origin}: {self.program})"


def parse_version(text: str) -> Version:
    """The version in the first lines of `--version`. Raises LabError when there is none."""
    match = _VERSION.search(text)
    if match is None:
        raise LabError(f"no version in {text[:80]!r}")
    return int(match[1]), int(match[2]), int(match[3])


def examine(program: Path, origin: str) -> Qemu:
    """The QEMU at `program`. Raises LabError when it does not run, is too old or lacks vfio-user-pci."""
    found = Qemu(program, parse_version(_ask(program, "--version")), origin)
    if found.version < OLDEST:
        raise LabError(f"QEMU {found} is older than {'.'.join(map(str, OLDEST))}")
    if 'name "vfio-user-pci"' not in _ask(program, "-device", "help"):
        raise LabError(f"QEMU {found} is built without vfio-user-pci")
    return found


def _ask(program: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{program} does not run: {error}") from error
    if done.returncode:
        raise LabError(f"{program} does not run: {done.stderr.strip()[:200]}")
    return done.stdout


def on_path() -> Qemu:
    """The QEMU on PATH. Raises LabError when there is none that will do."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise LabError(f"no {PROGRAM} on PATH")
    return examine(Path(program), "PATH")


def in_lab(folder: Path) -> Qemu:
    """The QEMU of the lab's part in `folder`. Raises LabError when it is not there or does not do."""
    program = folder / "bin" / PROGRAM
    if not program.is_file():
        raise LabError(f"no QEMU in {folder}")
    return examine(program, "lab")


def build(shell: Shell, folder: Path) -> Mapping[str, str]:
    """Fills `folder` with the first suite's QEMU that will do; returns the versions of its packages."""
    problems = []
    for suites, options in SUITES:
        try:
            return _build_from(shell, folder, suites, options)
        except LabError as error:
            problems.append(f"{suites[-1]}: {error}")
            shell.say(f"QEMU from {suites[-1]} will not do: {error}")
            shutil.rmtree(folder / "root", ignore_errors=True)
    raise LabError("no suite has a QEMU that will do:\n  " + "\n  ".join(problems))


def _build_from(
    shell: Shell, folder: Path, suites: Sequence[str], options: Sequence[str]
) -> Mapping[str, str]:
    apt = PrivateApt.create(folder.parent / "apt", shell, suites)
    shell.say(f"downloading {PACKAGE} from {suites[-1]}")
    archives = apt.download([PACKAGE], options)
    shell.say(f"unpacking {len(archives)} packages")
    unpack(shell, archives, folder / "root")
    apt.forget_archives()
    for name in ("doc", "man", "locale"):
        shutil.rmtree(folder / "root/usr/share" / name, ignore_errors=True)
    _write_script(folder)
    found = in_lab(folder)
    shell.say(f"QEMU {'.'.join(map(str, found.version))} runs")
    return versions(archives, [PACKAGE, "seabios"])


def _write_script(folder: Path) -> None:
    data = " ".join(f'-L "$root/usr/share/{name}"' for name in _DATA)
    script = folder / "bin" / PROGRAM
    script.parent.mkdir(exist_ok=True)
    script.write_text(_SCRIPT.format(loader=LOADER, libraries=LIBRARIES, program=PROGRAM, data=data))
    script.chmod(0o755)


def check(folder: Path) -> str:
    """What is wrong with the part in `folder`; empty when nothing is."""
    missing = [name for name in _FIRMWARE if not (folder / "root/usr/share" / name).is_file()]
    if missing:
        return f"lacks {', '.join(missing)}"
    try:
        in_lab(folder)
    except LabError as error:
        return str(error)
    return ""
