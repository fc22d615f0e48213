# SPDX-License-Identifier: BSD-3-Clause
"""The native engine turned by hand: accepting, dropping and losing clients, and callbacks that fail."""

import logging
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from vfio_user.device_models.device import Host, OptionError
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol import codec
from vfio_user.protocol.constants import Command, MigrationState
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.engines import native
from vfio_user.server.engines.native import NativeServer, Settings
from vfio_user.server.session import Session
from vfio_user.transport.listener import Listener

VERSION = codec.pack_header(1, Command.VERSION, 20) + bytes(4)
RESET = codec.pack_header(2, Command.DEVICE_RESET, 16)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NativeServer]:
    with NativeServer(Settings(spin_us=0)) as server:
        server.install(Scratch)
        with closing(Listener.bind(tmp_path / "s")) as listener:
            server.listen(listener)
            yield server


@pytest.fixture
def client(tmp_path: Path, server: NativeServer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(tmp_path / "s"))
        yield sock


def turn(server: NativeServer) -> None:
    for _ in range(10):
        server.turn()


def served(server: NativeServer, client: socket.socket) -> bool:
    client.setblocking(False)
    client.sendall(VERSION)
    turn(server)
    try:
        return len(client.recv(100)) == 20
    except BlockingIOError:
        return False


def test_a_client_is_served(server: NativeServer, client: socket.socket) -> None:
    assert served(server, client)
    assert server.clients_served == 1


def test_a_client_that_cannot_be_accepted_waits(
    server: NativeServer, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files: the server rests a while, and tries again."""
    monkeypatch.setattr(native, "ACCEPT_AGAIN", 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        server.turn()
        assert server.clients_served == 0
    assert served(server, client)


def test_it_does_not_try_without_a_rest(
    server: NativeServer, client: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        turn(server)
    assert caplog.text.count("cannot be accepted: Too many open files") == 1
    assert not server.turn(), "nothing to do for the next second"


def test_a_mistake_of_ours_costs_one_client(
    server: NativeServer,
    client: socket.socket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "receive", broken)
        assert not served(server, client)
    assert client.recv(1) == b""
    assert "a mistake" in caplog.text
    with socket.socket(socket.AF_UNIX) as second:
        second.connect(os.fspath(tmp_path / "s"))
        assert served(server, second)


def test_a_failing_listener_for_leaving_clients_is_no_trouble(
    server: NativeServer, client: socket.socket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise BrokenPipeError("nobody reads our output")

    server.client_left = broken
    assert served(server, client)
    client.close()
    turn(server)
    assert "nobody reads" in caplog.text
    with socket.socket(socket.AF_UNIX) as second:
        second.connect(os.fspath(tmp_path / "s"))
        assert served(server, second)
    server.client_left = None


def test_a_backend_callback_that_fails_is_no_trouble(
    server: NativeServer, client: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise LookupError("a backend's mistake")

    event = os.eventfd(1, os.EFD_CLOEXEC)
    try:
        server.poller.register(event, broken)
        server.call_later(0, broken)
        turn(server)
        server.poller.unregister(event)
    finally:
        os.close(event)
    assert caplog.text.count("a backend's mistake") >= 2
    assert served(server, client)


def test_the_device_rests_between_clients(server: NativeServer, client: socket.socket) -> None:
    assert served(server, client)
    client.sendall(RESET)
    turn(server)
    assert server.host.running
    client.close()
    turn(server)
    assert not server.host.running


def test_an_adopted_connection_is_served() -> None:
    ours, theirs = socket.socketpair()
    with ours, NativeServer(Settings(spin_us=0)) as server:
        server.install(Scratch)
        server.adopt(theirs)
        assert served(server, ours)


@pytest.mark.parametrize("place", ["constructor", "reset"])
def test_a_device_that_cannot_be_made(place: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with NativeServer() as server, pytest.raises(DeviceError, match=f"Fault: {place} fails on demand"):
        server.install(lambda host: Faulty(host, fail=place))
    assert "Traceback" in caplog.text


def test_an_unusable_option_of_a_device_stays_what_it_is() -> None:
    def make(_host: Host) -> Scratch:
        raise OptionError("not like this")

    with NativeServer() as server, pytest.raises(OptionError, match="not like this"):
        server.install(make)


@pytest.mark.parametrize("crowded", [False, True])
def test_the_next_piece_of_a_state_is_made_ready_while_the_client_reads(
    server: NativeServer, client: socket.socket, monkeypatch: pytest.MonkeyPatch, crowded: bool
) -> None:
    """Where nobody else wants our CPU: the client may be on it."""
    assert served(server, client)
    migration = server.host.migration
    migration.set_state(MigrationState.STOP_COPY)
    prepared: list[str] = []
    monkeypatch.setattr(migration, "prepare", lambda: prepared.append(migration.state.name))
    looks = iter([True, False])
    monkeypatch.setattr(server._spin, "look_again", lambda _since: next(looks))
    monkeypatch.setattr(server._spin, "crowded", crowded)
    assert server._work()
    assert prepared == ([] if crowded else ["STOP_COPY"])


@pytest.mark.parametrize("pgsize", [0, 1, 2048, 4097, 12288, -4096])
def test_a_page_size_that_cannot_be_offered(pgsize: int) -> None:
    with pytest.raises(ValueError, match=f"pgsize {pgsize} is not a power of two of at least 4096"):
        Settings(pgsize=pgsize)
