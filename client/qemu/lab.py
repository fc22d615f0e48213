# SPDX-License-Identifier: BSD-3-Clause
"""The lab: QEMU, a guest, libvfio-user and OpenSSH, built in a cache folder and checked before every use.

`python -m vfio_user.client.qemu.lab` builds what is missing, stale or damaged and prints a table.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vfio_user.client.qemu import apt, guest_image, libvfio, newc, ssh_programs, suite, tools
from vfio_user.client.qemu.parts import Outcome, Part, Stamp, builder_lock, ensure, problem_of
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError, Shell
from vfio_user.client.qemu.suite import Qemu

HOW_TO_GET = "make lab"
_HERE = Path(__file__).parent
Say = Callable[[str], None]


def _recipe(*modules: object, files: Iterable[Path] = ()) -> tuple[Path, ...]:
    return (*(Path(str(getattr(module, "__file__", ""))) for module in modules), *files)


def _build_libvfio(builder: Shell, folder: Path) -> Mapping[str, str]:
    tools.ensure_installed(builder, tools.BUILD)
    return libvfio.build(builder, folder)


QEMU = Part("qemu", "QEMU", _recipe(suite, apt), suite.build, suite.check)
GUEST = Part(
    "guest",
    "guest kernel and initramfs",
    _recipe(guest_image, newc, apt, files=sorted((_HERE / "guest").iterdir())),
    guest_image.build,
    guest_image.check,
)
LIBVFIO = Part("libvfio-user", "libvfio-user", _recipe(libvfio, apt), _build_libvfio, libvfio.check)
SSH = Part("ssh", "OpenSSH", _recipe(ssh_programs, apt), ssh_programs.build, ssh_programs.check)


@dataclass(frozen=True, slots=True)
class Lab:
    """Where the parts of the lab are. Each property raises LabError when its part cannot be used."""

    root: Path

    @property
    def qemu(self) -> Qemu:
        return _examined(self.root, os.environ.get("PATH", ""))

    @property
    def kernel(self) -> Path:
        return self._part(GUEST) / guest_image.KERNEL

    @property
    def initrd(self) -> Path:
        return self._part(GUEST) / guest_image.INITRD

    @property
    def libvfio_library(self) -> Path:
        return self._part(LIBVFIO) / libvfio.LIBRARY

    @property
    def libvfio_source(self) -> Path:
        return self._part(LIBVFIO) / "source"

    def sample(self, name: str) -> Path:
        """libvfio-user's sample program: server, client, gpio-pci-idio-16 or lspci."""
        return self._part(LIBVFIO) / "build" / "samples" / name

    def ssh(self, program: str) -> list[str]:
        """The command that runs one of `ssh_programs.PROGRAMS`."""
        return ssh_programs.words(self._part(SSH), program)

    def _part(self, part: Part) -> Path:
        if problem := problem_of(part, self.root):
            raise LabError(f"{part.title} in {self.root}: {problem}; get it with: {HOW_TO_GET}")
        return self.root / part.name


@dataclass(frozen=True, slots=True)
class QemuSearch:
    """What `find_qemu` found: a QEMU, or None and the reason why there is none."""

    qemu: Qemu | None
    reason: str = ""


def find_qemu(root: Path | None = None) -> QemuSearch:
    """A QEMU that can be started and has vfio-user-pci: the one on PATH, else the lab's."""
    reasons = []
    for search in (suite.on_path, lambda: suite.in_lab((root or lab_root()) / QEMU.name)):
        try:
            return QemuSearch(search())
        except LabError as error:
            reasons.append(str(error))
    return QemuSearch(None, f"{'; '.join(reasons)}; get one with: {HOW_TO_GET}")


@functools.cache
def _examined(root: Path, path: str) -> Qemu:
    """What `find_qemu` finds, looked at once: it starts QEMU twice, which no guest need wait for again."""
    del path
    search = find_qemu(root)
    if search.qemu is None:
        raise LabError(search.reason)
    return search.qemu


def build_lab(root: Path, say: Say) -> list[Outcome]:
    """Builds what is missing under `root`; one outcome per part, failed ones among them."""
    log = root / "build.log"
    with builder_lock(root, say):
        log.write_text("")
        builder = Shell(log, say, {})
        outcomes = [_qemu(root, builder)]
        outcomes += [ensure(part, root, builder) for part in (GUEST, LIBVFIO, SSH)]
        return [*outcomes, _tools(builder)]


def _qemu(root: Path, builder: Shell) -> Outcome:
    try:
        found = suite.on_path()
    except LabError as error:
        builder.say(f"{error}: taking the lab's")
        return ensure(QEMU, root, builder)
    return Outcome(QEMU, "ready", Stamp("", {str(found.program): str(found).split()[0]}, 0, 0.0))


def _tools(builder: Shell) -> Outcome:
    part = Part("tools", "programs on this machine", (), lambda _shell, _folder: {}, lambda _folder: "")
    begun = time.monotonic()
    try:
        before = tools.installed(builder, tools.TOOLS)
        have = tools.ensure_installed(builder, tools.TOOLS)
    except LabError as error:
        return Outcome(part, "failed", None, str(error))
    stamp = Stamp("", have, 0, round(time.monotonic() - begun, 1))
    return Outcome(part, "ready" if before == have else "built", stamp)


def table_of(outcomes: Iterable[Outcome]) -> Table:
    """The account of a build: part, state, versions, size, seconds."""
    table = Table("part", "state")
    table.add_column("versions", overflow="fold")
    for name in ("MB", "s"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        table.add_row(outcome.part.title, *_cells(outcome))
    return table


def _cells(outcome: Outcome) -> tuple[str, str, str, str]:
    stamp = outcome.stamp
    if stamp is None:
        return outcome.state, outcome.problem.splitlines()[0], "", ""
    versions = "\n".join(f"{name} {version}" for name, version in stamp.versions.items())
    seconds = f"{stamp.seconds:.1f}" if outcome.state == "built" else ""
    return outcome.state, versions, f"{stamp.size / 1e6:.1f}" if stamp.size else "", seconds


def main() -> int:
    """Builds the lab and prints what it is made of; 1 when a part could not be built."""
    console, root, begun = Console(), lab_root(), time.monotonic()

    def say(line: str) -> None:
        console.print(
            f"[lab {time.monotonic() - begun:5.1f}] {line}", markup=False, highlight=False, soft_wrap=True
        )

    say(f"in {root}")
    outcomes = build_lab(root, say)
    console.print(table_of(outcomes))
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        console.print(f"{outcome.part.title}: {outcome.problem}", markup=False, highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
