# SPDX-License-Identifier: BSD-3-Clause
"""MIG_DATA_READ by the short way gives what the session's general way gives, whatever is asked."""

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol import capabilities, codec, layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import Command, DeviceFeature, DeviceFeatureFlags, MigrationState, Role
from vfio_user.server.host import ServerHost
from vfio_user.server.session import Session
from vfio_user.transport.fds import OwnedFd
from vfio_user.transport.poller import Poller

S = MigrationState
LIMIT = 1 << 20
NO_FD = 0xFFFFFFFF


class General(Session):
    """Has no short way."""

    def _serve_read(self) -> bool:
        return False


class Bench:
    """A device with 64 KiB of memory in `state`, and all that its session has sent."""

    def __init__(self, poller: Poller, kind: type[Session], state: MigrationState = S.RUNNING) -> None:
        self.sent = b""
        self.congested = False
        self.host = ServerHost(poller)
        device = Scratch(self.host, memory=1 << 16)
        self.host.install(device)
        device.reset()
        device.regions[2].write(0, bytes(range(256)) * 64)
        self.session = kind(device, self.host, self, capabilities.Version())
        client = Connection(Role.CLIENT)
        for body in (capabilities.propose(capabilities.Version()), m.RegionReadRequest(0, 0, 4)):
            self.receive(b"".join(client.request(body)[1].buffers))
            client.feed(self.sent)
            self.sent = b""
        if state is not S.RUNNING:
            self.receive(set_state(state))
        self.taken = 0

    def send(self, buffers: Sequence[Buffer], fds: Sequence[int] = (), *, lasting: bool = False) -> None:
        self.sent += b"".join(buffers)

    def receive(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        connection = self.session.connection
        connection.get_buffer(len(data))[: len(data)] = data
        self.session.receive(len(data), fds)

    def close(self) -> None:
        self.session.close()
        self.host.detach()
        self.host.close()


def message(command: Command, body: bytes, flags: int = 0, message_id: int = 7) -> bytes:
    return codec.pack_header(message_id, command, 16 + len(body), flags) + body


def set_state(state: MigrationState) -> bytes:
    flags = DeviceFeature.MIG_DEVICE_STATE | DeviceFeatureFlags.SET
    request = m.DeviceFeatureRequest(flags, layouts.build(m.FeatureMigState(state, NO_FD)))
    return message(Command.DEVICE_FEATURE, layouts.build(request))


def read(count: int, argsz: int, more: bytes, flags: int) -> bytes:
    request = layouts.build(m.MigDataReadRequest(count, min(argsz, 0xFFFFFFFF)))
    return message(Command.MIG_DATA_READ, request + more, flags)


COUNTS = st.sampled_from([0, 1, 24, 4096, 65_536, LIMIT, LIMIT + 1, 0xFFFFFFFF]) | st.integers(0, 9000)
PLAIN = COUNTS.map(lambda count: read(count, count + 8, b"", 0))
ODD = st.builds(
    read, COUNTS, st.integers(0, 9000), st.sampled_from([b"", b"more"]), st.sampled_from([0, 0x10, 2])
)
OTHERS = st.sampled_from([codec.pack_region_read(3, 0, 0, 4), *map(set_state, S)])
STATES = st.sampled_from([S.RUNNING, S.STOP, S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY])


SHORT = st.integers(0, 7).map(lambda size: message(Command.MIG_DATA_READ, bytes(size)))


@given(STATES, st.lists(PLAIN | ODD | SHORT | OTHERS, max_size=6), st.booleans())
@example(S.STOP_COPY, [read(LIMIT + 1, LIMIT + 9, b"", 0)], False)
@example(S.STOP_COPY, [message(Command.MIG_DATA_READ, bytes(4)), read(100, 108, b"", 0)], True)
def test_both_ways_are_the_same(state: MigrationState, messages: list[bytes], together: bool) -> None:
    with ExitStack() as stack:
        poller = stack.enter_context(closing(Poller()))
        short, general = (
            stack.enter_context(closing(Bench(poller, kind, state))) for kind in (Session, General)
        )
        for data in [b"".join(messages)] if together else messages:
            short.receive(data)
            general.receive(data)
            assert short.sent == general.sent


@pytest.mark.parametrize("kind", [Session, General])
def test_a_descriptor_beside_it_is_closed_and_the_message_refused(kind: type[Session]) -> None:
    with closing(Poller()) as poller, closing(Bench(poller, kind, S.STOP_COPY)) as bench:
        bench.sent, fd = b"", OwnedFd(os.open(os.devnull, os.O_RDONLY))
        bench.receive(read(100, 108, b"", 0), [fd])
        assert bench.sent == codec.pack_error(7, Command.MIG_DATA_READ, errno.EINVAL)
        assert fd.closed


@pytest.mark.parametrize("kind", [Session, General])
def test_what_a_controller_saves_is_nothing_for_the_client(kind: type[Session]) -> None:
    with closing(Poller()) as poller, closing(Bench(poller, kind, S.STOP_COPY)) as bench:
        bench.sent = b""
        bench.host.migration.claim = object()
        bench.receive(read(100, 108, b"", 0))
        assert bench.sent == codec.pack_error(7, Command.MIG_DATA_READ, errno.EBUSY)


@pytest.mark.parametrize("kind", [Session, General])
def test_a_model_that_fails_is_told_once(kind: type[Session], monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Poller()) as poller, closing(Bench(poller, kind, S.STOP_COPY)) as bench:
        bench.sent = b""
        calls: list[int] = []

        def fail(size: int) -> None:
            calls.append(size)
            raise ZeroDivisionError

        monkeypatch.setattr(bench.host.migration._writer, "take", fail)
        bench.receive(read(100, 108, b"", 0))
        assert (bench.sent, calls) == (codec.pack_error(7, Command.MIG_DATA_READ, errno.EIO), [100])


def test_a_plain_read_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Poller()) as poller, closing(Bench(poller, Session, S.STOP_COPY)) as bench:
        monkeypatch.setattr(bench.session.connection, "next_event", lambda: pytest.fail("the general way"))
        monkeypatch.setattr(bench.session, "_handle", lambda event: pytest.fail("the general way"))
        bench.sent = b""
        bench.session.connection.get_buffer(24)[:24] = read(100, 108, b"", 0)
        bench.session.connection.received(24)
        assert bench.session._serve_some()
        assert len(bench.sent) == 24 + 100
