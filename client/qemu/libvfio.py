# SPDX-License-Identifier: BSD-3-Clause
"""libvfio-user with its samples, from the copy that Debian's qemu source package carries.

It is built for this machine with --buildtype=release: the default is -O0 with debug logging, which no
timing may be compared with.
"""

import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

from vfio_user.client.qemu.apt import PrivateApt, only
from vfio_user.client.qemu.guest_image import SUITE
from vfio_user.client.qemu.shell import LabError, Shell

SOURCE = "qemu"
FOLDER = "subprojects/libvfio-user/"
LIBRARY = "build/lib/libvfio-user.so"
SAMPLES = ("server", "client", "gpio-pci-idio-16", "lspci")


def build(shell: Shell, folder: Path) -> Mapping[str, str]:
    """Fills `folder` with source and release build; returns the version of the source package."""
    apt = PrivateApt.create(folder.parent / "apt", shell, [SUITE], "deb deb-src")
    shell.say(f"downloading the source of {SOURCE}")
    archive = apt.source(SOURCE, folder)
    _extract(archive, folder / "source")
    shell.say("compiling libvfio-user")
    source, output = folder / "source", folder / "build"
    shell.run("meson", "setup", "--buildtype=release", output, source)
    shell.run("ninja", "-C", output)
    version = only(folder, f"{SOURCE}_*.dsc").name.removeprefix(f"{SOURCE}_").removesuffix(".dsc")
    for path in folder.glob(f"{SOURCE}_*"):
        path.unlink()
    return {f"{SOURCE} source": version}


def _extract(archive: Path, target: Path) -> None:
    # File by file: Debian 12's Python has no extraction filters yet, and tar wants an xz program.
    with tarfile.open(archive) as source:
        for member in source:
            head, _, name = member.name.partition(f"/{FOLDER}")
            data = source.extractfile(member) if name and "/" not in head else None
            if data is not None and ".." not in Path(name).parts:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(data.read())
                (target / name).chmod(0o755 if member.mode & 0o100 else 0o644)
    if not (target / "meson.build").is_file():
        raise LabError(f"{archive.name} carries no libvfio-user that meson can build")


def check(folder: Path) -> str:
    """What is wrong with the part in `folder`; empty when nothing is."""
    files = [LIBRARY, *(f"build/samples/{name}" for name in SAMPLES)]
    missing = [name for name in files if shutil.which(str(folder / name)) is None]
    return f"lacks {', '.join(missing)}" if missing else ""
