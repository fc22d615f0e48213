# SPDX-License-Identifier: BSD-3-Clause
"""A state over the connection that asked for it, for where no descriptor can be passed (SSH forwarding).

A save: the answer goes out first, then the stream, and the connection ends with it. A load: all that follows
the request, to the end of what the controller sends, is the stream; the answer comes then. Both have a
descriptor of their own for the same socket, so that the poller can watch it for them too.
"""

import os
from collections.abc import Callable, Generator

from vfio_user.protocol.json_rpc import REFUSED, RpcError
from vfio_user.server.control_jobs import Later, Ready
from vfio_user.server.control_streams import StreamFd
from vfio_user.transport.channel import Channel
from vfio_user.transport.fds import OwnedFd

LOOK_AGAIN = 1_000_000  # ns, while the answer waits for the controller to read


class InlineSink:
    """Writes a stream behind the answers of `channel`. `begin` is called once, before the first byte."""

    def __init__(self, channel: Channel, begin: Callable[[], None]) -> None:
        self._channel = channel
        self._begin = begin
        self._stream = _stream_of(channel, writing=True)
        self.begun = False

    def write(self, data: bytes) -> Generator[Later | Ready, None, None]:
        """All of `data`. RpcError."""
        if not self.begun:
            self.begun = True
            self._begin()
        while self._channel.pending:
            yield Later(LOOK_AGAIN)
        yield from self._stream.write(data)

    def close(self) -> None:
        self._stream.close()


class InlineSource:
    """Reads a stream of which the first bytes have come with the request."""

    def __init__(self, channel: Channel, first: bytes) -> None:
        self._first = first
        self._stream = _stream_of(channel, writing=False)

    def read(self) -> Generator[Later | Ready, None, bytes]:
        """The next bytes; none at the end. RpcError."""
        if self._first:
            first, self._first = self._first, b""
            return first
        return (yield from self._stream.read())

    def close(self) -> None:
        self._stream.close()


def _stream_of(channel: Channel, *, writing: bool) -> StreamFd:
    try:
        own = OwnedFd(os.dup(channel.fileno()))
    except OSError as error:
        raise RpcError(REFUSED, f"there is no descriptor to be had: {error.strerror}") from error
    return StreamFd(own, writing=writing)
