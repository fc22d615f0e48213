# SPDX-License-Identifier: BSD-3-Clause
"""Which protocol a server speaks for its device, and the driver for it."""

from collections.abc import Awaitable, Callable, Sequence

from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.migration.driver import Driver
from vfio_user.client.migration.report import MigrationError, Where
from vfio_user.client.migration.trail import Trail
from vfio_user.client.migration.v1 import V1Driver
from vfio_user.client.migration.v2 import V2Driver

PROTOCOLS = ("v2", "v1")


async def open_driver(
    vmm: FakeVmm, protocol: str | None = None, *, page_size: int = 4096, mapped: bool = False
) -> Driver:
    """A driver for the device of `vmm`: of the given protocol, or of the first of `PROTOCOLS` that its
    server speaks. MigrationError when there is none, ValueError for a protocol that is none.

    `page_size` (bytes) is that of the dirty log; `mapped` is about v1 (`V1Driver`).
    """
    ways: dict[str, Callable[[], Awaitable[Driver | None]]] = {
        "v2": lambda: V2Driver.open(vmm.client, page_size),
        "v1": lambda: V1Driver.open(vmm.client, page_size, mapped=mapped),
    }
    if protocol is not None and protocol not in ways:
        raise ValueError(f"there is no migration protocol {protocol!r}: it is v1 or v2")
    wanted = PROTOCOLS if protocol is None else (protocol,)
    for name in wanted:
        driver = await ways[name]()
        if driver is not None:
            return driver
    raise MigrationError(f"the device cannot be migrated: its server does not speak {' or '.join(wanted)}")


async def open_drivers(
    vmms: Sequence[FakeVmm], where: Where, trail: Trail, protocol: str | None, page_size: int, mapped: bool
) -> list[Driver]:
    """A driver for each device, in this order."""
    drivers = []
    for index, vmm in enumerate(vmms):
        trail.at(where, index)
        drivers.append(await open_driver(vmm, protocol, page_size=page_size, mapped=mapped))
    return drivers
