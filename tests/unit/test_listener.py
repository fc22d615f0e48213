# SPDX-License-Identifier: BSD-3-Clause
"""The socket that clients connect to; what `serve` says of bad ones is in tests/conformance."""

import errno
import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from vfio_user.transport.listener import Listener, ListenError, listen_unseen


def test_a_client_can_connect_and_the_file_goes_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with closing(Listener.bind(path)) as listener, socket.socket(socket.AF_UNIX) as client:
        assert listener.accept() is None
        client.connect(os.fspath(path))
        accepted = listener.accept()
        assert accepted is not None
        with accepted:
            assert not accepted.getblocking()
    assert not path.exists()


def test_a_file_that_is_not_ours_any_more_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener.bind(path)
    path.rename(tmp_path / "old")
    with closing(Listener.bind(path)):
        listener.close()
        assert path.exists()
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_served_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(path))
        sock.listen()
        with pytest.raises(ListenError, match="another process"):
            Listener.bind(path)
    Listener.bind(path).close()


def test_a_socket_that_cannot_listen_leaves_no_file_behind(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.touch()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(OSError, match="Too many open files"):
        listen_unseen(tmp_path / "s", fails, lambda _: None)
    assert not os.listdir(tmp_path)


def test_who_sees_the_file_can_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not there before somebody listens, and nothing else is left in the folder."""
    path = tmp_path / "s"
    seen: list[bool] = []
    listen = socket.socket.listen

    def note(sock: socket.socket, backlog: int) -> None:
        seen.append(path.exists())
        listen(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", note)
    with closing(Listener.bind(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        assert os.listdir(tmp_path) == ["s"]
    assert seen == [False]
    assert os.listdir(tmp_path) == []


def test_whoever_was_faster_keeps_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    listen = socket.socket.listen
    with socket.socket(socket.AF_UNIX) as other:

        def be_overtaken(sock: socket.socket, backlog: int) -> None:
            listen(sock, backlog)
            other.bind(os.fspath(path))
            listen(other, backlog)

        monkeypatch.setattr(socket.socket, "listen", be_overtaken)
        with pytest.raises(ListenError, match="another process was faster"):
            Listener.bind(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(path))
        assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("length", [107, 100, 96])
def test_a_path_as_long_as_they_may_be(tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("p" * length)
    with closing(Listener.bind(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        assert os.listdir(".") == ["p" * length]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT, for one, which a test cannot mount everywhere."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "s"
    with closing(Listener.bind(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        assert os.listdir(tmp_path) == ["s"]
    assert os.listdir(tmp_path) == []


def test_the_question_whether_it_is_served_disturbs_no_server(tmp_path: Path) -> None:
    """It is a connection that ends at once, which a server has to bear."""
    path = tmp_path / "s"
    with closing(Listener.bind(path)) as listener:
        with pytest.raises(ListenError):
            Listener.bind(path)
        probe = listener.accept()
        assert probe is not None
        with probe:
            assert probe.recv(1) == b""


def test_sockets_that_somebody_else_made(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fspath(tmp_path / "s"))
        made.listen()
        adopted = Listener.adopt(os.dup(made.fileno()))
        assert isinstance(adopted, Listener)
        adopted.close()
    assert (tmp_path / "s").exists()
    ours, theirs = socket.socketpair()
    with ours:
        connected = Listener.adopt(theirs.detach())
        assert isinstance(connected, socket.socket)
        with connected:
            assert not connected.getblocking()


def test_a_connected_socket_whose_client_has_left_already_is_taken() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    connected = Listener.adopt(theirs.detach())
    assert isinstance(connected, socket.socket)
    connected.close()
