# SPDX-License-Identifier: BSD-3-Clause
"""A bad wire on purpose: frames are dropped, corrupted, duplicated, reordered and delayed, by a seed."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random

from vfio_user.device_models.backends import Backlog, Wrapper
from vfio_user.device_models.net import CallLater, Cancellable, NetBackend, Offload
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.segmentation import Burst

DELAYED_LIMIT = 4096
"""Frames under way at a time; more are dropped."""
REORDER_LIMIT = 10_000_000
"""Nanoseconds that a frame is held back for the next one to overtake it."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to the frames of one direction: probabilities 0..1, and a delay in nanoseconds."""

    drop: float = 0.0
    corrupt: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: int = 0

    @property
    def none(self) -> bool:
        return self == NO_FAULTS


NO_FAULTS = Faults()


@dataclass(slots=True)
class FaultCounters:
    """How often each fault happened."""

    dropped: int = 0
    corrupted: int = 0
    duplicated: int = 0
    reordered: int = 0


class BadChannel:
    """One direction. The same seed and the same frames give the same faults."""

    def __init__(
        self, faults: Faults, seed: str, call_later: CallLater, deliver: Callable[[bytes], None]
    ) -> None:
        self.counts = FaultCounters()
        self._faults = faults
        self._random = Random(seed)
        self._call_later = call_later
        self._deliver = deliver
        self._held: bytes | None = None
        self._held_timer: Cancellable | None = None
        self._delayed: deque[tuple[bytes, Cancellable]] = deque()

    def push(self, frame: bytes) -> None:
        """Take a frame; what becomes of it is delivered now, later or never."""
        faults, draw = self._faults, self._random.random
        # Always five numbers a frame: one fault's probability does not move the others' places.
        drop, corrupt, place, duplicate, reorder = draw(), draw(), draw(), draw(), draw()
        if drop < faults.drop:
            self.counts.dropped += 1
            return
        if corrupt < faults.corrupt:
            frame = self._corrupt(frame, place)
        if reorder < faults.reorder and self._held is None:
            self._hold(frame)
            return
        self._pass(frame)
        if duplicate < faults.duplicate:
            self.counts.duplicated += 1
            self._pass(frame)
        if self._held is not None:
            self.counts.reordered += 1
            self._release()

    def _corrupt(self, frame: bytes, place: float) -> bytes:
        self.counts.corrupted += 1
        bit = int(place * len(frame) * 8)
        changed = bytearray(frame)
        changed[bit >> 3] ^= 1 << (bit & 7)
        return bytes(changed)

    def _hold(self, frame: bytes) -> None:
        self._held = frame
        self._held_timer = self._call_later(REORDER_LIMIT, self._release)

    def _release(self) -> None:
        """The frame that was held back follows: it was overtaken, or has waited long enough."""
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None
        frame, self._held = self._held, None
        if frame is not None:
            self._pass(frame)

    def _pass(self, frame: bytes) -> None:
        if not self._faults.delay:
            self._deliver(frame)
        elif len(self._delayed) >= DELAYED_LIMIT:
            self.counts.dropped += 1
        else:
            self._delayed.append((frame, self._call_later(self._faults.delay, self._arrive)))

    def _arrive(self) -> None:
        """Every frame has the same delay, so the oldest is the one whose time has come."""
        self._deliver(self._delayed.popleft()[0])

    def close(self) -> None:
        """Forget what is under way."""
        for _, timer in self._delayed:
            timer.cancel()
        self._delayed.clear()
        if self._held_timer is not None:
            self._held_timer.cancel()
        self._held = self._held_timer = None


class FaultyBackend(Wrapper):
    """A backend behind a bad wire. A direction without faults is left as it is, bursts whole."""

    def __init__(
        self,
        inner: NetBackend,
        call_later: CallLater,
        sent: Faults = NO_FAULTS,
        received: Faults = NO_FAULTS,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        self._sent_faults, self._received_faults = sent, received
        self._sent = BadChannel(sent, f"{seed} sent", call_later, self._send_frame)
        self._received = BadChannel(received, f"{seed} received", call_later, self._received_frame)
        self._backlog = Backlog(self._offer)
        self._refused = False

    def _transmit(self, buffers: Sequence[Buffer], offload: Offload | None, burst: Burst | None) -> int:
        if self._sent_faults.none:
            self.inner.send(buffers, offload)
            return 0
        return super()._transmit(buffers, offload, burst)

    def _transmit_frames(self, frames: list[bytes]) -> int:
        before = self._sent.counts.dropped
        for frame in frames:
            self._sent.push(frame)
        return self._sent.counts.dropped - before

    def _send_frame(self, frame: bytes) -> None:
        self.inner.send([frame])

    def receive(self, frame: bytes) -> bool:
        if self._received_faults.none:
            return self._offer(frame)
        if self._backlog.full:
            self._refused = True
            return False
        self._received.push(frame)
        return True

    def _received_frame(self, frame: bytes) -> None:
        if not self._backlog.put(frame):
            self.counts.received_dropped += 1

    def ready(self) -> None:
        self._backlog.flush()
        if self._received_faults.none or (self._refused and not self._backlog.full):
            self._refused = False
            self.inner.ready()

    def counters(self) -> Mapping[str, int]:
        sent = {f"sent_faults_{name}": n for name, n in asdict(self._sent.counts).items()}
        received = {f"received_faults_{name}": n for name, n in asdict(self._received.counts).items()}
        return {**super().counters(), **sent, **received}

    def close(self) -> None:
        self._sent.close()
        self._received.close()
        self._backlog.clear()
        super().close()
