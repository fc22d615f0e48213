# SPDX-License-Identifier: BSD-3-Clause
"""The error of a network backend that cannot be had."""


class BackendError(ValueError):
    """One line that says what is wrong and what to do; nothing was left open or made."""
