# SPDX-License-Identifier: BSD-3-Clause
"""OpenSSH of Debian, unpacked: to install it would start a daemon on the machine."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from vfio_user.client.qemu.apt import LOADER, PrivateApt, in_root, libraries_of, unpack, versions
from vfio_user.client.qemu.guest_image import SUITE
from vfio_user.client.qemu.shell import LabError, Shell

PACKAGES = ("openssh-server", "openssh-client")
SSHD, SSH, KEYGEN = PROGRAMS = ("usr/sbin/sshd", "usr/bin/ssh", "usr/bin/ssh-keygen")


def build(shell: Shell, folder: Path) -> Mapping[str, str]:
    """Fills `folder` with the programs and their libraries; returns the versions of their packages."""
    apt = PrivateApt.create(folder.parent / "apt", shell, [SUITE], "deb deb-src")
    shell.say(f"downloading {', '.join(PACKAGES)}")
    archives = apt.download(PACKAGES)
    whole = folder / "whole"
    unpack(shell, archives, whole)
    apt.forget_archives()
    libraries = {path.relative_to(whole) for name in PROGRAMS for path in libraries_of(shell, whole, name)}
    for path in (Path(LOADER), *map(Path, PROGRAMS), *sorted(libraries)):
        target = folder / "root" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / path, target)
    shutil.rmtree(whole)
    shell.run(*in_root(folder / "root", SSH), "-V")
    return versions(archives, PACKAGES)


def check(folder: Path) -> str:
    """What is wrong with the part in `folder`; empty when nothing is."""
    missing = [name for name in (LOADER, *PROGRAMS) if not (folder / "root" / name).is_file()]
    return f"lacks {', '.join(missing)}" if missing else ""


def words(folder: Path, program: str) -> list[str]:
    """The command that runs one of the programs. Raises LabError where it is not."""
    if problem := check(folder):
        raise LabError(f"OpenSSH in {folder}: {problem}")
    return in_root(folder / "root", program)
