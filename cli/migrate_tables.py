# SPDX-License-Identifier: BSD-3-Clause
"""The tables of `vfio-user migrate`. 80 columns."""

from collections.abc import Iterator
from dataclasses import fields

from rich.table import Table
from rich.text import Text

from vfio_user.cli.tables import make_table
from vfio_user.client.qemu_migration.report import Downtime, Progress, Report

KIB, MIB = 1 << 10, 1 << 20
PARTS = [part.name for part in fields(Downtime)]


def plain(text: str) -> Text:
    """What others have said, as it is: no markup, no emoji, and no control character reaches a terminal."""
    return Text("".join(one if one.isprintable() else ascii(one)[1:-1] for one in text))


def size(count: int) -> str:
    """Of bytes, in a unit in which it is not nothing."""
    unit, name = (MIB, "MiB") if count >= MIB else (KIB, "KiB") if count >= KIB else (1, "B")
    return f"{count / unit:,.1f} {name}" if unit > 1 else f"{count} {name}"


def story(progress: Progress) -> str:
    """One line while memory is copied."""
    how = f"{progress.device_pages:,} pages in the log"
    if progress.write_through:
        how = f"writes through, {how}" if progress.device_pages else "writes through"
    left = f"{progress.left / MIB:.0f} of {progress.total / MIB:.0f} MiB left"
    return f"pass {progress.passes}: {left}, {progress.sent / MIB:.0f} MiB sent; device: {how}"


def tables(report: Report) -> Iterator[Table]:
    yield rounds_table(report)
    yield devices_table(report)
    yield times_table(report)
    yield downtime_table(report)


def rounds_table(report: Report) -> Table:
    """QEMU's passes, and what of their pages was sent again; the states. What devices write by message is in
    no count of pages but QEMU's own."""
    table = make_table("What was moved", ("", "pages", "size", "ms"))
    for one in report.rounds:
        ms = one.ms_running if one.stopped else one.ms
        table.add_row(f"pass {one.number}", f"{one.pages:,}", size(one.bytes), f"{ms:.0f}")
        if one.stopped:
            table.add_row("  and with the guest stopped", "", "", f"{one.ms - one.ms_running:.0f}")
    table.add_section()
    sent = size(report.ram.get("transferred", 0))
    table.add_row("guest memory in all", f"{report.pages:,}", sent, "")
    by = "CPUs, and devices by message" if report.message_writes else "CPUs"
    table.add_row(f"  again, written by {by}", f"{report.seen_pages:,}", "", "")
    table.add_row("  again, handed over by devices", f"{report.device_pages:,}", "", "")
    table.add_row("states of the devices", "", size(report.state_bytes), "")
    return table


def devices_table(report: Report) -> Table:
    """A row for each device."""
    heads = ("device", "pages handed over", "writes by message", "size of these", "state")
    table = make_table("Devices: what they wrote while memory was copied, and their states", heads)
    for device in report.devices:
        counts = (f"{device.pages_handed_over:,}", f"{device.message_writes:,}")
        sizes = (size(device.message_bytes), size(device.state_bytes))
        table.add_row(plain(device.id), *counts, *sizes)
    return table


def times_table(report: Report) -> Table:
    """A row for each device; its times ran side by side."""
    heads = ("device", "stop", "log", "state", "intx", "view")
    table = make_table("Devices: milliseconds while the guest stood still", heads)
    for device in report.devices:
        times = (device.stop_ms, device.log_ms, device.state_ms, device.intx_ms, device.view_ms)
        table.add_row(plain(device.id), *(f"{ms:.1f}" for ms in times))
    return table


def downtime_table(report: Report) -> Table:
    """Milliseconds, and what they went to."""
    table = make_table("Downtime in milliseconds, and its parts", ("all", *PARTS, "by QEMU's count"), left=0)
    downtime = report.downtime
    values = (downtime.total, *(getattr(downtime, part) for part in PARTS), report.qemu_downtime)
    table.add_row(*(f"{value:.1f}" for value in values))
    return table
