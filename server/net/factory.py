# SPDX-License-Identifier: BSD-3-Clause
"""From the text of `--net` to a network backend.

    KIND[:ARGUMENT][,OPTION=VALUE]...        a comma in a value is written twice

    echo,net=192.0.2.0/24,mac=02:00:00:00:00:01
    tap:vnic0,pcap=/tmp/nic.pcap
    stream:/run/passt.socket,drop=0.01,received.delay=5ms,seed=7

A device sees first the capture, then the bad wire, then the backend itself.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from typing import Any

from vfio_user.device_models.backends import NoneBackend
from vfio_user.device_models.echo import DEFAULT_MAC, DEFAULT_NETWORKS, EchoBackend
from vfio_user.device_models.net import CallLater, NetBackend
from vfio_user.device_models.wire_faults import NO_FAULTS, Faults, FaultyBackend
from vfio_user.server.net.errors import BackendError
from vfio_user.server.net.stream import StreamBackend
from vfio_user.transport.poller import Poller

NANOSECONDS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


def parse_probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("out of range")
    return value


def parse_duration(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    if match is None:
        raise ValueError("no duration")
    return int(float(match[1]) * NANOSECONDS[match[2]])


def parse_mac(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise ValueError("no MAC address")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1:
        raise ValueError("a group address")
    return mac


def parse_link(text: str) -> bool:
    return {"up": True, "down": False}[text]


@dataclass(frozen=True, slots=True)
class BackendOption:
    """How the value of an option is read, and how an error says what it has to be."""

    parse: Callable[[str], Any]
    expected: str


_PROBABILITY = BackendOption(parse_probability, "a probability between 0 and 1")
FAULT_OPTIONS = {
    "drop": _PROBABILITY,
    "corrupt": _PROBABILITY,
    "duplicate": _PROBABILITY,
    "reorder": _PROBABILITY,
    "delay": BackendOption(parse_duration, "a time with its unit, such as 200us, 5ms or 1s"),
}
DIRECTIONS = ("sent", "received")
COMMON_OPTIONS = {
    "pcap": BackendOption(str, "a file"),
    "link": BackendOption(parse_link, "up or down"),
    "seed": BackendOption(int, "a whole number"),
    **FAULT_OPTIONS,
    **{f"{direction}.{name}": how for direction in DIRECTIONS for name, how in FAULT_OPTIONS.items()},
}


@dataclass(frozen=True, slots=True)
class NetSpec:
    """A parsed `--net`: options by name, each with all values that were given."""

    kind: str
    argument: str
    options: Mapping[str, list[Any]] = field(default_factory=dict)

    def last(self, name: str, default: Any) -> Any:
        return self.options.get(name, [default])[-1]

    def faults(self, direction: str) -> Faults:
        """Faults of one direction: its own options win over those for both."""
        both = {f.name: self.last(f.name, f.default) for f in fields(Faults)}
        return Faults(**{name: self.last(f"{direction}.{name}", value) for name, value in both.items()})


Opener = Callable[[NetSpec, Poller, CallLater], NetBackend]


@dataclass(frozen=True, slots=True)
class BackendKind:
    """A row of the table of backends."""

    syntax: str
    summary: str
    open: Opener
    options: Mapping[str, BackendOption] = field(default_factory=dict)


def _open_echo(spec: NetSpec, poller: Poller, call_later: CallLater) -> NetBackend:
    return EchoBackend(tuple(spec.options.get("net", DEFAULT_NETWORKS)), spec.last("mac", DEFAULT_MAC))


def _open_none(spec: NetSpec, poller: Poller, call_later: CallLater) -> NetBackend:
    return NoneBackend()


def _open_tap(spec: NetSpec, poller: Poller, call_later: CallLater) -> NetBackend:
    from vfio_user.server.net.tap import TapBackend  # netlink takes 0.2 s to import

    return TapBackend(spec.argument, poller)


def _open_stream(spec: NetSpec, poller: Poller, call_later: CallLater) -> NetBackend:
    return StreamBackend(spec.argument, poller, call_later)


BACKENDS = {
    "echo": BackendKind(
        "echo",
        "answers ARP, ping and UDP echo itself (10.0.2.0/24, fd00:2::/64); needs no privileges",
        _open_echo,
        {
            "net": BackendOption(ip_network, "a network such as 10.0.2.0/24"),
            "mac": BackendOption(parse_mac, "a MAC address of a station, such as 02:00:00:00:00:01"),
        },
    ),
    "tap": BackendKind("tap:NAME", "a TAP device of the kernel; made if it is not there", _open_tap),
    "stream": BackendKind("stream:PATH", "a UNIX socket with QEMU's framing, as passt has it", _open_stream),
    "none": BackendKind("none", "a cable that leads nowhere", _open_none),
}


def parse_spec(text: str) -> NetSpec:
    """Parse `--net`; raises `BackendError`."""
    head, *rest = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    kind, separator, argument = head.partition(":")
    if kind not in BACKENDS:
        raise BackendError(
            f"no network backend {kind!r}; there are: {', '.join(b.syntax for b in BACKENDS.values())}"
        )
    if bool(argument) != (":" in BACKENDS[kind].syntax) or bool(separator) != bool(argument):
        raise BackendError(f"{head}: write it as {BACKENDS[kind].syntax}")
    options = defaultdict(list)
    for part in rest:
        name, value = _parse_option(kind, part)
        options[name].append(value)
    return NetSpec(kind, argument, dict(options))


def _parse_option(kind: str, text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    known = {**BACKENDS[kind].options, **COMMON_OPTIONS}
    if name not in known:
        names = ", ".join(n for n in known if "." not in n)
        raise BackendError(
            f"{kind}: no option {name!r}; there are: {names} (and sent.drop, received.drop, ...)"
        )
    try:
        if not separator or not value:
            raise ValueError("no value")
        return name, known[name].parse(value)
    except (ValueError, KeyError):
        raise BackendError(f"{kind}: {text}: {name} has to be {known[name].expected}") from None


def open_backend(text: str, poller: Poller, call_later: CallLater) -> NetBackend:
    """Open the backend that `text` describes, with its wrappers; to be closed by the caller.

    Raises `BackendError`, one line, and then nothing is left open or made.
    """
    spec = parse_spec(text)
    backend = BACKENDS[spec.kind].open(spec, poller, call_later)
    try:
        return _wrap(backend, spec, call_later)
    except BaseException:
        backend.close()
        raise


def _wrap(backend: NetBackend, spec: NetSpec, call_later: CallLater) -> NetBackend:
    sent, received = map(spec.faults, DIRECTIONS)
    if (sent, received) != (NO_FAULTS, NO_FAULTS):
        backend = FaultyBackend(backend, call_later, sent, received, spec.last("seed", 0))
    if (path := spec.last("pcap", None)) is not None:
        # Here, as dpkt imports all of its protocols: 25 ms of the 350 that a server takes to start.
        from vfio_user.server.net.pcap import CaptureBackend

        backend = CaptureBackend(backend, path, call_later)
    if not spec.last("link", True):
        backend.set_link(False)
    return backend
