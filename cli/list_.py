# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user list`: what can be served."""

import click
from rich.console import Console
from rich.table import Table

from vfio_user.device_models.catalog import MODELS, load_model

BACKENDS = {
    "echo": "answers ARP, neighbour discovery and pings itself; needs no privileges (the default)",
    "tap:NAME": "a TAP interface of the kernel, made when it is not there; needs CAP_NET_ADMIN",
    "stream:PATH": "a UNIX socket with QEMU's framing, as passt serves it",
    "none": "a cable that leads nowhere",
}


@click.command("list", help="Show the device models, with their options, and the network backends.")
def command() -> None:
    console = Console()
    models = Table(
        "model", "summary", "options (--set NAME=VALUE)", title="Device models", title_justify="left"
    )
    for name in MODELS:
        model = load_model(name)
        options = "\n".join(f"{o.name}={o.default}  {o.help}" for o in model.options)
        models.add_row(name, model.summary, options)
    console.print(models)
    backends = Table("--net", "what it is", title="Network backends", title_justify="left")
    for name, text in BACKENDS.items():
        backends.add_row(name, text)
    console.print(backends)
