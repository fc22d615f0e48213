# SPDX-License-Identifier: BSD-3-Clause
"""A controller's own reads and writes of guest addresses, by DMA message and never through a mapping.

So they reach what the client can reach, also what is no memory; the client knows of every write; and the
client refuses what it refuses a device (QEMU: everything while the bus master is off, with ENODEV). They go
while the device is stopped, too. The native engine only: libvfio-user knows no address that is not mapped,
and takes any other message of the client's for the reply.
"""

import time
from collections.abc import Callable
from typing import Any

from vfio_user.device_models.tasks import Completion
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.json_rpc import FAILED, INVALID_PARAMS, REFUSED, RpcError
from vfio_user.server.control_jobs import MILLISECOND, Later, Steps
from vfio_user.server.engines.engine import Engine
from vfio_user.server.engines.native import NativeServer
from vfio_user.server.session import Session

MAX_ACCESS = 4096
"""Bytes of one read or write."""
LOOK_AGAIN = 20_000  # ns between two looks for the reply


class GuestControl:
    """One for the server."""

    def __init__(self, engine: Engine[Any]) -> None:
        self._engine = engine

    def read(self, address: int, length: int, wait_ms: int) -> Steps:
        """`length` bytes as the client reads them."""
        completion: Completion[Any] = Completion()
        data = yield from self._access(
            address,
            length,
            wait_ms,
            completion,
            lambda session: session.send_dma_read(address, length, completion),
        )
        if len(data) != length:
            raise RpcError(FAILED, f"the client answered with {len(data)} bytes")
        return {"data": bytes(data).hex()}

    def write(self, address: int, data: bytes, wait_ms: int) -> Steps:
        """Let the client write `data`; it has when this ends."""
        completion: Completion[Any] = Completion()
        count = yield from self._access(
            address,
            len(data),
            wait_ms,
            completion,
            lambda session: session.send_dma_write(address, data, completion),
        )
        if count != len(data):
            raise RpcError(FAILED, f"the client wrote {count} of {len(data)} bytes")
        return {"bytes": count}

    def _access(
        self,
        address: int,
        length: int,
        wait_ms: int,
        completion: Completion[Any],
        send: Callable[[Session], None],
    ) -> Steps:
        server, session = self._require_client(address, length)
        deadline = time.monotonic_ns() + wait_ms * MILLISECOND
        try:
            send(session)
        except VfioUserError as error:
            raise RpcError(FAILED, error.reason) from error
        server.send_owed()
        while not completion.done:
            if server.session is not session or not server.attached:
                raise RpcError(FAILED, "the client has left")
            if time.monotonic_ns() > deadline:
                raise RpcError(FAILED, f"the client has not answered within {wait_ms} ms")
            yield Later(LOOK_AGAIN)
        return _result(completion)

    def _require_client(self, address: int, length: int) -> tuple[NativeServer, Session]:
        server = self._engine
        if not isinstance(server, NativeServer):
            raise RpcError(
                REFUSED, "the libvfio-user engine reaches only what its client has mapped: serve with native"
            )
        messages = server.host.dma.messages
        if server.session is None or messages is None:
            raise RpcError(REFUSED, "no client is there to ask")
        if address + length > 1 << 64:
            raise RpcError(INVALID_PARAMS, "the range goes beyond the last address")
        if length > messages.max_transfer:
            most = messages.max_transfer
            raise RpcError(INVALID_PARAMS, f"the client takes at most {most} bytes in a message")
        return server, server.session


def _result(completion: Completion[Any]) -> Any:
    try:
        completion.__await__().send(None)
    except StopIteration as end:
        return end.value
    except VfioUserError as error:
        raise RpcError(FAILED, error.reason) from error
    raise AssertionError("it was done")
