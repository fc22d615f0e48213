# SPDX-License-Identifier: BSD-3-Clause
"""Dependencies point one way (docs/design.md), and the package list is that of the disk."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folder -> the subpackages it may import besides itself, and the installed libraries.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "protocol": (set(), {"construct"}),
    "device_models": (set(), set()),
    "transport": ({"protocol"}, {"trio"}),
    "server": ({"protocol", "transport", "device_models"}, {"trio", "dpkt", "pyroute2", "xxhash"}),
    "client": ({"protocol", "transport", "device_models"}, {"trio", "outcome", "qemu", "rich"}),
}
# What the standard library has and a folder must not use: no I/O, no event loop, no C.
FORBIDDEN: dict[str, set[str]] = {
    "protocol": {
        "socket",
        "select",
        "selectors",
        "asyncio",
        "threading",
        "ctypes",
        "mmap",
        "os",
        "subprocess",
    },
    "device_models": {
        "socket",
        "select",
        "selectors",
        "asyncio",
        "threading",
        "ctypes",
        "mmap",
        "subprocess",
    },
}
FREE = {"cli", "benchmarks", "testing"}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports in a module, wherever they stand; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(folder: str, names: Iterator[str]) -> list[str]:
    packages, libraries = ALLOWED[folder]
    stdlib = set(sys.stdlib_module_names) - FORBIDDEN.get(folder, set())
    wrong = []
    for name in names:
        top, _, rest = name.partition(".")
        inside = rest.split(".")[0] in packages | {folder}
        if not (inside if top == "vfio_user" else top in stdlib | libraries):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in modules(folder)
        if (names := wrong_imports(folder, imported(path)))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("protocol", "vfio_user.transport.fds"),
        ("protocol", "socket"),
        ("protocol", "trio"),
        ("device_models", "vfio_user.protocol.constants"),
        ("device_models", "ctypes.c_int"),
        ("transport", "vfio_user.server.session"),
        ("server", "vfio_user.client.Client"),
        ("client", "vfio_user.server.session"),
        ("server", "vfio_user.cli.main"),
    ],
)
def test_a_wrong_import_would_be_found(folder: str, name: str) -> None:
    assert wrong_imports(folder, iter([name])) == [name]


def test_every_folder_has_a_rule() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(ALLOWED) | FREE


def test_the_package_list_is_that_of_the_disk() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = set(ALLOWED) | FREE
    on_disk = {
        ".".join(("vfio_user", *path.parent.relative_to(ROOT).parts))
        for top in tops
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(tool["packages"]) == sorted(on_disk | {"vfio_user"})
    assert {name: folder for name, folder in tool["package-dir"].items() if name != "vfio_user"} == {
        f"vfio_user.{top}": top for top in tops
    }


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in sorted(set(ALLOWED) | FREE):
        for path in modules(folder):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py"


def test_the_typing_links_cover_every_folder() -> None:
    links = {
        path.name: path.resolve() for path in (ROOT / ".typing" / "vfio_user").iterdir() if path.is_symlink()
    }
    assert links == {name: ROOT / name for name in set(ALLOWED) | FREE}
