# SPDX-License-Identifier: BSD-3-Clause
"""How much the tests of moves do: the full counts with VFIO_USER_SOAK."""

import os

SOAK = bool(os.environ.get("VFIO_USER_SOAK"))
MOVES = 20 if SOAK else 3
