# SPDX-License-Identifier: BSD-3-Clause
"""VLANs and addresses: what the guest's driver puts into the card's filters, and what they let through."""

import socket
from dataclasses import dataclass

import trio

from guest_net.far_end import sender
from guest_net.vlan import add_vlan
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import bring_up
from vfio_user.client.server_process import ServerProcess

STATION, STRANGER = bytes.fromhex("525400123456"), bytes.fromhex("525400654321")
GROUP, GROUP_ADDRESS = "239.1.2.3", bytes.fromhex("01005e010203")
VLAN, OTHER_VLAN = 5, 6
HOST_STATION = bytes.fromhex("020000000001")
PROBES = 10
"""Frames."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Those of the card of one guest, on `t0`; the wire is at rest but for what is sent here."""

    guest: Machine
    server: ServerProcess
    namespace: Namespace

    async def check(self) -> None:
        await self._check_vlan()
        await self._check_promiscuous()
        await self._check_multicast()

    async def _check_vlan(self) -> None:
        assert await self._filtered(STATION, OTHER_VLAN) == 0  # as long as the guest has no VLAN
        await add_vlan(self.guest, "eth0", "v0", VLAN)
        await bring_up(self.guest, interface="v0")
        assert [await self._filtered(STATION, tag) for tag in (OTHER_VLAN, VLAN)] == [PROBES, 0]
        await self.guest.check("ip link delete v0")
        assert await self._filtered(STATION, VLAN) == PROBES

    async def _check_promiscuous(self) -> None:
        assert await self._filtered(STRANGER) == PROBES
        await self.guest.check("ip link set eth0 promisc on")
        assert await self._filtered(STRANGER) == 0
        await self.guest.check("ip link set eth0 promisc off")
        assert await self._filtered(STRANGER) == PROBES

    async def _check_multicast(self) -> None:
        assert await self._filtered(GROUP_ADDRESS) == PROBES
        member = f"socat -u UDP4-RECV:9,ip-add-membership={GROUP}:eth0 - > /dev/null"
        await self.guest.check(f"{member} & echo $! > /tmp/member")
        await self._wait_member(True)
        assert await self._filtered(GROUP_ADDRESS) == 0
        await self.guest.check("kill $(cat /tmp/member)")
        await self._wait_member(False)
        assert await self._filtered(GROUP_ADDRESS) == PROBES

    async def _wait_member(self, wanted: bool) -> None:
        """Until the guest's kernel is in the group, or not any more."""
        look = f"grep -q '{int.from_bytes(socket.inet_aton(GROUP), 'little'):08X}' /proc/net/igmp"
        loop = f"for i in $(seq 100); do {'' if wanted else '! '}{look} && exit 0; sleep 0.1; done; exit 1"
        await self.guest.check(loop, 60)

    async def _filtered(self, destination: bytes, tag: int | None = None) -> int:
        """How many of PROBES frames the card's filters have kept from the guest."""
        kind = b"\x88\xb5" if tag is None else b"\x81\0" + tag.to_bytes(2, "big") + b"\x88\xb5"
        before = now = await self.server.ask_counters()
        with sender(self.namespace) as sock:
            for _ in range(PROBES):
                sock.send((destination + HOST_STATION + kind).ljust(100, b"\0"))
        wanted = before["net_received_frames"] + PROBES
        with trio.fail_after(60):
            while now["net_received_frames"] < wanted:
                now = await self.server.ask_counters()
        return now["received_filtered"] - before["received_filtered"]
