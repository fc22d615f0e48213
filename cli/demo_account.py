# SPDX-License-Identifier: BSD-3-Clause
"""How the demo tells what it does: numbered titles, steps with their time, a bar. 80 columns."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from vfio_user.client.migration.report import Progress as Moved
from vfio_user.client.migration.report import Step

_EVERY = 64  # frames between two looks of the bar


class Account:
    """Prints; a bar only where there is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.monotonic()
        self._titles = 0

    def title(self, text: str) -> None:
        self._titles += 1
        self._console.print()
        self._console.print(Text(f"{self._titles}. {text}", style="bold cyan"))

    def step(self, text: str) -> None:
        """One thing done, with the seconds since the beginning."""
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(f"{time.monotonic() - self._begun:6.2f}", style="dim"), Text(text))
        self._console.print(grid)

    def quote(self, text: str) -> None:
        """What another program said."""
        for line in filter(None, text.splitlines()):
            self._console.print(Text(f"       | {line}", style="green"), overflow="fold")

    def print(self, what: RenderableType) -> None:
        self._console.print()
        self._console.print(what)

    def failed(self, text: str) -> None:
        """Why the demo ends early."""
        self._console.print(Text(f"\nThe demo has failed: {text}", style="bold red"))

    def done(self, text: str) -> None:
        seconds = time.monotonic() - self._begun
        self._console.print(Text(f"All well: {text}, in {seconds:.1f} s.", style="bold green"))

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that goes away when the block ends; call it with how much is done."""
        with self._bar(TextColumn(f"       {what}"), BarColumn(40), MofNCompleteColumn()) as bar:
            task = bar.add_task(what, total=total)

            def advance(done: int) -> None:
                if done % _EVERY == 0:
                    bar.update(task, completed=done)

            yield advance

    @contextlib.contextmanager
    def moving(self, what: str) -> Iterator[Callable[[Moved], None]]:
        """The same for a migration: what it does, and the bytes of the round."""
        columns = (TextColumn("       {task.description}"), BarColumn(10), DownloadColumn())
        with self._bar(*columns) as bar:
            task = bar.add_task(f"{what}: connect", total=None)

            def advance(moved: Moved) -> None:
                number = f", round {moved.round + 1}" if moved.step is Step.PRECOPY else ""
                text, total = f"{what}: {moved.step.value}{number}", moved.sent + moved.left or None
                bar.update(task, description=text, completed=moved.sent, total=total)

            yield advance

    def _bar(self, *columns: ProgressColumn) -> Progress:
        terminal = self._console.file.isatty()  # `is_terminal` is true for a file too, with FORCE_COLOR
        return Progress(*columns, console=self._console, transient=True, disable=not terminal)
