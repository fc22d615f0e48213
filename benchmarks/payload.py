# SPDX-License-Identifier: BSD-3-Clause
"""The host's end of a transfer whose content is checked: `python -m vfio_user.benchmarks.payload`.

    payload PORT MSS send FILE      sends the file to the first client
    payload PORT MSS receive        takes what the first client sends

Both print the SHA-256 of what went over the connection. An MSS of 0 leaves it to the kernel; any other holds
for both directions, as we announce it and keep to it ourselves.
"""

import hashlib
import socket
import sys
from pathlib import Path

_TIME_LIMIT = 60.0
_CHUNK = 1 << 16


def listener(port: int, mss: int) -> socket.socket:
    """A listening socket for IPv4 and IPv6."""
    sock = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    if mss:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)
    sock.settimeout(_TIME_LIMIT)
    return sock


def send(client: socket.socket, data: bytes) -> str:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    return hashlib.sha256(data).hexdigest()


def receive(client: socket.socket) -> str:
    digest = hashlib.sha256()
    while data := client.recv(_CHUNK):
        digest.update(data)
    return digest.hexdigest()


def main(port: str, mss: str, direction: str, *files: str) -> None:
    with listener(int(port), int(mss)) as server:
        client, _ = server.accept()
        with client:
            client.settimeout(_TIME_LIMIT)
            print(send(client, Path(files[0]).read_bytes()) if direction == "send" else receive(client))


if __name__ == "__main__":
    main(*sys.argv[1:])
