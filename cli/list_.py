# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user list`: what can be served."""

from collections.abc import Mapping

import click
from rich.console import Console
from rich.table import Table

from vfio_user.device_models.catalog import MODELS, load_model
from vfio_user.server.net.factory import BACKENDS, COMMON_OPTIONS, BackendOption


@click.command("list", help="Show the device models, with their options, and the network backends.")
def command() -> None:
    console = Console()
    models = Table("model", "summary", "options (--set NAME=VALUE)", title="Device models")
    for name in MODELS:
        model = load_model(name)
        options = "\n".join(f"{o.name}={o.default}  {o.help}" for o in model.options)
        models.add_row(name, model.summary, options)
    console.print(models)
    backends = Table("--net", "what it is", "options (,NAME=VALUE)", title="Network backends")
    for backend in BACKENDS.values():
        backends.add_row(backend.syntax, backend.summary, _options(backend.options))
    backends.add_row("any of them", "faults may have the prefix sent. or received.", _options(COMMON_OPTIONS))
    console.print(backends)


def _options(options: Mapping[str, BackendOption]) -> str:
    return "\n".join(f"{name}: {option.expected}" for name, option in options.items() if "." not in name)
