# SPDX-License-Identifier: BSD-3-Clause
"""Traffic of a guest that checks every frame: against a network that echoes, and in the NIC's loopback."""

import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address

import trio

from vfio_user.client.drivers import packets
from vfio_user.client.drivers.e1000 import E1000
from vfio_user.client.drivers.e1000_hardware import Reg
from vfio_user.client.drivers.packets import Packet, Station

GUEST_IP, PEER_IP = IPv4Address("10.0.2.15"), IPv4Address("10.0.2.2")
UDP_ECHO_PORT = 7
BEACON_PORT = 9000
FRAME_HEADERS = packets.ETHERNET_SIZE + packets.IPV4_SIZE + packets.UDP_SIZE
LONGEST_FRAME = 1514
_IDENTIFIER, _PORT = 0x6D6F, 40000
_NUMBER_SIZE = 4
_BEACON_SIZE = 200


class TrafficError(Exception):
    """A frame is missing, twice there, out of order or not as it was sent."""


@dataclass(frozen=True, slots=True)
class Measure:
    """`count` round trips, their median in seconds, and what all took."""

    count: int
    median: float
    seconds: float


@dataclass(frozen=True, slots=True)
class BulkReport:
    """Frames that went out, came back and were compared; `payload` is their payload in bytes, one way."""

    frames: int
    payload: int
    seconds: float

    @property
    def bits_per_second(self) -> float:
        """Payload in one direction; the same goes the other way meanwhile."""
        return self.payload * 8 / self.seconds


class Traffic:
    """What a guest at 10.0.2.15 does with the station 10.0.2.2. `patience`: seconds to wait for a frame."""

    def __init__(self, nic: E1000, *, seed: int = 1, patience: float = 5.0) -> None:
        self.nic = nic
        self.patience = patience
        self.me = Station(nic.mac, GUEST_IP)
        self.peer = Station(bytes(6), PEER_IP)
        self.beacons = 0
        """Frames of `beacon` that have come."""
        self._beacons_sent = 0
        self._random = random.Random(seed)
        self._noise = self._random.randbytes(1 << 16)

    async def resolve(self) -> Station:
        """Ask for the peer's address (ARP)."""
        await self.nic.send([packets.arp_request(self.me, PEER_IP)])
        reply = await self._receive("arp")
        if reply.operation != 2 or reply.source.ip != PEER_IP or reply.destination != self.me:
            raise TrafficError(f"not the answer to our ARP request: {reply}")
        self.peer = reply.source
        return self.peer

    async def ping(self, count: int, size: int = 56) -> Measure:
        """One echo request after the other, each with other data of `size` bytes."""
        times, begun = [], time.perf_counter()
        for sequence in range(count):
            data, start = self._data(size), time.perf_counter()
            await self.nic.send([packets.ping(self.me, self.peer, _IDENTIFIER, sequence, data)])
            reply = await self._receive("icmp")
            times.append(time.perf_counter() - start)
            if (reply.operation, reply.identifier, reply.sequence) != (0, _IDENTIFIER, sequence):
                raise TrafficError(f"not the answer to ping {sequence}: {reply}")
            self._compare(reply, data, f"ping {sequence}")
        return Measure(count, statistics.median(times), time.perf_counter() - begun)

    async def bulk(
        self,
        count: int,
        *,
        window: int = 128,
        batch: int = 32,
        progress: Callable[[int], None] = lambda _: None,
    ) -> BulkReport:
        """`count` datagrams as of `flow`."""
        return await self.flow(lambda sent: sent < count, window=window, batch=batch, progress=progress)

    async def flow(
        self,
        more: Callable[[int], bool],
        *,
        window: int = 128,
        batch: int = 32,
        progress: Callable[[int], None] = lambda _: None,
    ) -> BulkReport:
        """Numbered UDP datagrams of all sizes to the echo port, `window` of them under way; every one must
        come back, once, in order, unchanged. `more` is asked before each, with how many were sent;
        `progress` is told how many have come back."""
        under_way: deque[bytes] = deque()
        sent = done = payload = 0
        begun = time.perf_counter()
        while True:
            fresh: list[bytes] = []
            while sent - done <= window - batch and len(fresh) < batch and more(sent + len(fresh)):
                size = self._random.randint(64, LONGEST_FRAME - FRAME_HEADERS)
                fresh.append(self._datagram(sent + len(fresh), size))
            if fresh:
                under_way += fresh
                sent += len(fresh)
                await self.nic.send([packets.udp(self.me, self.peer, self._ports(), d) for d in fresh])
            elif under_way:
                payload += len(under_way[0])
                await self._take_datagram(done, under_way.popleft())
                done += 1
                progress(done)
            else:
                return BulkReport(done, payload, time.perf_counter() - begun)

    def beacon(self) -> bytes:
        """The next of the numbered frames that the peer sends unasked; for who puts it on the wire. All of
        them must come, once and in order, among all others."""
        payload = self._beacon(self._beacons_sent)
        self._beacons_sent += 1
        return packets.udp(self.peer, self.me, (BEACON_PORT, _PORT), payload)

    @property
    def beacons_under_way(self) -> int:
        """Made, and not come yet."""
        return self._beacons_sent - self.beacons

    def _beacon(self, number: int) -> bytes:
        start = number % (len(self._noise) - _BEACON_SIZE)
        return number.to_bytes(_NUMBER_SIZE, "big") + self._noise[start : start + _BEACON_SIZE]

    async def last_beacons(self) -> None:
        """Wait for those that are under way."""
        while self.beacons < self._beacons_sent:
            if (packet := await self._receive_any("beacon")).identifier != BEACON_PORT:
                raise TrafficError(f"a beacon was due: {packet}")

    def _ports(self) -> tuple[int, int]:
        return _PORT, UDP_ECHO_PORT

    def _datagram(self, number: int, size: int) -> bytes:
        return number.to_bytes(_NUMBER_SIZE, "big") + self._data(size - _NUMBER_SIZE)

    async def _take_datagram(self, number: int, data: bytes) -> None:
        reply = await self._receive("udp")
        if (reply.identifier, reply.sequence) != (UDP_ECHO_PORT, _PORT) or reply.source != self.peer:
            raise TrafficError(f"not from the echo service: {reply}")
        found = int.from_bytes(reply.payload[:_NUMBER_SIZE], "big")
        if found != number:
            raise TrafficError(f"datagram {found} comes where {number} was due")
        self._compare(reply, data, f"datagram {number}")

    async def segments(self, size: int = 60_000, mss: int = 1460) -> BulkReport:
        """Let the device cut `size` bytes into TCP segments, in the PHY's loopback, and join them again."""
        await self.nic.board.set_loopback(True)
        data, first, begun = self._data(size), 1000, time.perf_counter()
        headers = packets.tcp_segmentation_header(self.me, self.me, (_PORT, _PORT + 1), first)
        await self.nic.send_segmented(headers, data, mss)
        frames = done = 0
        while done < size:
            segment = await self._receive("tcp")
            if segment.number != first + done:
                raise TrafficError(f"segment {segment.number} comes where {first + done} was due")
            self._compare(segment, data[done : done + mss], f"segment {frames}")
            done, frames = done + len(segment.payload), frames + 1
        report = BulkReport(frames, size, time.perf_counter() - begun)
        await self.nic.board.set_loopback(False)
        return report

    async def register_reads(self, count: int) -> Measure:
        """Round trips of one register read."""
        times, begun = [], time.perf_counter()
        for _ in range(count):
            start = time.perf_counter()
            await self.nic.board.read(Reg.STATUS)
            times.append(time.perf_counter() - start)
        return Measure(count, statistics.median(times), time.perf_counter() - begun)

    async def check_statistics(self) -> None:
        """The device's own counters must be the driver's. TrafficError names what differs."""
        counted, ours = await self.nic.statistics(), self.nic.counters
        fcs = packets.FCS_SIZE
        expected = {
            "gptc": ours.frames_sent,
            "gprc": ours.frames_received,
            "gotc": ours.bytes_sent + fcs * ours.frames_sent,
            "gorc": ours.bytes_received + fcs * ours.frames_received,
            "mpc": 0,
            "crcerrs": 0,
        }
        found = dict(counted) | {
            name: counted[f"{name}l"] | counted[f"{name}h"] << 32 for name in ("gotc", "gorc")
        }
        wrong = [f"{name} {found[name]}, not {n}" for name, n in expected.items() if found[name] != n]
        if ours.bad_sums:
            wrong.append(f"{ours.bad_sums} frames with a bad checksum")
        if wrong:
            raise TrafficError(f"the device's statistics differ from the driver's: {', '.join(wrong)}")

    async def _receive(self, kind: packets.Kind) -> Packet:
        """The next frame that is no beacon, checked."""
        packet = await self._receive_any(kind)
        while packet.kind == "udp" and packet.identifier == BEACON_PORT:
            packet = await self._receive_any(kind)
        if packet.kind != kind:
            raise TrafficError(f"{packet.kind} where {kind} was due")
        return packet

    async def _receive_any(self, kind: str) -> Packet:
        """The next frame, checked; a beacon is counted."""
        frame = None
        with trio.move_on_after(self.patience):
            frame = await self.nic.receive()
        if frame is None:
            raise TrafficError(f"no {kind} frame within {self.patience:g} s")
        try:
            packet = packets.parse(frame)
        except packets.BadPacket as error:
            raise TrafficError(f"a bad frame where {kind} was due: {error}") from error
        if packet.kind == "udp" and packet.identifier == BEACON_PORT:
            self._take_beacon(packet)
        return packet

    def _take_beacon(self, packet: Packet) -> None:
        number = int.from_bytes(packet.payload[:_NUMBER_SIZE], "big")
        if number != self.beacons or packet.source != self.peer or packet.sequence != _PORT:
            raise TrafficError(f"beacon {number} comes where {self.beacons} was due")
        self._compare(packet, self._beacon(number), f"beacon {number}")
        self.beacons += 1

    def _data(self, size: int) -> bytes:
        start = self._random.randrange(len(self._noise) - size) if size < len(self._noise) else 0
        return self._noise[start : start + size]

    def _compare(self, packet: Packet, data: bytes, what: str) -> None:
        if packet.payload != data:
            raise TrafficError(f"{what}: {len(packet.payload)} bytes came back, not what was sent")
