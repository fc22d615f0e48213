# SPDX-License-Identifier: BSD-3-Clause
"""Moving a guest with vfio-user devices between two released QEMUs, which cannot move the devices."""
