# SPDX-License-Identifier: BSD-3-Clause
"""Moving a guest with its devices: drivers for v1 and v2, a whole migration, and state kept in a file."""
