# SPDX-License-Identifier: BSD-3-Clause
"""Where the lab lives: a cache folder outside every checkout."""

import os
from collections.abc import Mapping
from pathlib import Path


def lab_root(environment: Mapping[str, str] = os.environ) -> Path:
    """The lab's folder: `VFIO_USER_LAB`, else `vfio-user/lab` in the user's cache folder."""
    if chosen := environment.get("VFIO_USER_LAB"):
        return Path(chosen).expanduser().absolute()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "vfio-user" / "lab"
