# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user lab`: build what the end-to-end tests need, outside of the checkout."""

import sys

import click

from vfio_user.client.qemu import lab


@click.command("lab")
def command() -> None:
    """Build or check the lab: QEMU, a guest with real drivers, libvfio-user and its samples.

    It is kept in VFIO_USER_LAB, or in vfio-user/lab in the user's cache folder. Debian's package tools do
    the work; root is only needed where packages of this machine are missing.
    """
    sys.exit(lab.main())
