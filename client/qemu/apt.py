# SPDX-License-Identifier: BSD-3-Clause
"""Debian packages without touching the machine's own package state, and without root.

A private apt has its own lists, an empty status (so that a closure is complete, the C library
included) and the machine's own mirror with other suites. Packages are unpacked into a folder, and their
programs run by the dynamic loader that lies there: no chroot, no mounts.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vfio_user.client.qemu.shell import LabError, Shell
from vfio_user.client.qemu.sources import Source, main_source, os_release, read_sources, stanza

LOADER = "usr/lib64/ld-linux-x86-64.so.2"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
_UNPACK = 'dpkg --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"'
# Folders that older suites still ship beside /usr (before the merge) are joined after unpacking.
_MERGED = ("bin", "sbin", "lib", "lib64")
_OPTIONS = {
    "Dir::Etc::SourceList": "/dev/null",
    "Dir::Etc::Preferences": "/dev/null",
    "Dir::Etc::PreferencesParts": "/dev/null",
    "Acquire::Languages": "none",
    "Acquire::Retries": "3",
    "APT::Install-Recommends": "false",
    "APT::Architecture": "amd64",
    "APT::Sandbox::User": "root",
}


def machine_source() -> Source:
    """The machine's own Debian mirror. Raises LabError on anything but Debian on amd64."""
    release = os_release(_text(Path("/etc/os-release")))
    if (problem := not_debian(release, platform.machine())) or shutil.which("apt-get") is None:
        raise LabError(problem or "apt-get is not on PATH")
    found = main_source(read_sources(), release.get("VERSION_CODENAME", ""))
    if found is None:
        raise LabError("no enabled Debian entry with component main in /etc/apt: see sources.list(5)")
    return found


def not_debian(release: Mapping[str, str], processor: str) -> str:
    """Why the lab cannot be built on a system with this os-release and processor; empty when it can."""
    if release.get("ID") == "debian" and processor == "x86_64":
        return ""
    return (
        "the lab is built from Debian packages, and this is not Debian on amd64 "
        f"({release.get('PRETTY_NAME', 'unknown system')}, {processor}).\n"
        "  Build it in a Debian 12 machine or container: make, git and python3 are enough there.\n"
        "  A QEMU >= 10.1.1 on PATH is used as it is."
    )


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


@dataclass(frozen=True, slots=True)
class PrivateApt:
    """apt with a state folder of its own and one mirror, for the given suites."""

    folder: Path
    shell: Shell

    @classmethod
    def create(cls, parent: Path, shell: Shell, suites: Sequence[str], types: str = "deb") -> "PrivateApt":
        """Writes the configuration and fetches the lists. The folder is kept: a second update is short."""
        text = stanza(machine_source(), suites, types)
        folder = parent / f"{suites[0]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        for name in ("lists/partial", "archives/partial", "sources"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "sources/lab.sources").write_text(text)
        configuration = folder / "apt.conf"
        configuration.write_text("".join(f'{k} "{v}";\n' for k, v in _configuration(folder).items()))
        private = {**shell.environment, "APT_CONFIG": str(configuration)}
        apt = cls(folder, replace(shell, environment=private))
        shell.say(f"apt-get update ({', '.join(suites)})")
        apt.shell.run_retrying("apt-get", "-q", "--error-on=any", "update")
        return apt

    def download(self, packages: Sequence[str], options: Sequence[str] = ()) -> list[Path]:
        """The package files of `packages` and all they depend on."""
        self.forget_archives()
        self.shell.run_retrying("apt-get", "-q", "install", "--yes", "--download-only", *options, *packages)
        return sorted((self.folder / "archives").glob("*.deb"))

    def download_only(self, package: str, into: Path) -> Path:
        """The file of one package, without what it depends on."""
        self.shell.run_retrying("apt-get", "-q", "download", package, cwd=into)
        return only(into, f"{package}_*.deb")

    def source(self, package: str, into: Path) -> Path:
        """The upstream archive of a source package."""
        self.shell.run_retrying("apt-get", "-q", "source", "--download-only", package, cwd=into)
        return only(into, f"{package}_*.orig.tar.[gx]z")

    def depends(self, package: str) -> list[str]:
        """The names that a package depends on directly."""
        lines = self.shell.run("apt-cache", "depends", package).splitlines()
        return [line.split()[-1] for line in lines if line.strip().startswith("Depends:")]

    def forget_archives(self) -> None:
        """Removes the downloaded package files."""
        for path in (self.folder / "archives").glob("*.deb"):
            path.unlink()


def only(folder: Path, pattern: str) -> Path:
    """The one file of this pattern. Raises LabError where there are none or several."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise LabError(f"{len(found)} files {pattern} in {folder}, not one")
    return found[0]


def _configuration(folder: Path) -> dict[str, str]:
    places = {
        "Dir::Etc::SourceParts": folder / "sources",
        "Dir::State": folder,
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
    }
    return _OPTIONS | {name: str(path) for name, path in places.items()}


def unpack(shell: Shell, archives: Sequence[Path], root: Path) -> None:
    """Unpacks packages into `root`, /bin, /sbin and /lib joined with /usr as on a running system."""
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for path in archives:
        # tar, unlike dpkg -x, follows the links above where a package ships /bin or /lib itself.
        shell.run("sh", "-c", _UNPACK, "sh", path, root)


def versions(archives: Sequence[Path], names: Sequence[str]) -> dict[str, str]:
    """Package name to version, read from the file names, for the packages asked for."""
    split = (path.name.split("_") for path in archives)
    return {name: version.replace("%3a", ":") for name, version, *_ in split if name in names}


def in_root(root: Path, program: str) -> list[str]:
    """The command that runs an unpacked program with the unpacked loader and libraries."""
    libraries = f"{root / LIBRARIES}:{root / 'usr/lib'}"
    return [str(root / LOADER), "--inhibit-cache", "--library-path", libraries, str(root / program)]


def libraries_of(shell: Shell, root: Path, program: str) -> list[Path]:
    """The libraries under `root` that a program there needs, as the unpacked loader resolves them.

    The loader itself is not among them. Raises LabError where one would come from elsewhere.
    """
    loader, *rest = in_root(root, program)
    words = shell.run(loader, "--list", *rest).split()
    loaders = {Path(loader), Path("/lib64", Path(loader).name)}
    paths = {Path(word) for word in words if os.path.isabs(word)} - loaders
    if strangers := [str(path) for path in paths if not path.is_relative_to(root)]:
        raise LabError(f"{program} would take {', '.join(strangers)} from this machine")
    return sorted(paths)
