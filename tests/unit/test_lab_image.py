# SPDX-License-Identifier: BSD-3-Clause
"""The initramfs archive, and what goes into it."""

import lzma
import stat
from pathlib import Path

import pytest

from vfio_user.client.qemu.guest_image import depends_on, module_name, unpacked_kernel, with_dependencies
from vfio_user.client.qemu.newc import Entry, archive, from_disk, link, regular
from vfio_user.client.qemu.shell import LabError


def test_an_archive_is_what_the_format_says() -> None:
    data = archive([regular("a/b", b"12345", 0o640)])
    head = data[:110]
    assert head[:6] == b"070701"
    # the folder comes first: mode 040755, two links, no data, a name of two bytes
    fields = [int(head[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert fields == [1, 0o40755, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 0]
    assert data[110:112] == b"a\0"
    file = data[112:]
    assert int(file[14:22], 16) == stat.S_IFREG | 0o640
    assert file[110:116] == b"a/b\0" + b"\0\0"
    assert file[116:124] == b"12345\0\0\0"
    assert data.endswith(b"TRAILER!!!\0\0\0\0")
    assert len(data) % 4 == 0


def test_order_does_not_matter_and_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"f")
    (tmp_path / "f").chmod(0o750)
    entries = [link("l", "f"), from_disk("f", tmp_path / "f"), Entry("d", 0o41777)]
    assert archive(entries) == archive(reversed(entries))
    with pytest.raises(ValueError, match="two entries for f"):
        archive([*entries, regular("/f", b"")])


def _module(folder: Path, name: str, depends: str) -> Path:
    path = folder / f"{name}.ko"
    path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")
    return path


def test_modules_bring_what_they_depend_on(tmp_path: Path) -> None:
    rows = {
        "vfio-pci": "vfio-pci-core,vfio",
        "vfio_pci_core": "vfio,irqbypass",
        "vfio": "",
        "irqbypass": "",
        "x": "",
    }
    files = {module_name(path): path for path in (_module(tmp_path, *row) for row in rows.items())}
    chosen = with_dependencies(["vfio-pci"], files)
    assert [path.name for path in chosen] == ["irqbypass.ko", "vfio-pci.ko", "vfio.ko", "vfio_pci_core.ko"]
    with pytest.raises(LabError, match="no module e1000"):
        with_dependencies(["e1000"], files)
    with pytest.raises(LabError, match="without a dependency list"):
        depends_on(b"\xfd7zXZ")


def test_the_kernel_inside_a_kernel() -> None:
    image = b"MZ setup code" + lzma.compress(b"\x7fELF kernel") + b"padding"
    assert unpacked_kernel(image) == b"\x7fELF kernel"
    for bad in (b"MZ", image.replace(b"\xfd7zXZ\0", b"\xfd7zXZ\0\xff"), lzma.compress(b"no kernel")):
        with pytest.raises(LabError):
            unpacked_kernel(bad)
