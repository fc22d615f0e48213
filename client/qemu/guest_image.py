# SPDX-License-Identifier: BSD-3-Clause
"""The lab's guest: Debian's kernel with the real NIC drivers, and a small initramfs around busybox."""

import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from vfio_user.client.qemu import newc
from vfio_user.client.qemu.apt import LOADER, PrivateApt, in_root, libraries_of, only, unpack, versions
from vfio_user.client.qemu.shell import LabError, Shell

# One suite for everybody, so that all see the same drivers. The cloud kernel lacks the Intel ones.
SUITE = "bookworm"
KERNEL_PACKAGE = "linux-image-amd64"
PACKAGES = ("busybox-static", "kmod", "iperf3", "ethtool", "pciutils", "socat")
PROGRAMS = ("usr/bin/iperf3", "usr/sbin/ethtool", "usr/bin/lspci", "usr/bin/setpci", "usr/bin/socat")
MODULES = (
    "e1000", "e1000e", "igb", "virtio_net", "virtio_pci", "vfio-pci", "vfio_iommu_type1",
    "uio_pci_generic", "8021q",
)  # fmt: skip
KERNEL, INITRD = "vmlinux", "initrd.cpio"
_XZ, _ELF = b"\xfd7zXZ\0", b"\x7fELF"
_GUEST = Path(__file__).parent / "guest"
_BUSYBOX = "usr/bin/busybox"
_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": b"root:x:0:\n",
    "etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n",
    "etc/protocols": b"ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\n",
}


def build(shell: Shell, folder: Path) -> Mapping[str, str]:
    """Fills `folder` with kernel and initramfs; returns the versions of their packages."""
    apt = PrivateApt.create(folder.parent / "apt", shell, [SUITE], "deb deb-src")
    kernel = next((name for name in apt.depends(KERNEL_PACKAGE) if name.startswith("linux-image-")), "")
    if not kernel:
        raise LabError(f"{KERNEL_PACKAGE} names no kernel package")
    shell.say(f"downloading {kernel} and {', '.join(PACKAGES)}")
    archives = [*apt.download(PACKAGES), apt.download_only(kernel, folder)]
    shell.say(f"unpacking {len(archives)} packages")
    root = folder / "root"
    unpack(shell, archives, root)
    apt.forget_archives()
    archives[-1].unlink()
    shell.say("writing the initramfs")
    _write_image(shell, folder, root)
    shell.run("rm", "-rf", root)
    return versions(archives, [kernel, *PACKAGES])


def _write_image(shell: Shell, folder: Path, root: Path) -> None:
    kernel = only(root / "boot", "vmlinuz-*")
    entries = [*_own_files(), *_busybox(shell, root), *_programs(shell, root), *_modules(shell, root)]
    (folder / INITRD).write_bytes(newc.archive(entries))
    (folder / KERNEL).write_bytes(unpacked_kernel(kernel.read_bytes()))


def _own_files() -> Iterator[newc.Entry]:
    for name in ("init", "agent"):
        yield newc.regular(name, (_GUEST / name).read_bytes(), 0o755)
    for name, data in _FILES.items():
        yield newc.regular(name, data)
    # iperf3 makes its temporary files there.
    yield newc.Entry("tmp", 0o041777)
    yield newc.Entry("root", 0o040700)
    yield from (newc.Entry(name, 0o040755) for name in ("proc", "sys", "dev", "run", "mnt"))
    yield newc.link("bin", "usr/bin")
    yield newc.link("sbin", "usr/sbin")
    yield newc.link("lib", "usr/lib")
    yield newc.link("lib64", "usr/lib64")


def _busybox(shell: Shell, root: Path) -> Iterator[newc.Entry]:
    taken = {Path(name).name for name in PROGRAMS} | {"busybox"}
    yield newc.from_disk(_BUSYBOX, root / _BUSYBOX)
    for name in shell.run(root / _BUSYBOX, "--list").split():
        if name not in taken:
            yield newc.link(f"usr/bin/{name}", "busybox")


def _programs(shell: Shell, root: Path) -> Iterator[newc.Entry]:
    libraries = {path for program in PROGRAMS for path in libraries_of(shell, root, program)}
    yield newc.from_disk(LOADER, root / LOADER)
    for program in PROGRAMS:
        yield newc.from_disk(program, root / program)
    for path in libraries:
        yield newc.from_disk(str(path.relative_to(root)), path)
    yield newc.from_disk("usr/share/misc/pci.ids", root / "usr/share/misc/pci.ids")


def _modules(shell: Shell, root: Path) -> Iterator[newc.Entry]:
    tree = only(root / "usr/lib/modules", "*")
    chosen = with_dependencies(MODULES, {module_name(path): path for path in tree.rglob("*.ko*")})
    keep = {path.relative_to(tree) for path in chosen}
    small = root / "small/lib/modules" / tree.name
    for path in (*keep, Path("modules.builtin"), Path("modules.order"), Path("modules.builtin.modinfo")):
        (small / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).rename(small / path)
    loader, *rest = in_root(root, "usr/bin/kmod")
    shell.run(loader, "--argv0", "depmod", *rest, "-b", root / "small", tree.name)
    for path in sorted(small.rglob("*")):
        if path.is_file():
            yield newc.from_disk(f"usr/lib/modules/{tree.name}/{path.relative_to(small)}", path)


def unpacked_kernel(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage: QEMU starts it by its PVH entry.

    Under TCG it boots in half the time, as the guest need not unpack itself; for the same reason the
    initramfs is not compressed. Raises LabError where there is none.
    """
    start = image.find(_XZ)
    try:
        kernel = lzma.LZMADecompressor().decompress(image[start:]) if start >= 0 else b""
    except lzma.LZMAError as error:
        raise LabError(f"the kernel cannot be unpacked: {error}") from error
    if not kernel.startswith(_ELF):
        raise LabError("the kernel image holds no xz-compressed ELF kernel")
    return kernel


def module_name(path: Path) -> str:
    """A module's name as the kernel writes it: without suffixes, dashes as underscores."""
    return path.name.split(".", 1)[0].replace("-", "_")


def with_dependencies(names: Iterable[str], files: Mapping[str, Path]) -> list[Path]:
    """The files of the named modules and of all modules they depend on, by their own `depends=`.

    Raises LabError for a named module that is not there.
    """
    chosen: dict[str, Path] = {}
    waiting = [name.replace("-", "_") for name in names]
    while waiting:
        name = waiting.pop()
        if name in chosen:
            continue
        if name not in files:
            raise LabError(f"the kernel package has no module {name}")
        chosen[name] = files[name]
        waiting += depends_on(files[name].read_bytes())
    return sorted(chosen.values())


def depends_on(module: bytes) -> list[str]:
    """The names in the `depends=` string of an uncompressed module's .modinfo section."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    if match is None:
        raise LabError("a kernel module without a dependency list (compressed?)")
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name]


def check(folder: Path) -> str:
    """What is wrong with the part in `folder`; empty when nothing is."""
    empty = [n for n in (KERNEL, INITRD) if not (folder / n).is_file() or not (folder / n).stat().st_size]
    return f"lacks {', '.join(empty)}" if empty else ""
