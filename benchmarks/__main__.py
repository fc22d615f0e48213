# SPDX-License-Identifier: BSD-3-Clause
"""`python -m vfio_user.benchmarks`: the table of ratios beside the marks."""

from vfio_user.benchmarks.main import command

command(prog_name="python -m vfio_user.benchmarks")
