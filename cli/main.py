# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user`: one module per subcommand, imported when it is called."""

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

COMMANDS = {
    "list": "the device models, network backends and engines that there are",
    "serve": "serve a device model on a socket",
    "ctl": "stop, save, restore and look at a device that is served",
    "migrate": "move a running guest with its devices between two unmodified QEMUs",
    "demo": "see it work: an e1000 driven and moved under load, and a guest where QEMU is found",
    "lab": "build QEMU, a guest and libvfio-user into the cache folder",
}
"""Subcommand -> what `--help` says; `cli/NAME.py` (list: `list_.py`) has `command`."""


class LazyGroup(click.Group):
    """Imports a subcommand only when it is asked for: `--help` stays quick, and `serve` loads no plots.

    What is wrong on the command line is said in one line, as everything else that is wrong.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return self._run(*args, **extra)
        try:
            sys.exit(self._run(*args, **extra))
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.UsageError as error:
            program = "vfio-user" if error.ctx is None else error.ctx.command_path
            fail(f"{error.format_message()} ({program} --help)")
        except click.ClickException as error:
            fail(error.format_message())
        except click.Abort:
            sys.exit(1)

    def _run(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:
        return super().main(args, prog_name, standalone_mode=False, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"vfio_user.cli.{cmd_name if cmd_name != 'list' else 'list_'}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vfio-user", prog_name="vfio-user")
def main() -> None:
    """Emulated PCI devices behind a real VMM, over vfio-user."""


def fail(message: str) -> NoReturn:
    """End with one line that says what is wrong and what to do, and exit status 2."""
    click.echo(f"vfio-user: {' '.join(message.split())}", err=True)
    sys.exit(2)
