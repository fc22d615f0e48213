# SPDX-License-Identifier: BSD-3-Clause
"""A table as the commands print them."""

from collections.abc import Iterable

from rich import box
from rich.table import Table


def make_table(title: str, heads: Iterable[str], left: int = 1) -> Table:
    """The first `left` columns are text."""
    table = Table(box=box.ROUNDED, title=title, title_style="bold", title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < left else "right", no_wrap=True)
    return table
