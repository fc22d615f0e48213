# SPDX-License-Identifier: BSD-3-Clause
"""The documentation says nothing that is not there: links, files, symbols, commands, generated parts."""

import ast
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from functools import cache

import click
import pytest

from vfio_user.cli import docs
from vfio_user.cli.main import COMMANDS as SUBCOMMANDS
from vfio_user.cli.main import main
from vfio_user.device_models.e1000.packet_buffer import CAPACITY
from vfio_user.protocol.bitmaps import MIN_PAGE_SIZE
from vfio_user.protocol.capabilities import MAX_TEXT
from vfio_user.protocol.commands import COMMANDS
from vfio_user.protocol.constants import MESSAGE_OVERHEAD
from vfio_user.server.dirty_tracking import MAX_MEMORY
from vfio_user.server.dma_table import MAX_MAPPED
from vfio_user.server.engines.native import Settings
from vfio_user.server.message_dma import WINDOW
from vfio_user.transport.channel import QUEUE_LIMIT
from vfio_user.transport.listener import BACKLOG

ROOT = docs.ROOT
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("qemu-configs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_SYMBOL = re.compile(r"`([A-Za-z_][\w.]*)`(?:,|\s)+(?:in|of|from)\s+`([\w./]+\.py)`")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def anchors(name: str) -> set[str]:
    """The headings of a page, as a forge makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", read(name)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in _LINK.findall(read(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), target


@pytest.mark.parametrize("name", NAMES)
def test_files_and_folders_that_are_named_exist(name: str) -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for text in _CODE.findall(_FENCED.sub("", read(name))):
        if re.fullmatch(r"[\w.-]+(/[\w.*-]*)+", text) and text.split("/")[0] in tops:
            assert list(ROOT.glob(text.rstrip("/"))), text


@cache
def symbols(path: str) -> set[str]:
    """What a module defines or imports at the top level, and the members of its classes as Class.member."""
    found: set[str] = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for name in _bound(node.body)}
        found |= _bound([node])
    return found


def _bound(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def mentioned_symbols(name: str) -> list[tuple[str, str]]:
    """Symbol and file, wherever a page says that the one is in the other."""
    return _SYMBOL.findall(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_symbols_are_where_the_page_says(name: str) -> None:
    for symbol, path in mentioned_symbols(name):
        assert symbol in symbols(path), f"{symbol} is not in {path}"


def test_a_missing_symbol_would_be_found() -> None:
    assert len(mentioned_symbols("CONTRIBUTING.md")) > 20
    assert "Scratch" in symbols("device_models/scratch.py")
    assert "Host.call_at" in symbols("device_models/device.py")
    assert "Scratcher" not in symbols("device_models/scratch.py")


def test_every_how_to_has_numbered_steps() -> None:
    sections = dict(re.findall(r"^## (How to .+?)\n(.*?)(?=^## |\Z)", read("CONTRIBUTING.md"), re.M | re.S))
    assert sections.keys() == {
        f"How to add {what}"
        for what in ("a command", "a device", "a register", "a network backend", "an engine")
    }
    for title, text in sections.items():
        numbers = [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)), title
        assert len(numbers) >= 3, title


def shell_lines(name: str) -> list[str]:
    """Commands in a page's blocks and in its code spans, continuation lines joined."""
    text = read(name)
    blocks = [block.split("\n", 1)[1] for block in _FENCED.findall(text)] + _INDENTED.findall(text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines] + _CODE.findall(text)


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_of_vfio_user_exist(name: str) -> None:
    context = click.Context(main)
    for line in shell_lines(name):
        if not re.match(r"vfio-user [a-z]", line) or ":" in line.split()[1]:
            continue
        words = shlex.split(line, comments=True)
        command = main.get_command(context, words[1]) if words[1] in SUBCOMMANDS else None
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        assert not {word.partition("=")[0] for word in words if word.startswith("--")} - known, line


@pytest.mark.parametrize("name", NAMES)
def test_targets_of_make_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    mentioned = {found[1] for line in shell_lines(name) if (found := re.match(r"make ([a-z]+)", line))}
    assert mentioned <= targets


@pytest.mark.parametrize("name", NAMES)
def test_devices_for_qemu_are_json(name: str) -> None:
    for line in shell_lines(name):
        if line.startswith("qemu-system"):
            words = shlex.split(line)
            shapes = [json.loads(word) for word in words if word.startswith("{")]
            assert [(s["driver"], s["socket"]["type"]) for s in shapes] == [("vfio-user-pci", "unix")]
            assert any("share=on" in word for word in words)


def test_generated_parts_are_what_the_code_says() -> None:
    assert docs.stale_parts() == [], "run: .venv/bin/python -m vfio_user.cli.docs"


def test_a_stale_part_would_be_found() -> None:
    text = read("docs/compliance.md")
    assert docs.renewed("commands", text.replace("| 13 | DEVICE_RESET", "| 13 | RESET")) == text
    with pytest.raises(ValueError, match="exactly once"):
        docs.renewed("commands", "a page without the part")


def test_every_command_has_a_section_in_the_order_of_the_numbers() -> None:
    sections = re.findall(r"^## (\d+) (\w+)$", read("docs/compliance.md"), re.MULTILINE)
    assert sections == [(str(int(command)), command.name) for command in COMMANDS]


def test_the_limits_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| ([a-zA-Z].+?) \| (.+?) \|$", read("SECURITY.md"), re.MULTILINE))
    settings = Settings()
    expected = {
        "one message": f"({settings.max_data_xfer_size >> 20} MiB) and {MESSAGE_OVERHEAD:,} bytes",
        "JSON of VERSION": f"{MAX_TEXT >> 10} KiB",
        "DMA regions": f"{settings.max_dma_maps:,}",
        "client memory that is mapped": f"{MAX_MAPPED >> 40} TiB, a quarter of",
        "descriptors in one message": f"{settings.max_msg_fds}",
        "dirty log": f"{MAX_MEMORY >> 20} MiB of bitmaps: {MAX_MEMORY * 8 * MIN_PAGE_SIZE >> 40} TiB",
        "unsent replies": f"beyond {QUEUE_LIMIT >> 20} MiB",
        "DMA messages of one access under way": f"{WINDOW}",
        "frames that wait for a device": f"{CAPACITY >> 10} KiB in the e1000",
        "clients waiting for the present one to leave": f"{BACKLOG}",
    }
    assert rows.keys() - {"what"} == expected.keys()
    assert not {what for what, limit in expected.items() if limit not in rows[what]}


def test_the_index_lists_every_page() -> None:
    listed = set(_LINK.findall(read("docs/README.md")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def test_the_changelog_has_the_version_of_the_package() -> None:
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    assert version is not None
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version[1]]


@pytest.mark.parametrize("name", [docs.PICTURE, docs.PLOT])
def test_a_picture_is_one_and_fetches_nothing(name: str) -> None:
    picture = read(name)
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "url(http" not in picture
    assert "font-face" not in picture
    assert "<image" not in picture


def test_the_picture_begins_with_the_migrations_and_has_a_guest() -> None:
    wanted = "\x1b[1m4. Live migration\n5.00 the guest has booted\nend\n"
    assert docs.last_part(f"1. a\nb\n{wanted}") == wanted
    for output in ("1. a\n", "4. Live migration\n"):
        with pytest.raises(ValueError, match="make lab"):
            docs.last_part(output)


def test_output_with_colours_becomes_a_picture() -> None:
    picture = docs.as_svg("\x1b[32mgreen\x1b[0m <&> plain\n", "a title")
    texts = "".join(ElementTree.fromstring(picture).itertext()).replace("\xa0", " ")
    assert "green" in texts
    assert "<&> plain" in texts
    assert "font-face" not in picture
