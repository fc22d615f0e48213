# SPDX-License-Identifier: BSD-3-Clause
"""Writes initramfs archives: the `newc` format of Linux's buffer-format document, nothing else.

Everything belongs to root in the archive, whoever builds it, and two archives of the same files are the
same bytes. Archives may be joined: the kernel unpacks one after the other.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_MAGIC = "070701"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, folder or symbolic link; `mode` carries the type bits, `data` a link's target."""

    path: str
    mode: int
    data: bytes = b""


def regular(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | permissions, data)


def link(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def from_disk(path: str, source: Path) -> Entry:
    """A regular file with the contents and permissions of `source` (links are followed)."""
    return regular(path, source.read_bytes(), stat.S_IMODE(source.stat().st_mode))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive with these entries, their parent folders made, and the trailer.

    Raises ValueError where two entries have the same path.
    """
    chosen: dict[str, Entry] = {}
    for entry in entries:
        path = entry.path.strip("/")
        if path in chosen:
            raise ValueError(f"two entries for {path}")
        chosen[path] = entry
    folders = {folder for path in chosen for folder in _parents(path)} - chosen.keys()
    chosen |= {folder: Entry(folder, stat.S_IFDIR | 0o755) for folder in folders}
    records = [_record(n, path, chosen[path]) for n, path in enumerate(sorted(chosen), 1)]
    return b"".join([*records, _record(0, "TRAILER!!!", Entry("", 0))])


def _parents(path: str) -> Iterator[str]:
    return (str(folder) for folder in PurePosixPath(path).parents if str(folder) != ".")


def _record(inode: int, path: str, entry: Entry) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name's length, checksum
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    head = _MAGIC.encode() + b"".join(b"%08X" % number for number in numbers) + name
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
