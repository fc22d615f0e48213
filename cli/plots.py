# SPDX-License-Identifier: BSD-3-Clause
"""What the commands' pictures have in common.

matplotlib draws them. It is optional (`pip install 'vfio-user[plot]'`) and imported only here.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg")
COLOURS = ("#4477aa", "#66ccee", "#cc3311", "#ee7733", "#ccbb44", "#228833")  # told apart by everybody


class PlotError(Exception):
    """There will be no picture; the text says why, and what to do."""


def check_plot(path: Path) -> None:
    """Raise PlotError if `draw` could not write there."""
    if path.suffix.lower() not in KINDS:
        raise PlotError(f"--plot {path}: give a file that ends in {' or '.join(KINDS)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise PlotError(f"--plot {path}: give a file in a folder that is there")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PlotError(f"--plot {path}: no permission to write there")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotError(f"--plot needs matplotlib ({error}): pip install 'vfio-user[plot]'") from None


def label_above(axes: "Axes", title: str, columns: int = 2) -> None:
    """The title at the left, the legend at the right of it: over no curve."""
    axes.set_title(title, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, fontsize=8, frameon=False)


@contextlib.contextmanager
def open_figure(path: Path, title: str) -> Iterator["Figure"]:
    """A page to draw on; it is written to `path` when the block ends. OSError when it cannot be."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "vfio-user", "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(10, 8), layout="constrained")
        figure.suptitle(title, fontsize=12)
        yield figure
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
