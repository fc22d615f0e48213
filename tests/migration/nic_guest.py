# SPDX-License-Identifier: BSD-3-Clause
"""A guest with an e1000 under load, on a network that goes with it: an echo service behind a switch."""

from contextlib import ExitStack
from dataclasses import dataclass

from migration.moving import Make, Server, Yard, watched
from vfio_user.client.attachment import Attachment
from vfio_user.client.drivers.e1000_traffic import Traffic
from vfio_user.client.memory import GuestRam
from vfio_user.client.switch import Port, Switch
from vfio_user.device_models.catalog import load_model, make_device
from vfio_user.protocol.constants import MigrationState
from vfio_user.server.engines.native import NativeServer
from vfio_user.server.net.factory import open_backend

WINDOW = 48
"""Datagrams under way, at most."""


@dataclass
class Load:
    """Datagrams under way all the time, until `going` is False."""

    traffic: Traffic
    going: bool = True
    done: int = 0
    ended: bool = False

    async def run(self) -> None:
        await self.traffic.flow(lambda _: self.going, window=WINDOW, batch=8, progress=self._progress)
        self.ended = True

    def _progress(self, done: int) -> None:
        self.done = done


@dataclass(frozen=True, slots=True)
class Stand:
    """An e1000 at a place: its server, the VMM on it, and its cable."""

    server: Server
    attachment: Attachment
    port: Port

    @property
    def sent(self) -> int:
        """Frames that the device has put on the wire."""
        assert not self.server.counted("net_sent_dropped")
        return self.server.counted("net_sent_frames")

    @property
    def taken(self) -> int:
        """Frames that the device has accepted from the wire."""
        assert not self.server.counted("net_received_dropped")
        return self.server.counted("net_received_frames")

    async def close(self) -> None:
        await self.attachment.close()
        await self.server.close()


async def open_stand(
    yard: Yard,
    switch: Switch,
    number: int,
    *,
    incoming: bool,
    ram: GuestRam | None = None,
    late: list[MigrationState] | None = None,
) -> Stand:
    """`ram`: that of other devices too. `late`: see `moving.watched`."""
    path = yard.folder / f"wire{number}"
    port = await switch.open_port(path)

    def prepare(native: NativeServer, stack: ExitStack) -> Make:
        backend = open_backend(f"stream:{path}", native.poller, native.call_later)
        stack.callback(backend.close)
        return watched(
            lambda host: make_device(load_model("e1000"), host, backend, {}), [] if late is None else late
        )

    server = yard.serve_on(prepare)
    attachment = await (yard.incoming(server, ram) if incoming else yard.start(server, ram))
    return Stand(server, attachment, port)


async def rewire(switch: Switch, here: Stand, there: Stand) -> None:
    """While both stand still: the network finds the device at its new place."""
    await switch.move(here.port, there.port, sent=here.sent, taken=here.taken)
