# SPDX-License-Identifier: BSD-3-Clause
"""What a guest sends, counted behind its TAP (packet(7)); and frames of any kind for the guest."""

import contextlib
import copy
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import trio

from vfio_user.client.background import background
from vfio_user.client.qemu.namespace import Namespace

# linux/if_packet.h, linux/if_ether.h, asm-generic/socket.h
SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 6, 15, 23
ETH_P_ALL, SO_RCVBUFFORCE = 3, 33
VNET_HEADER = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
BUFFER = 64 << 20
HEADERS = 192
"""Bytes of a frame that are read: its headers are among them."""


@dataclass(slots=True)
class Passed:
    """`pieces` are what the kernel was given, a burst is one; `frames` and `bytes` are those on a wire."""

    pieces: int = 0
    frames: int = 0
    bytes: int = 0

    def since(self, start: "Passed") -> "Passed":
        return Passed(self.pieces - start.pieces, self.frames - start.frames, self.bytes - start.bytes)

    def add(self, data: bytearray, size: int) -> None:
        """A piece: the virtio header and the beginning of a frame, `size` bytes long without that header."""
        _, kind, _, segment, transport, _ = VNET_HEADER.unpack_from(data)
        self.pieces += 1
        if not kind:
            self.frames, self.bytes = self.frames + 1, self.bytes + size
            return
        headers = transport + 4 * (data[VNET_HEADER.size + transport + 12] >> 4)
        frames = -(-(size - headers) // segment)
        self.frames, self.bytes = self.frames + frames, self.bytes + size + (frames - 1) * headers


@dataclass(slots=True)
class FarEnd:
    """Counts from the moment when it is made."""

    sock: socket.socket
    _passed: Passed = field(default_factory=Passed)

    def passed(self) -> Passed:
        """All until now. AssertionError if the kernel could not keep up with the frames."""
        self._read()
        statistics = self.sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        assert struct.unpack("=II", statistics)[1] == 0
        return copy.copy(self._passed)

    def _read(self) -> None:
        buffer = bytearray(VNET_HEADER.size + HEADERS)
        with contextlib.suppress(BlockingIOError):
            while True:
                size = self.sock.recv_into(buffer, 0, socket.MSG_TRUNC)
                self._passed.add(buffer, size - VNET_HEADER.size)

    async def follow(self) -> None:
        """Read what comes, so that it never piles up."""
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            self._read()


@contextlib.asynccontextmanager
async def far_end(namespace: Namespace, name: str = "t0") -> AsyncIterator[FarEnd]:
    """What comes out of the TAP inside the block is counted."""
    with namespace.open_socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        for option in (PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING):
            sock.setsockopt(SOL_PACKET, option, 1)
        sock.bind((name, ETH_P_ALL))
        end = FarEnd(sock)
        async with background() as nursery:
            nursery.start_soon(end.follow)
            yield end


@contextlib.contextmanager
def sender(namespace: Namespace, name: str = "t0") -> Iterator[socket.socket]:
    """A socket whose every `send` is a frame for the guest."""
    with namespace.open_socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        yield sock
