# SPDX-License-Identifier: BSD-3-Clause
"""For tests of device models, in this project and in others: the pytest plugin and what it stands on."""
