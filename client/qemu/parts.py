# SPDX-License-Identifier: BSD-3-Clause
"""Parts of the lab: when one is good as it lies there, and how it is replaced when not.

A part is a folder with a stamp, written last. It is built in a folder beside it and renamed into place,
so that no reader ever sees half a part; a build that was cut leaves a folder that the next one removes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vfio_user.client.qemu.shell import LabError, Shell

STAMP = "stamp.json"


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a finished part is made of: recipe hash, package versions, size in bytes, build time."""

    recipe: str
    versions: Mapping[str, str]
    size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Part:
    """One part: `build` fills an empty folder and returns versions, `check` says what is wrong with it."""

    name: str
    title: str
    recipe: tuple[Path, ...]
    build: Callable[[Shell, Path], Mapping[str, str]]
    check: Callable[[Path], str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A part after `ensure`: `state` is ready, built or failed; `problem` only where it failed."""

    part: Part
    state: str
    stamp: Stamp | None
    problem: str = ""


def recipe_hash(files: Iterable[Path]) -> str:
    """One hash over the names and contents of the files that say how a part is built."""
    digest = hashlib.sha256()
    for path in sorted(files):
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def read_stamp(folder: Path) -> Stamp | None:
    """The stamp of a part's folder; None where there is none or it is not one."""
    try:
        return Stamp(**json.loads((folder / STAMP).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def problem_of(part: Part, root: Path) -> str:
    """Why a part cannot be used as it lies under `root`; empty when it can."""
    stamp = read_stamp(root / part.name)
    if stamp is None:
        return "not built"
    if stamp.recipe != recipe_hash(part.recipe):
        return "built by another recipe"
    return part.check(root / part.name)


def ensure(part: Part, root: Path, shell: Shell) -> Outcome:
    """The part, built if it is missing, stale or damaged."""
    if not (reason := problem_of(part, root)):
        return Outcome(part, "ready", read_stamp(root / part.name))
    shell.say(f"{part.title}: {reason}, building")
    try:
        return Outcome(part, "built", _rebuild(part, root, shell))
    except (LabError, OSError) as error:
        shell.say(f"{part.title}: failed: {error}")
        return Outcome(part, "failed", None, str(error))


def _rebuild(part: Part, root: Path, shell: Shell) -> Stamp:
    begun = time.monotonic()
    fresh, place = root / f".{part.name}.new", root / part.name
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    versions = part.build(shell, fresh)
    if wrong := part.check(fresh):
        raise LabError(f"{part.title} was built, but {wrong}")
    seconds = round(time.monotonic() - begun, 1)
    stamp = Stamp(recipe_hash(part.recipe), dict(versions), size_of(fresh), seconds)
    (fresh / STAMP).write_text(json.dumps(asdict(stamp), indent=1) + "\n")
    _swap(fresh, place)
    return stamp


def _swap(fresh: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


@contextlib.contextmanager
def builder_lock(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Held by the one process that builds in `root`; a second one waits, and says so."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            say(f"waiting for another build (process {lock.read().strip() or 'unknown'})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
