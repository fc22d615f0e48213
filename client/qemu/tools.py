# SPDX-License-Identifier: BSD-3-Clause
"""Debian packages that the lab needs on the machine itself: installed as root, named to anybody else."""

import os
from collections.abc import Iterable

from vfio_user.client.qemu.shell import LabError, Shell

BUILD = ("gcc", "libc6-dev", "pkg-config", "meson", "ninja-build", "libjson-c-dev", "libcmocka-dev")
TOOLS = ("gcc", "libc6-dev", "iproute2", "iperf3", "ethtool", "pciutils", "socat", "passt", "valgrind")
"""The tests compile too: the compiler may be missing where libvfio-user was built and kept."""


def installed(shell: Shell, packages: Iterable[str]) -> dict[str, str]:
    """Name to version of those packages that are installed; provided names count as installed."""
    form = "${Package}\\t${Provides}\\t${db:Status-Status}\\t${Version}\\n"
    rows = (line.split("\t") for line in shell.run("dpkg-query", "-W", "-f", form).splitlines())
    have: dict[str, str] = {}
    for package, provides, status, version in rows:
        if status == "installed":
            names = [package, *(item.split()[0] for item in provides.split(",") if item.strip())]
            have |= {name: version for name in names if name == package or name not in have}
    return {name: have[name] for name in packages if name in have}


def ensure_installed(shell: Shell, packages: Iterable[str]) -> dict[str, str]:
    """The versions of `packages`, missing ones installed. Raises LabError where that needs root."""
    wanted = tuple(packages)
    missing = [name for name in wanted if name not in installed(shell, wanted)]
    if missing:
        _install(shell, missing)
    return installed(shell, wanted)


def _install(shell: Shell, missing: list[str]) -> None:
    install = ("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    if os.geteuid() != 0:
        raise LabError(f"packages are missing; as root: {' '.join(install)}")
    shell.say(f"installing {', '.join(missing)}")
    shell.run_retrying("apt-get", "-q", "update")
    # Another package manager may be at work: wait for it.
    shell.run_retrying(*install[:2], "-q", "-o", "DPkg::Lock::Timeout=120", *install[2:])
