# SPDX-License-Identifier: BSD-3-Clause
"""SHA256SUMS: what each golden file was when it was published (`sha256sum --check` reads it too).

A golden file that changes no longer stands for the streams of its time. A new one gets its line from
`cd tests && python -m golden.scenes`; a line that is there is never changed by it. Who has to change a file
that nobody has seen yet takes its line out first.
"""

import hashlib
from pathlib import Path

from golden.scenes import FOLDER

TABLE = FOLDER / "SHA256SUMS"


def golden_files(folder: Path = FOLDER) -> list[Path]:
    """Saved states and streams."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".stream"))


def published(table: Path = TABLE) -> dict[str, str]:
    """Digest by name."""
    rows = (line.split("  ") for line in table.read_text().splitlines())
    return {name: digest for digest, name in rows}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def problems(folder: Path = FOLDER) -> list[str]:
    """What differs from the table, one line each."""
    table = published(folder / TABLE.name)
    found = {path.name: digest(path) for path in golden_files(folder)}
    changed = [name for name in found if found[name] != table.get(name, found[name])]
    return [
        *(f"{name} is not what was published: bring it back, and let the version grow" for name in changed),
        *(f"{name} has no line: cd tests && python -m golden.scenes" for name in found if name not in table),
        *(f"{name} is gone: bring it back" for name in table if name not in found),
    ]


def renew(folder: Path = FOLDER) -> None:
    """Add the lines that are missing."""
    table = folder / TABLE.name
    known = published(table)
    rows = {path.name: known.get(path.name, digest(path)) for path in golden_files(folder)}
    table.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted((known | rows).items())))
