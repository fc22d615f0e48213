# SPDX-License-Identifier: BSD-3-Clause
"""The wrapper `,pcap=FILE`: what passes between a device and its backend, in a file for Wireshark.

Recorded is what is on the wire: a TCP burst as its segments, with lengths and sums filled in, so that the
file has exactly `sent_frames` + `received_frames` packets. Timestamps are in nanoseconds.
"""

import logging
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import BinaryIO

from dpkt import pcap  # type: ignore[import-untyped]

from vfio_user.device_models.backends import Wrapper
from vfio_user.device_models.net import CallLater, Cancellable, NetBackend, Offload, WireSize
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.segmentation import segment
from vfio_user.server.net.errors import BackendError

logger = logging.getLogger(__name__)

SNAPLEN = 262_144
FLUSH_INTERVAL = 200_000_000
"""Nanoseconds after which a frame is in the file, for a reader that follows it."""
WRITE_BUFFER = 256 * 1024
MISSING_HINT = "make its directory first, or choose another file"


class CaptureBackend(Wrapper):
    """Records a backend's traffic, as its device sees it. Its counters are the backend's own.

    A disk that is full ends the recording, not the traffic.
    """

    def __init__(
        self, inner: NetBackend, path: str, call_later: CallLater, now: Callable[[], int] = time.time_ns
    ) -> None:
        super().__init__(inner)
        self._call_later = call_later
        self._now = now
        self._path = path
        self._file: BinaryIO | None = open_capture(path)
        self._writer = pcap.Writer(self._file, snaplen=SNAPLEN, linktype=pcap.DLT_EN10MB, nano=True)
        self._timer: Cancellable | None = None
        self._captured = 0
        self._flush()

    def send(self, buffers: Sequence[Buffer], offload: Offload | None = None) -> WireSize:
        if self._file is not None:
            self._record(segment(buffers, offload))  # before the answer that may come at once
        return self.inner.send(buffers, offload)

    def receive(self, frame: bytes) -> bool:
        taken = super().receive(frame)
        if taken and self._file is not None:
            self._record([frame])
        return taken

    def _record(self, frames: list[bytes]) -> None:
        timestamp = Decimal(self._now()).scaleb(-9)
        try:
            self._writer.writepkts((timestamp, frame) for frame in frames)
        except OSError as error:
            self._give_up(error)
            return
        self._captured += len(frames)
        if self._timer is None:
            self._timer = self._call_later(FLUSH_INTERVAL, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.error("pcap=%s: %s; the recording ends here", self._path, error.strerror)
        self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what could not be flushed is lost; the descriptor is closed
                file.close()

    def counters(self) -> Mapping[str, int]:
        return {**self.inner.counters(), "captured_frames": self._captured}

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flush()
        self._close_file()
        super().close()


def open_capture(path: str) -> BinaryIO:
    """Open or make the regular file `path`, empty. Raises `BackendError`."""
    try:
        # O_NONBLOCK: a FIFO without a reader must not stop the server here
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        hint = "choose a file that you may write" if isinstance(error, PermissionError) else MISSING_HINT
        raise BackendError(f"pcap={path}: {error.strerror}; {hint}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BackendError(f"pcap={path}: not a regular file; choose another one")
    os.ftruncate(fd, 0)
    return open(fd, "wb", buffering=WRITE_BUFFER)
