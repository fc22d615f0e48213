# SPDX-License-Identifier: BSD-3-Clause
"""A network card tells the network where it is now: switches still send its frames elsewhere."""

from typing import Any

from vfio_user.device_models.net import NetDevice
from vfio_user.protocol.json_rpc import REFUSED, RpcError
from vfio_user.server.control_jobs import MILLISECOND
from vfio_user.server.engines.engine import Engine

ANNOUNCEMENTS = (0, 50, 200, 450, 800)
"""Milliseconds after the request: five frames with growing gaps, as QEMU announces its own cards."""


def announce(engine: Engine[Any]) -> Any:
    """At once, and four times more, as long as it runs. RpcError when it cannot."""
    device = engine.device
    assert device is not None
    if not isinstance(device, NetDevice):
        raise RpcError(REFUSED, f"a device of the model {device.model} is no network card")
    if not engine.host.running:
        raise RpcError(REFUSED, "the device is stopped, and sends nothing: resume it first")
    if device.station_address() is None:
        raise RpcError(REFUSED, "the card has no address yet")
    for after in ANNOUNCEMENTS:
        engine.call_later(after * MILLISECOND, lambda: _announce(engine, device))
    return {"frames": len(ANNOUNCEMENTS)}


def _announce(engine: Engine[Any], device: NetDevice) -> None:
    if engine.host.running:
        device.announce()
