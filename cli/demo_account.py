# SPDX-License-Identifier: BSD-3-Clause
"""How the demo tells what it does: numbered titles, steps with their time, a bar, a table. 80 columns."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from vfio_user.client.drivers.e1000 import DriverCounters
from vfio_user.client.drivers.e1000_traffic import BulkReport, Measure
from vfio_user.client.memory import DmaCounters

_EVERY = 64  # frames between two looks of the bar


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the driver.

    `interrupts` is how often the eventfd was signalled; `link_seconds` is from connecting to a link,
    `seconds` all of it; `server` is what the server counted meanwhile.
    """

    mapped: bool
    registers: Measure
    pings: Measure
    bulk: BulkReport
    segments: BulkReport
    driver: DriverCounters
    interrupts: int
    dma: DmaCounters
    link_seconds: float
    seconds: float
    server: Mapping[str, int] = field(default_factory=dict)

    @property
    def verified(self) -> int:
        """Frames received and compared: the ARP reply too."""
        return 1 + self.pings.count + self.bulk.frames + self.segments.frames

    def problem(self) -> str:
        """What the server counted otherwise than the driver's side; empty when nothing. Segments went no
        further than the PHY's loopback."""
        frames = self.driver.frames_sent - self.segments.frames
        expected = {
            "net_sent_frames": frames,
            "net_received_frames": frames,
            "net_bad_checksums": 0,
            "irqs_intx": self.interrupts,
            "dma_message_reads": self.dma.reads,
            "dma_message_writes": self.dma.writes,
            "dma_errors": 0,
        }
        wrong = [
            f"{name} {self.server[name]}, not {n}" for name, n in expected.items() if self.server[name] != n
        ]
        if self.mapped == bool(self.dma.writes) or self.mapped != bool(self.server["dma_mapped_writes"]):
            wrong.append(f"DMA went the wrong way: {self.dma}")
        return f"the server counted {', '.join(wrong)}" if wrong else ""


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
        columns = (TextColumn(f"       {what}"), BarColumn(40), MofNCompleteColumn())
        bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        with bar:
            task = bar.add_task(what, total=total)

            def advance(done: int) -> None:
                if done % _EVERY == 0:
                    bar.update(task, completed=done)

            yield advance


def result_table(results: Sequence[Result]) -> Table:
    """A column for each run, by what was measured."""
    table = Table(box=box.ROUNDED, title="What ran", title_style="bold", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column("mapped memory" if result.mapped else "messages only", justify="right")
    for name, value in _ROWS.items():
        table.add_row(name, *(value(result) for result in results))
    return table


def _dma(result: Result, way: str) -> str:
    """Accesses to guest memory by the server's count: only it knows those through a mapping."""
    count, size = (
        result.server[f"dma_{way}_read{s}"] + result.server[f"dma_{way}_write{s}"] for s in ("s", "_bytes")
    )
    return f"{count:,} ({size / 1e6:.1f} MB)" if count else "none"


_ROWS: Mapping[str, Callable[[Result], str]] = {
    "connect to link up": lambda r: f"{r.link_seconds:.2f} s",
    "register read, p50": lambda r: f"{r.registers.median * 1e6:.0f} us",
    "ping, p50": lambda r: f"{r.pings.median * 1e6:.0f} us",
    "frames sent": lambda r: f"{r.driver.frames_sent:,}",
    "frames received, compared": lambda r: f"{r.verified:,}",
    "bytes sent": lambda r: f"{r.driver.bytes_sent:,}",
    "bytes received": lambda r: f"{r.driver.bytes_received:,}",
    "UDP echo, each way": lambda r: f"{r.bulk.bits_per_second / 1e6:.0f} Mbit/s",
    "interrupts": lambda r: f"{r.interrupts:,}",
    "DMA through the mapping": lambda r: _dma(r, "mapped"),
    "DMA by message": lambda r: _dma(r, "message"),
    "time": lambda r: f"{r.seconds:.2f} s",
}
