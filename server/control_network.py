# SPDX-License-Identifier: BSD-3-Clause
"""What a controller does with a network card: its cable, and that the network hears where it is now."""

from typing import Any

from vfio_user.device_models.net import NetDevice
from vfio_user.protocol.json_rpc import REFUSED, RpcError
from vfio_user.server.control_jobs import MILLISECOND
from vfio_user.server.engines.engine import Engine

ANNOUNCEMENTS = (0, 50, 200, 450, 800)
"""Milliseconds after the request: five frames with growing gaps, as QEMU announces its own cards."""


def _card(engine: Engine[Any]) -> NetDevice:
    device = engine.device
    assert device is not None
    if not isinstance(device, NetDevice):
        raise RpcError(REFUSED, f"a device of the model {device.model} is no network card")
    return device


def link_up(engine: Engine[Any]) -> bool | None:
    """Whether a card has a cable with a far end; None: it is none."""
    return engine.device.port.link_up if isinstance(engine.device, NetDevice) else None


def plug(engine: Engine[Any], up: bool) -> Any:
    """Plug the cable in or pull it out; also of a device that is stopped. RpcError when there is none."""
    port = _card(engine).port
    port.set_link(up)
    return {"link": port.link_up}


def announce(engine: Engine[Any]) -> Any:
    """Switches still send its frames elsewhere: tell them at once, and four times more, as long as it runs.
    RpcError when it cannot."""
    device = _card(engine)
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
