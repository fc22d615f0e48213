# SPDX-License-Identifier: BSD-3-Clause
"""What all network backends share: counting at the port, the cable, back-pressure; and the backend `none`."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from vfio_user.device_models.net import NetBackend, Offload, Receiver, WireSize
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.segmentation import Burst, cut, parse_burst, segment, wire_size

BACKLOG_LIMIT = 256
"""Frames that wait for a device which is not ready."""


@dataclass(slots=True)
class WireCounters:
    """Counters of a port, as `NetBackend.counters` describes them."""

    sent_frames: int = 0
    sent_bytes: int = 0
    sent_dropped: int = 0
    sent_malformed: int = 0
    received_frames: int = 0
    received_bytes: int = 0
    received_dropped: int = 0


class Backend:
    """A `NetBackend` without a wire. A subclass transmits, and offers what it has received."""

    def __init__(self) -> None:
        self.counts = WireCounters()
        self.link_up = True
        self._receiver: Receiver | None = None
        self._cable = True  # set_link
        self._carrier = True  # whether there is a far end

    def attach(self, receiver: Receiver) -> None:
        """Deliver frames to `receiver` from now on."""
        self._receiver = receiver

    def send(self, buffers: Sequence[Buffer], offload: Offload | None = None) -> WireSize:
        """See `NetBackend.send`. Counts; `_transmit` does the work."""
        burst = parse_burst(buffers, offload) if offload is not None and offload.segmentation else None
        size = wire_size(buffers, offload) if burst is None else burst.wire_size
        counts = self.counts
        if not size.frames:
            counts.sent_malformed += 1
            return size
        counts.sent_frames += size.frames
        counts.sent_bytes += size.bytes
        dropped = self._transmit(buffers, offload, burst) if self.link_up else size.frames
        if dropped:
            counts.sent_dropped += dropped
        return size

    def _transmit(self, buffers: Sequence[Buffer], offload: Offload | None, burst: Burst | None) -> int:
        """Put a well-formed frame or burst on the wire; how many frames were dropped."""
        return self._transmit_frames(segment(buffers, offload) if burst is None else cut(burst, buffers))

    def _transmit_frames(self, frames: list[bytes]) -> int:
        """The same, for a wire that wants each frame whole and complete."""
        raise NotImplementedError

    def _offer(self, frame: bytes) -> bool:
        """Give a frame to the device; False: keep it until `ready`. Dropped when it could go nowhere."""
        receiver, counts = self._receiver, self.counts
        if receiver is None or not self.link_up:
            counts.received_dropped += 1
            return True
        if not receiver.receive(frame):
            return False
        counts.received_frames += 1
        counts.received_bytes += len(frame)
        return True

    def _offer_all(self, frames: Sequence[bytes]) -> int:
        """The same for several, for less than a call each; how many were taken, in order."""
        receiver, counts = self._receiver, self.counts
        if receiver is None or not self.link_up:
            counts.received_dropped += len(frames)
            return len(frames)
        receive, taken = receiver.receive, 0
        for frame in frames:
            if not receive(frame):
                break
            taken += 1
        counts.received_frames += taken
        counts.received_bytes += sum(map(len, frames if taken == len(frames) else frames[:taken]))
        return taken

    def ready(self) -> None:
        """The device can take frames again."""

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it out."""
        self._cable = up
        self._update_link()

    def _set_carrier(self, up: bool) -> None:
        """The far end came or went."""
        self._carrier = up
        self._update_link()

    def _update_link(self) -> None:
        up = self._cable and self._carrier
        if up != self.link_up:
            self.link_up = up
            if self._receiver is not None:
                self._receiver.link_changed(up)

    def counters(self) -> Mapping[str, int]:
        """See `NetBackend.counters`."""
        return asdict(self.counts)

    def close(self) -> None:
        """Release everything; nothing to release here."""


class Backlog:
    """Frames for a device that is not ready, in order; at most `limit`."""

    def __init__(self, offer: Callable[[bytes], bool], limit: int = BACKLOG_LIMIT) -> None:
        self._offer = offer
        self._limit = limit
        self._frames: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def full(self) -> bool:
        return len(self._frames) >= self._limit

    def put(self, frame: bytes) -> bool:
        """Deliver a frame behind those that wait. False: too many wait."""
        if not self._frames and self._offer(frame):
            return True
        if self.full:
            return False
        self._frames.append(frame)
        return True

    def flush(self) -> None:
        """Deliver until the device refuses. A call from within is harmless: no frame is in two hands."""
        while self._frames:
            frame = self._frames.popleft()
            if not self._offer(frame):
                self._frames.appendleft(frame)
                return

    def clear(self) -> None:
        self._frames.clear()


class NoneBackend(Backend):
    """A cable that leads nowhere: the link is up, everything sent is gone, nothing comes."""

    def _transmit(self, buffers: Sequence[Buffer], offload: Offload | None, burst: Burst | None) -> int:
        return 0


class Wrapper(Backend):
    """Stands between a device and another backend, and is each one's other side.

    It counts at its own port, the device's; `inner_*` are the counters of the backend behind it.
    """

    def __init__(self, inner: NetBackend) -> None:
        super().__init__()
        self.inner = inner
        self.link_up = self._carrier = inner.link_up

    def attach(self, receiver: Receiver) -> None:
        super().attach(receiver)
        self.inner.attach(self)
        self.link_changed(self.inner.link_up)

    def receive(self, frame: bytes) -> bool:
        """From the inner backend."""
        return self._offer(frame)

    def link_changed(self, up: bool) -> None:
        """From the inner backend."""
        self._set_carrier(up)

    def set_link(self, up: bool) -> None:
        """The cable is the inner backend's."""
        self.inner.set_link(up)
        self.link_changed(self.inner.link_up)

    def ready(self) -> None:
        self.inner.ready()

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), **{f"inner_{name}": n for name, n in self.inner.counters().items()}}

    def close(self) -> None:
        self.inner.close()
