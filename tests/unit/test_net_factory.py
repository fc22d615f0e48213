# SPDX-License-Identifier: BSD-3-Clause
"""`--net` as text: what is understood, and what an error says."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import Ether

from vfio_user.device_models.backends import NoneBackend
from vfio_user.device_models.echo import EchoBackend
from vfio_user.device_models.net import Cancellable
from vfio_user.device_models.timers import Timer
from vfio_user.device_models.wire_faults import Faults, FaultyBackend
from vfio_user.server.engines.native import NativeServer
from vfio_user.server.net.errors import BackendError
from vfio_user.server.net.factory import BACKENDS, open_backend, parse_spec
from vfio_user.server.net.pcap import CaptureBackend
from vfio_user.server.net.stream import StreamBackend
from vfio_user.transport.poller import Poller


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


def later(delay: int, callback: Callable[[], None]) -> Cancellable:
    return Timer(delay, callback)


@pytest.mark.parametrize(("text", "kind"), [("echo", EchoBackend), ("none", NoneBackend)])
def test_the_plain_ones(poller: Poller, text: str, kind: type) -> None:
    backend = open_backend(text, poller, later)
    assert type(backend) is kind
    assert backend.link_up
    backend.close()


def test_options_of_echo(poller: Poller) -> None:
    backend = open_backend("echo,net=192.0.2.0/24,net=fd01::/64,mac=02:00:00:00:00:07", poller, later)
    assert isinstance(backend, EchoBackend)
    assert backend.responder.networks == (ip_network("192.0.2.0/24"), ip_network("fd01::/64"))
    ping = (
        Ether(dst="02:00:00:00:00:07", src="52:54:00:12:34:56")
        / IP(src="192.0.2.9", dst="192.0.2.1")
        / ICMP()
    )
    assert backend.responder.answer(bytes(ping)) is not None
    backend.close()


def test_wrappers_stand_in_order(poller: Poller, tmp_path: Path) -> None:
    path = tmp_path / "a,b.pcap"
    text = f"none,drop=0.5,pcap={tmp_path}/a,,b.pcap,received.drop=0.25,delay=1.5ms,link=down,seed=3"
    capture = open_backend(text, poller, later)
    assert isinstance(capture, CaptureBackend)
    assert isinstance(capture.inner, FaultyBackend)
    assert isinstance(capture.inner.inner, NoneBackend)
    assert not any(backend.link_up for backend in (capture, capture.inner, capture.inner.inner))
    spec = parse_spec(text)
    assert spec.faults("sent") == Faults(drop=0.5, delay=1_500_000)
    assert spec.faults("received") == Faults(drop=0.25, delay=1_500_000)
    capture.close()
    assert path.stat().st_size == 24


def test_a_stream(poller: Poller, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "with:colon"))
        listener.listen()
        backend = open_backend(f"stream:{tmp_path}/with:colon", poller, later)
        assert isinstance(backend, StreamBackend)
        backend.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no network backend ''; there are: echo, tap:NAME, stream:PATH, none"),
        ("bridge:br0", "no network backend 'bridge'"),
        ("tap", "write it as tap:NAME"),
        ("tap:", "write it as tap:NAME"),
        ("echo:", "write it as echo"),
        ("none:x", "write it as none"),
        ("stream,pcap=x", "write it as stream:PATH"),
        ("tap:a/b", "not an interface name"),
        ("tap:a b", "not an interface name"),
        ("tap:tap%d", "not an interface name"),
        ("tap:abcdefghijklmnop", "the name is too long; an interface name has at most 15 bytes"),
        ("echo,", "no option ''"),
        ("echo,speed=3", "no option 'speed'; there are: net, mac, pcap, link, seed, drop"),
        ("none,net=10.0.0.0/8", "no option 'net'"),
        ("echo,drop", "drop has to be a probability"),
        ("echo,drop=", "drop has to be a probability"),
        ("echo,drop=1.5", "drop has to be a probability"),
        ("echo,drop=nan", "drop has to be a probability"),
        ("echo,delay=5", "delay has to be a time with its unit"),
        ("echo,sent.delay=-1ms", "sent.delay has to be a time with its unit"),
        ("echo,seed=x", "seed has to be a whole number"),
        ("echo,link=left", "link has to be up or down"),
        ("echo,mac=01:00:00:00:00:00", "mac has to be a MAC address of a station"),
        ("echo,mac=02-00", "mac has to be a MAC address"),
        ("echo,net=10.0.0.1/8", "net has to be a network"),
        ("echo,pcap=", "pcap has to be a file"),
        (
            "echo,pcap=/nowhere/x.pcap",
            "pcap=/nowhere/x.pcap: No such file or directory; make its directory first",
        ),
        ("stream:/nowhere/x", "stream:/nowhere/x: no such socket; start passt"),
    ],
)
def test_errors_are_one_line_that_helps(poller: Poller, text: str, expected: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError) as caught:
        open_backend(text, poller, later)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_capture_that_fails_lets_the_backend_go(poller: Poller, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "wire"))
        listener.listen()
        with pytest.raises(BackendError):
            open_backend(f"stream:{tmp_path}/wire,drop=0.1,pcap={tmp_path}/no/x", poller, later)
        far, _ = listener.accept()
        with far:
            assert far.recv(1) == b""


def test_the_table_describes_each_backend() -> None:
    for name, kind in BACKENDS.items():
        assert kind.syntax.partition(":")[0] == name
        assert kind.summary


def test_the_engine_gives_time_in_the_unit_that_backends_ask_for() -> None:
    with NativeServer() as server:
        before = time.monotonic_ns()
        timer = server.call_later(5_000_000, lambda: None)
        assert before + 5_000_000 <= timer.deadline <= time.monotonic_ns() + 5_000_000
