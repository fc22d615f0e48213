# SPDX-License-Identifier: BSD-3-Clause
"""The engines by their names on the command line."""

from collections.abc import Callable, Mapping
from typing import Any

from vfio_user.client.qemu.libvfio import LIBRARY
from vfio_user.client.qemu.paths import lab_root
from vfio_user.server.engines.engine import Engine, Settings
from vfio_user.server.engines.libvfio_user import LibvfioUserServer
from vfio_user.server.engines.libvfio_user_library import find_library
from vfio_user.server.engines.native import NativeServer


def libvfio_user(settings: Settings) -> LibvfioUserServer:
    """The engine with the library that is found. LibraryError."""
    return LibvfioUserServer(find_library(lab=lab_root() / "libvfio-user" / LIBRARY), settings)


ENGINES: Mapping[str, Callable[[Settings], Engine[Any]]] = {
    "native": NativeServer,
    "libvfio-user": libvfio_user,
}
