# SPDX-License-Identifier: BSD-3-Clause
"""`python -m vfio_user.cli.docs`: writes the parts of the documentation that follow from the code.

A part stands between the comments `<!-- generated: NAME -->` and `<!-- end of NAME -->`. With --check nothing
is written, and the exit status is 1 when a part is not what the code says. --picture draws docs/demo.svg and
docs/migration.svg from a real run of `vfio-user demo`. For a checkout: an installed package has no docs/.
"""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from vfio_user.client.qemu_migration.preflight import CHECKS
from vfio_user.client.qemu_migration.way_back import WAY_BACK
from vfio_user.device_models.catalog import MODELS, load_model
from vfio_user.device_models.e1000.device import REGISTERS
from vfio_user.device_models.e1000.options import OPTIONS
from vfio_user.device_models.registers import Register
from vfio_user.protocol.commands import COMMANDS, Limits, Row
from vfio_user.protocol.constants import SCM_MAX_FD, MigrationState, Role
from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.migration import PATHS, STATES, V1_ARCS, V1_STATES, StateRow
from vfio_user.server.control_method import Method, Param
from vfio_user.server.control_methods import METHODS as CONTROL_METHODS
from vfio_user.server.engines.libvfio_user_abi import EVERY, V2_ONLY, Abi
from vfio_user.server.engines.libvfio_user_limits import LIMITS, V1_ONLY
from vfio_user.server.handlers import HANDLERS

ROOT = Path(__file__).resolve().parents[1]
PICTURE, PLOT = "docs/demo.svg", "docs/migration.svg"
_WIDTH = 100  # columns of the picture
_FROM = "Live migration"  # the picture begins with the line of the demo that has this
_NEEDED = "the guest has booted"
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *map(list, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def commands_table() -> str:
    """Every command, from COMMANDS and HANDLERS."""
    heads = ("number", "command", "sent by", "fds with request / reply", "edition", "this server")
    return table(heads, (_command(row) for row in COMMANDS.values()))


def _command(row: Row) -> tuple[str, ...]:
    fds = f"{_limits(row.request_fds)} / {_limits(row.reply_fds)}"
    return (str(int(row.command)), row.command.name, row.sender.name.lower(), fds, row.edition, answer(row))


def _limits(limits: Limits) -> str:
    least, most = limits
    return "-" if not most else f"{least} to {'any' if most == SCM_MAX_FD else most}"


def answer(row: Row) -> str:
    """What the server does with a command, or how it uses one that goes the other way."""
    if row.sender is Role.SERVER:
        return "sends it for memory without a file descriptor"
    handler = HANDLERS[row.command]
    if not handler.__name__.startswith("no_"):
        return "supported"
    refuse: Any = handler
    try:
        refuse(None, None, [])  # it looks at nothing
    except DeviceError as error:
        return f"not supported: {errno.errorcode[error.errno]}, the connection stays"
    raise AssertionError(f"{handler.__name__} refuses nothing")


def models_table() -> str:
    """The models of the catalogue with their options."""
    models = [load_model(name) for name in MODELS]
    rows = [(f"`{m.model}`", m.summary, ", ".join(f"`{o.name}`" for o in m.options) or "-") for m in models]
    return table(("model", "what it is", "options (`--set`)"), rows)


def e1000_options_table() -> str:
    """The options of the e1000."""
    return table(
        ("option", "default", "meaning"), ((f"`{o.name}`", f"`{o.default}`", o.help) for o in OPTIONS)
    )


def e1000_registers_table() -> str:
    """The registers of the e1000, from its rows."""
    heads = ("offset", "register", "after reset", "written bits", "what it is")
    return table(heads, (_register(row) for row in sorted(REGISTERS, key=lambda row: row.offset)))


def _register(row: Register) -> tuple[str, ...]:
    place, name = f"`{row.offset:05x}`", row.name
    if row.count > 1:
        place, name = f"{place} + {row.stride}n", f"{row.name}[0-{row.count - 1}]"
    return (place, name, _bits(row.reset), _bits(row.writable | row.write_1_to_clear), row.text)


def _bits(value: int) -> str:
    return f"`{value:08x}`" if value else "-"


def migration_states_table() -> str:
    """What each state of `protocol.migration` is, by its number in v2 and its bits in v1."""
    heads = ("v2", "v1", "state", "works", "is read", "what the device does")
    rows = sorted(STATES.items())
    return table(heads, ((str(int(s)), f"`{row.v1:03b}`", s.name, *_yes(row), row.text) for s, row in rows))


def _yes(row: StateRow) -> tuple[str, str]:
    return ("yes" if row.runs else "-", "yes" if row.saves else "-")


def migration_diagram() -> str:
    """The arcs of v2, and the ways into ERROR and out of it."""
    arcs = [(state.name, to.name) for state, row in STATES.items() for to in row.arcs]
    return diagram("RUNNING", [*arcs, ("RESUMING", "ERROR: refused"), ("ERROR", "RUNNING: reset")])


def migration_v1_diagram() -> str:
    """The changes of device_state that v1 allows."""
    names = {value: V1_STATES[value].name for value in V1_ARCS}
    arcs = [(names[value], names[to]) for value, following in V1_ARCS.items() for to in following]
    named = [f'state "{value:03b} {name}" as {name}' for value, name in names.items()]
    return diagram("RUNNING", [*arcs, ("RESUMING", "ERROR: refused"), ("ERROR", "RUNNING: reset")], named)


def diagram(first: str, arcs: Iterable[tuple[str, str]], names: Iterable[str] = ()) -> str:
    """A diagram of states, as forges draw it."""
    lines = [*names, f"[*] --> {first}", *(f"{state} --> {to}" for state, to in arcs)]
    return "\n".join(["```mermaid", "stateDiagram-v2", *(f"    {line}" for line in lines), "```\n"])


def migration_paths_table() -> str:
    """The requests that take more than one arc, and those that no path leads to."""
    rows = [
        (f"{now.name} → {wanted.name}", " → ".join(state.name for state in steps) if steps else "refused")
        for (now, wanted), steps in PATHS.items()
        if MigrationState.ERROR not in (now, wanted) and (steps is None or len(steps) > 1)
    ]
    return table(("request", "the device passes"), rows)


def control_methods_table() -> str:
    """The methods of the control socket, from METHODS."""
    heads = ("method", "parameters", "what it does", "when")
    return table(heads, (_control_method(row) for row in CONTROL_METHODS.values()))


def _control_method(row: Method) -> tuple[str, ...]:
    params = [f"`{p.name}` ({_default(p)}): {p.text}" for p in row.params]
    stream = [f"a descriptor, to be {row.stream}"] if row.stream else []
    return (f"`{row.name}`", "; ".join(stream + params) or "-", row.text, row.when)


def _default(param: Param) -> str:
    return "needed" if param.default is None else str(param.default).lower()


def libvfio_user_limits_table() -> str:
    """What the libvfio-user engine cannot do."""
    heads = ("about", "what a client sees", "reason", "revisions")
    return table(heads, ((row.name, row.effect, row.reason, _revisions(row.abis)) for row in LIMITS))


def _revisions(abis: frozenset[Abi]) -> str:
    return {EVERY: "all", V1_ONLY: "v1", V2_ONLY: "v2"}[abis]


def guest_move_checks() -> str:
    """From the rows of `qemu_migration.preflight`."""
    return "".join(f"- {check.text}\n" for check in CHECKS)


def guest_move_way_back() -> str:
    """From the rows of `qemu_migration.way_back`."""
    rows = ((str(number), row.undoes.value, row.text) for number, row in enumerate(WAY_BACK, 1))
    return table(("", "if it had begun to", "then"), rows)


PARTS: Mapping[str, tuple[str, Callable[[], str]]] = {
    "commands": ("docs/compliance.md", commands_table),
    "models": ("README.md", models_table),
    "e1000 options": ("docs/e1000.md", e1000_options_table),
    "e1000 registers": ("docs/e1000.md", e1000_registers_table),
    "migration states": ("docs/migration.md", migration_states_table),
    "migration diagram": ("docs/migration.md", migration_diagram),
    "migration v1 diagram": ("docs/migration.md", migration_v1_diagram),
    "migration paths": ("docs/migration.md", migration_paths_table),
    "control methods": ("docs/control.md", control_methods_table),
    "guest move checks": ("docs/qemu-migration.md", guest_move_checks),
    "guest move way back": ("docs/qemu-migration.md", guest_move_way_back),
    "libvfio-user limits": ("docs/compliance.md", libvfio_user_limits_table),
}
"""By name: the file, and what makes the part."""


def renewed(name: str, text: str) -> str:
    """`text` with the part `name` made anew. ValueError when it is not there exactly once."""
    begin, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in after:
        raise ValueError(f"part {name!r} is not there exactly once")
    return f"{before}{begin}\n{PARTS[name][1]()}\n{end}{after}"


def stale_parts(root: Path = ROOT) -> list[str]:
    """The names of the parts that are not what the code says."""
    texts = {name: (root / path).read_text() for name, (path, _) in PARTS.items()}
    return [name for name, text in texts.items() if renewed(name, text) != text]


def draw(words: Sequence[str], root: Path = ROOT) -> None:
    """Run a program and keep what it prints as a picture that fetches nothing from anywhere."""
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(_WIDTH), "TERM": "xterm-256color"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    (root / PICTURE).write_text(as_svg(last_part(done.stdout), "make demo"))


def last_part(output: str) -> str:
    """The demo from its migrations on; ValueError without a real guest, for the picture is to show one."""
    before, found, after = output.partition(_FROM)
    if not found or _NEEDED not in after:
        raise ValueError("the demo has booted no guest: run `make lab` first")
    return before[before.rfind("\n") + 1 :] + found + after


def as_svg(output: str, title: str) -> str:
    """What a terminal shows of `output`, which may have colours, as a picture."""
    console = Console(record=True, width=_WIDTH, file=StringIO())
    console.print(Text.from_ansi(output.rstrip()))
    return _FONT_FACE.sub("", console.export_svg(title=title, unique_id="demo")) + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 when a part is stale.")
@click.option("--picture", is_flag=True, help=f"Draw {PICTURE} and {PLOT} from a run of the demo.")
def command(check: bool, picture: bool) -> None:
    """Write the parts of the documentation that follow from the code."""
    stale = stale_parts()
    for name in stale:
        path = ROOT / PARTS[name][0]
        click.echo(f"{PARTS[name][0]}: {name} {'is stale' if check else 'renewed'}")
        if not check:
            path.write_text(renewed(name, path.read_text()))
    if picture and not check:
        draw([str(Path(sys.executable).parent / "vfio-user"), "demo", "--plot", PLOT])
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    command()
