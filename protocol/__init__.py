# SPDX-License-Identifier: BSD-3-Clause
"""What the bytes of vfio-user mean: standard library and construct, no I/O.

Start with connection.py; commands.py is the table of all commands, layouts.py the specification in code.
"""
