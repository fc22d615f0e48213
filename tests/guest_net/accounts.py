# SPDX-License-Identifier: BSD-3-Clause
"""Who counts what passes between a guest and its TAP: the server, the guest's driver, and the kernel."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from guest_net.far_end import FarEnd, Passed
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.server_process import ServerProcess

FCS = 4
LOST = ("received_filtered", "received_dropped", "received_missed", "net_sent_dropped", "dma_errors")


def check_way(counters: Mapping[str, int], mapped: bool, rounds: int) -> None:
    """All DMA went the way that the guest's memory allows, and no less than so many rounds each way."""
    used, unused = ("mapped", "message") if mapped else ("message", "mapped")
    payload = rounds * 1_000_000
    assert min(counters[f"dma_{used}_read_bytes"], counters[f"dma_{used}_write_bytes"]) > payload
    ways = [f"dma_{way}_{kind}s" for way in (unused, "file") for kind in ("read", "write")]
    assert {name: counters[name] for name in ways} == dict.fromkeys(ways, 0)


@dataclass(frozen=True, slots=True)
class Figures:
    """What each has counted: the server, the guest's driver, the kernel's TAP, and the kernel behind it."""

    wire: Mapping[str, int]
    driver: Mapping[str, int]
    tap: Mapping[str, int]
    passed: Passed

    def since(self, start: "Figures") -> "Figures":
        return Figures(
            _differences(self.wire, start.wire),
            _differences(self.driver, start.driver),
            _differences(self.tap, start.tap),
            self.passed.since(start.passed),
        )


def _differences(now: Mapping[str, int], before: Mapping[str, int]) -> Mapping[str, int]:
    return {name: value - before.get(name, 0) for name, value in now.items()}


@dataclass(slots=True)
class Accounts:
    """Those of one guest with one card on `t0`."""

    guest: Machine
    server: ServerProcess
    namespace: Namespace
    far: FarEnd
    start: Figures = field(default_factory=lambda: Figures({}, {}, {}, Passed()))

    async def begin(self) -> None:
        """What is counted from now on is compared by `check`."""
        self.start = await self._at_rest()

    async def check(self) -> Mapping[str, int]:
        """Frames and bytes (gptc, gotc, gprc, gorc) are the same for all, and nothing was thrown away; the
        server's counters."""
        now = (await self._at_rest()).since(self.start)
        wire, driver, tap, passed = now.wire, now.driver, now.tap, now.passed
        sent, received = wire["net_sent_frames"], wire["net_received_frames"]
        assert driver["tx_packets"] == sent == passed.frames
        assert driver["tx_bytes"] - FCS * sent == wire["net_sent_bytes"] == passed.bytes
        assert tap["rx_packets"] == passed.pieces
        assert driver["rx_packets"] == received == tap["tx_packets"]
        assert driver["rx_bytes"] - FCS * received == wire["net_received_bytes"] == tap["tx_bytes"]
        assert {name: wire[name] for name in LOST} == dict.fromkeys(LOST, 0)
        return wire

    async def _at_rest(self) -> Figures:
        """Read while no frame passed."""
        for _ in range(20):
            before = await self.server.ask_counters()
            driver = await driver_statistics(self.guest)
            tap, passed = tap_statistics(self.namespace), self.far.passed()
            after = await self.server.ask_counters()
            if all(before[name] == after[name] for name in ("net_sent_frames", "net_received_frames")):
                return Figures(after, driver, tap, passed)
        pytest.fail("the wire is never at rest")


async def driver_statistics(guest: Machine) -> Mapping[str, int]:
    lines = (await guest.check("ethtool -S eth0")).splitlines()[1:]
    return {name.strip(): int(value) for name, value in (line.rsplit(":", 1) for line in lines)}


def tap_statistics(namespace: Namespace, name: str = "t0") -> Mapping[str, int]:
    """The kernel's own account of a TAP: `rx_packets` are the writes that it took, a burst is one of them;
    `tx_packets` and `tx_bytes` are what was read."""
    found = json.loads(namespace.ip(f"-json -statistics link show {name}"))[0]["stats64"]
    return {f"{way}_{what}": value for way in ("rx", "tx") for what, value in found[way].items()}
