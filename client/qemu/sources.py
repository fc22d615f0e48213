# SPDX-License-Identifier: BSD-3-Clause
"""Which Debian mirror this machine uses, read from its own package sources. Pure: text in, values out.

The lab needs other suites than the machine's own (a newer one for QEMU), and source packages. It must
not name a mirror itself, so it takes the address and the key of the machine's main entry and asks the
same mirror for other suites. Both formats of sources.list(5) are read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What says how far the mirror is trusted goes along; architectures, languages and so on do not.
KEPT_OPTIONS = ("signed-by", "trusted", "check-valid-until")
_ONE_LINE = re.compile(r"^(deb(?:-src)?)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)$")
_FALSE = frozenset({"no", "false", "without", "off", "disable", "0"})


@dataclass(frozen=True, slots=True)
class Source:
    """One mirror address with one suite, as an enabled binary entry names them."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


def parse_one_line(text: str) -> Iterator[Source]:
    """The binary entries of a file in the one-line format (`sources.list`, `*.list`)."""
    for line in text.splitlines():
        match = _ONE_LINE.match(line.split("#", 1)[0].strip())
        if match is None or match[1] != "deb":
            continue
        pairs = (item.partition("=")[::2] for item in (match[2] or "").split())
        options = _kept({name.lower(): value for name, value in pairs})
        yield Source(match[3], match[4], tuple(match[5].split()), options)


def parse_deb822(text: str) -> Iterator[Source]:
    """The binary entries of a file in the deb822 format (`*.sources`)."""
    for block in re.split(r"\n\s*\n", text):
        fields = _fields(block)
        if fields.get("enabled", "yes").strip().lower() in _FALSE:
            continue
        if "deb" not in fields.get("types", "").split():
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = tuple(fields.get("components", "").split())
                yield Source(uri, suite, components, _kept(fields))


def _fields(block: str) -> dict[str, str]:
    """Field name in lower case to value; a value keeps its continuation lines (a key may be one)."""
    fields: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace() and name:
            fields[name] += "\n" + line
        elif ":" in line:
            name, value = line.split(":", 1)
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def _kept(options: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, options[name]) for name in KEPT_OPTIONS if name in options)


def read_sources(folder: Path = Path("/etc/apt")) -> list[Source]:
    """All enabled binary entries of this machine; unreadable files count as absent."""
    found: list[Source] = []
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        parse = {".list": parse_one_line, ".sources": parse_deb822}.get(path.suffix)
        if parse is None or not path.is_file():
            continue
        found.extend(parse(path.read_text(errors="replace")))
    return found


def main_source(sources: Iterable[Source], codename: str) -> Source | None:
    """The entry that serves the machine's own release, else None.

    A suite may be called by its codename or by a class name such as `stable`.
    """
    wanted = (codename, "stable", "oldstable", "testing", "unstable", "sid")
    usable = [s for s in sources if "main" in s.components and not s.uri.startswith("cdrom:")]
    ranked = sorted((s for s in usable if s.suite in wanted), key=lambda s: wanted.index(s.suite))
    return ranked[0] if ranked else None


def stanza(source: Source, suites: Iterable[str], types: str = "deb") -> str:
    """A deb822 stanza that asks `source`'s mirror, with its key, for other suites."""
    lines = [f"Types: {types}", f"URIs: {source.uri}", f"Suites: {' '.join(suites)}", "Components: main"]
    lines += [f"{name.title()}: {value}" for name, value in source.options]
    return "\n".join(lines) + "\n"


def os_release(text: str) -> dict[str, str]:
    """The assignments of an os-release(5) file, unquoted."""
    pairs = (line.partition("=")[::2] for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip().strip("\"'") for name, value in pairs}
