# SPDX-License-Identifier: BSD-3-Clause
"""An e1000 that is moved at random moments: nothing is lost, nothing comes twice, counters go on."""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.device_models.e1000.bench import BUFFER, IDE, IFCS, RS, RX_DATA, RX_RING, Bench
from vfio_user.device_models.e1000.bits import Cause
from vfio_user.device_models.e1000.descriptors import RECEIVE, SIZE
from vfio_user.device_models.fake_migration import save_device

MAC = bytes.fromhex("525400123456")
PARTNER = bytes.fromhex("525400000001")
RING = 8


def frame(number: int, destination: bytes = MAC) -> bytes:
    return destination + PARTNER + b"\x08\x00" + number.to_bytes(4, "big") + bytes(42 + number % 100)


@dataclass
class Traffic:
    """A driver, and a wire at each end, that know what must arrive."""

    bench: Bench
    offered: int = 0
    accepted: list[bytes] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    given: list[bytes] = field(default_factory=list)
    """Frames in the transmit ring, ever."""
    sent: list[bytes] = field(default_factory=list)
    """On the wires of the cards before this one."""
    in_ring: deque[tuple[int, bytes]] = field(default_factory=deque)
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def wire(self) -> list[bytes]:
        return self.sent + self.bench.port.frames

    def offer(self, frames: int) -> None:
        for _ in range(frames):
            data = frame(self.offered)
            if not self.bench.port.offer(data):
                return
            self.offered += 1
            self.accepted.append(data)

    def poll_receive(self) -> None:
        """Take what is marked as done, and give the descriptors back."""
        bench = self.bench
        while len(taken := bench.received()):
            self.received += taken
            for index in range(bench.next_received - len(taken), bench.next_received):
                place = RX_RING + index % RING * SIZE
                RECEIVE.pack_into(bench.memory, place, RX_DATA + index % RING * BUFFER, 0, 0, 0, 0, 0)
            bench.write("RDT", (bench.next_received - 1) % RING)

    def send(self, frames: int, command: int) -> None:
        for _ in range(min(frames, RING - 1 - len(self.in_ring))):
            data = frame(len(self.given), PARTNER)
            self.in_ring.append((self.bench.put_data(data, command=IFCS | RS | command), data))
            self.given.append(data)
        self.bench.write("TDT", self.bench.tail)

    def poll_send(self) -> None:
        """A descriptor that is marked as done is the driver's again: its frame must have left."""
        while self.in_ring and self.bench.done(self.in_ring[0][0]):
            _, data = self.in_ring.popleft()
            assert data in self.wire

    def count(self) -> None:
        for name in ("GPRC", "GPTC", "TPR", "TPT", "GORCL", "GOTCL"):
            self.counted[name] = self.counted.get(name, 0) + self.bench.read(name)
            if name.endswith("L"):
                self.bench.read(name[:-1] + "H")

    def answer(self, some: int) -> None:
        self.bench.host.dma.answer(some)

    def move(self, mapped: bool) -> None:
        """To another card, whose state is the same when it is saved again at once."""
        before = save_device(self.bench.host, self.bench.device)
        self.sent += self.bench.port.frames
        self.bench = self.bench.moved(mapped=mapped)
        assert save_device(self.bench.host, self.bench.device) == before
        self.bench.host.resume()

    def finish(self) -> None:
        """Let everything arrive."""
        for _ in range(50):
            self.bench.advance(1_000_000)
            self.poll_receive()
            self.poll_send()
            self.offer(1)
        self.offered += 1
        self.bench.advance(100_000_000)
        self.poll_receive()
        self.poll_send()
        self.count()


ACTIONS = st.one_of(
    st.tuples(st.just("offer"), st.integers(1, 20)),
    st.tuples(st.just("poll_receive")),
    st.tuples(st.just("send"), st.integers(1, 7), st.sampled_from([0, IDE])),
    st.tuples(st.just("poll_send")),
    st.tuples(st.just("count")),
    st.tuples(st.just("run")),
    st.tuples(st.just("answer"), st.integers(1, 6)),
    st.tuples(st.just("advance"), st.sampled_from([1_000, 100_000, 3_000_000])),
    st.tuples(st.just("icr")),
    st.tuples(st.just("move"), st.booleans()),
)


def act(traffic: Traffic, name: str, *values: int) -> None:
    host = traffic.bench.host
    match name:
        case "run":
            host.run()
        case "advance":
            host.advance(values[0])
        case "icr":
            traffic.bench.read("ICR")
        case _:
            getattr(traffic, name)(*values)


def start(mapped: bool) -> Traffic:
    bench = Bench(mapped=mapped)
    bench.start(tx=RING, rx=RING)
    for name, value in (("RDTR", 30), ("RADV", 50), ("TIDV", 30), ("TADV", 40), ("ITR", 400)):
        bench.write(name, value)
    bench.write("IMS", Cause.RXT0 | Cause.TXDW | Cause.LSC)
    return Traffic(bench)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.lists(ACTIONS, max_size=60))
def test_frames_arrive_once_and_in_order_over_any_number_of_moves(
    mapped: bool, actions: list[tuple[str, int]]
) -> None:
    traffic = start(mapped)
    for action in actions:
        act(traffic, *action)
    traffic.finish()
    assert traffic.received == traffic.accepted
    assert traffic.wire == traffic.given
    assert not traffic.in_ring
    sizes = [[len(data) + 4 for data in frames] for frames in (traffic.accepted, traffic.given)]
    assert traffic.counted == {
        "GPRC": len(sizes[0]),
        "TPR": len(sizes[0]),
        "GORCL": sum(sizes[0]),
        "GPTC": len(sizes[1]),
        "TPT": len(sizes[1]),
        "GOTCL": sum(sizes[1]),
    }
