# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a guest's move: what was left, what the devices wrote, and the downtime's parts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vfio_user.cli.migrate_tables import KIB, MIB, PARTS
from vfio_user.cli.plots import COLOURS, label_above, open_figure
from vfio_user.client.qemu_migration.report import Progress, Report, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: Report, path: Path) -> None:
    """Write it, as PNG or SVG. OSError when it cannot be written."""
    with open_figure(path, f"A guest moved between two QEMUs: {report.outcome.value}") as figure:
        memory, devices, parts = figure.subplots(3, 1, height_ratios=(3, 3, 2))
        _draw_memory(memory, report)
        _draw_devices(devices, report)
        for axes in (memory, devices):
            axes.set_xlim(0, report.seconds)
            axes.set_xlabel("seconds")
        _draw_parts(parts, report)


def curves(report: Report) -> list[Progress]:
    """What was seen while memory was copied; of a guest that stood still for the switch-over, the tables'
    figures at the end."""
    looks = [one for one in report.samples if one.step is Step.PRECOPY]
    if looks and report.rounds and report.downtime.total:
        looks.append(_end(report, looks[-1]))
    return looks


def _end(report: Report, last: Progress) -> Progress:
    """When QEMU's last pass was over."""
    end = report.rounds[-1]
    return replace(
        last,
        seconds=max(last.seconds, (end.at + end.ms) / 1000),
        sent=report.ram.get("transferred", last.sent),
        left=report.ram.get("remaining", last.left),
        device_pages=report.device_pages,
        state=report.state_bytes,
    )


def _draw_memory(axes: "Axes", report: Report) -> None:
    looks = [one for one in curves(report) if one.total]
    axes.set_ylabel("MiB")
    for name, colour in (("left", COLOURS[0]), ("sent", COLOURS[5])):
        values = [getattr(one, name) / MIB for one in looks]
        axes.plot([one.seconds for one in looks], values, color=colour, label=name, marker=".")
    _from_nothing(axes)
    for one in report.rounds:
        axes.axvline(one.at / 1000, color="#bbbbbb", linewidth=0.8, zorder=0)
    label_above(axes, "Guest memory; a grey line where a pass over it begins")


def _from_nothing(axes: "Axes") -> None:
    """To one at least: where there was nothing, no fractions of it."""
    axes.set_ylim(0, max(1, axes.get_ylim()[1]))


def _draw_devices(axes: "Axes", report: Report) -> None:
    looks = curves(report)
    states = axes.twinx()
    seconds = [one.seconds for one in looks]
    axes.step(seconds, [one.device_pages for one in looks], color=COLOURS[2])
    axes.set_ylabel("pages in the logs", color=COLOURS[2])
    states.plot(seconds, [one.state / KIB for one in looks], color=COLOURS[0], linestyle="--")
    states.set_ylabel("KiB of state", color=COLOURS[0])
    for one in (axes, states):
        _from_nothing(one)
    axes.locator_params(axis="y", integer=True)
    axes.set_title(
        "Devices: pages that only their servers know of, and the states that have come over", loc="left"
    )


def _draw_parts(axes: "Axes", report: Report) -> None:
    axes.set_title("Downtime", loc="left")
    begin = 0.0
    for part, colour in zip(PARTS, COLOURS, strict=False):
        width = getattr(report.downtime, part)
        axes.barh(["downtime"], [width], left=[begin], color=colour, label=part.replace("_", " "))
        begin += width
    axes.annotate(f" {begin:.0f} ms", (begin, 0), va="center", fontsize=8)
    axes.set_xlim(0, max(begin, 1) * 1.12)
    axes.set_xlabel("milliseconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=len(PARTS), fontsize=8)
