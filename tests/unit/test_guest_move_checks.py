# SPDX-License-Identifier: BSD-3-Clause
"""What is refused before a guest's move begins: a row for each, on facts that are right but for one thing."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vfio_user.client.qemu_migration.facts import DeviceFacts, Facts, Place, QemuFacts
from vfio_user.client.qemu_migration.preflight import BAD_CAPABILITIES, CHECKS, find_reasons
from vfio_user.client.qemu_migration.request import (
    DeviceRequest,
    Limits,
    Request,
    RequestError,
    Writes,
    check_uri,
    parse_device,
)
from vfio_user.client.qemu_migration.writes import BUDGET_MS, PAGE_MS, Growth, choose, horizon

PLACE = Place("nic", "/machine/q35/pcie.0", "04.0")
QEMU = QemuFacts(
    "running",
    capabilities=dict.fromkeys((*BAD_CAPABILITIES, "pause-before-switchover", "multifd"), False),
    parameters={"mode": "normal"},
    version=(11, 1, 3),
    machine="pc-q35-11.1-machine",
    memory=1 << 28,
    devices=(PLACE,),
)
STATE: dict[str, Any] = {
    "model": "e1000",
    "state_version": 1,
    "engine": "native",
    "client": {"attached": True, "served": 1, "migrates_by": None},
    "running": True,
    "migration": {"state": "RUNNING", "owner": "client", "reason": ""},
    "transfer": None,
    "dirty_log": {"owner": None},
    "write_through": False,
}
CONFIGURATION: dict[str, Any] = {
    "power_on": "8680",
    "bars": [{"index": 0, "size": 0x20000, "io": False, "address": 0xFEB00000}],
    "rom_size": 0,
    "msix": None,
    "msi": None,
}
FRESH = CONFIGURATION | {"bars": [CONFIGURATION["bars"][0] | {"address": 0}]}
"""The destination's: no guest has placed its BARs yet."""
DEVICE = DeviceFacts("nic", STATE, STATE, CONFIGURATION, FRESH)
FACTS = Facts(QEMU, replace(QEMU, status="inmigrate"), (DEVICE,))
REQUEST = Request("/a", "/b", (DeviceRequest("nic", Path("/c"), Path("/d")),), "tcp:h:1")


LISTENS = {"status": "setup", "socket-address": [{"type": "inet", "host": "127.0.0.1", "port": "4444"}]}


def source(**changes: Any) -> Facts:
    return replace(FACTS, source=replace(FACTS.source, **changes))


def destination(**changes: Any) -> Facts:
    return replace(FACTS, destination=replace(FACTS.destination, **changes))


def device(**changes: Any) -> Facts:
    """Of the source's server."""
    return replace(FACTS, devices=(replace(DEVICE, source=STATE | changes),))


def other(**changes: Any) -> Facts:
    """The destination's configuration."""
    return replace(FACTS, devices=(replace(DEVICE, destination_configuration=FRESH | changes),))


def capability(name: str, on: bool = True) -> dict[str, bool]:
    return {**QEMU.capabilities, name: on}


def test_a_guest_that_can_be_moved() -> None:
    assert find_reasons(FACTS, REQUEST) == ()
    assert find_reasons(destination(migration=LISTENS), REQUEST) == ()
    assert find_reasons(source(migration={"status": "cancelled"}), REQUEST) == ()
    assert find_reasons(source(bars={"nic": {0: 0xFEB00000, 1: -1}}), REQUEST) == ()
    moved = CONFIGURATION["bars"][0] | {"address": 0}  # the destination's guest has not placed it yet
    assert find_reasons(other(bars=[moved]), REQUEST) == ()


WRONG = {
    "start this QEMU anew": destination(migration={"status": "setup"}),
    "postmigrate": source(status="postmigrate"),
    "migrates already": source(migration={"status": "active"}),
    "-incoming": destination(status="prelaunch"),
    "start it again": destination(migration={"status": "failed"}),
    "10.1.1 or later": source(version=(10, 1, 0)),
    "the machines differ": destination(machine="pc-i440fx-11.1-machine"),
    "sizes of memory": destination(memory=1 << 29),
    "at one side only": destination(capabilities=capability("multifd")),
    "lacks the capability": source(capabilities={}),
    "mode is cpr-reboot": source(parameters={"mode": "cpr-reboot"}),
    "the destination's QEMU has no vfio-user device 'nic'": destination(devices=()),
    "uses the device of the destination's server already": other(bars=CONFIGURATION["bars"]),
    "at the source, and at 05.0": destination(devices=(replace(PLACE, address="05.0"),)),
    "no --device names": source(devices=(PLACE, Place("", "/machine/q35/pcie.0", "06.0"))),
    "needs no help": device(migration={"state": "PRE_COPY", "owner": "client", "reason": ""}),
    "migration, v2), and needs no help": device(client=STATE["client"] | {"migrates_by": "v2"}),
    "serve with --engine native": device(engine="libvfio-user"),
    "no VMM is connected": device(client={"attached": False, "served": 0}),
    "another device's control socket": source(bars={"nic": {0: 0xFEC00000}}),
    "a save is under way": device(transfer={"method": "save", "bytes": 0}),
    "resume it first": device(migration={"state": "STOP", "owner": "controller"}, running=False),
    "has the dirty log": device(dirty_log={"owner": "client"}),
    "write-through is on": device(write_through=True),
    "cannot be saved": device(migration=STATE["migration"] | {"available": False}),
    "differ: model": device(model="scratch"),
    "differ: version": device(state_version=2),
    "differ: BARs": other(bars=[FRESH["bars"][0] | {"size": 0x40000}]),
    "differ: configuration space": other(power_on="8681"),
    "differ: MSI-X": other(msix={"vectors": 2, "table": {"bar": 0, "offset": 0}}),
    **{f"{name} is on at the source": source(capabilities=capability(name)) for name in BAD_CAPABILITIES},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_refused(words: str) -> None:
    reasons = find_reasons(WRONG[words], REQUEST)
    assert len(reasons) == 1, reasons
    assert words in reasons[0]
    assert "\n" not in reasons[0]


def test_nobody_is_told_to_resume_the_device_of_a_guest_that_was_moved_away() -> None:
    """It would be a second one, with the same MAC."""
    stopped = device(migration={"state": "STOP", "owner": "controller"}, running=False)
    (reason,) = find_reasons(replace(stopped, source=source(status="postmigrate").source), REQUEST)
    assert "has been moved away" in reason
    assert "never continue it" in reason


def test_every_check_has_been_seen_to_fail() -> None:
    for check in CHECKS:
        assert any(list(check.find(facts, REQUEST)) for facts in WRONG.values()), check.text


# The request


@pytest.mark.parametrize(
    ("text", "fits"),
    [("a=/x,/y", True), ("a=/x", False), ("=/x,/y", False), ("a=/x,/y,/z", False), ("a", False)],
)
def test_a_device_on_the_command_line(text: str, fits: bool) -> None:
    if fits:
        assert parse_device(text) == DeviceRequest("a", Path("/x"), Path("/y"))
    else:
        with pytest.raises(RequestError, match="is not ID="):
            parse_device(text)


LONG = "/" + "x" * 106


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "tcp:h:1",
            "tcp:10.9.0.3:65535",
            "tcp:[::1]:4444",
            "tcp:[fe80::1%eth0]:4444",
            "tcp:a-b.example:4444",
        ),
        *("tcp:h:1,ipv4=on", "tcp:h:1,ipv6,keep-alive=on", "unix:/run/a:b,c", f"unix:{LONG}", "unix:here"),
        *("vsock:2:1", "vsock:3:4294967294"),
    ],
)
def test_ways_that_do(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        *((uri, "tcp:HOST:PORT or unix:PATH or vsock:CID:PORT is needed") for uri in ("", ":x", "h:4444")),
        *((uri, "tcp:HOST:PORT is needed") for uri in ("tcp", "tcp:", "tcp:h", "tcp::1", "tcp:h:")),
        *((uri, "tcp:HOST:PORT is needed") for uri in ("tcp:h:x", "tcp:h:1 ", "tcp:h:1,to=9", "tcp:::1:4")),
        *((uri, "a port that cannot be: 1 to 65535") for uri in ("tcp:h:0", "tcp:h:65536", "tcp:h:1234567")),
        *((uri, "vsock:CID:PORT is needed") for uri in ("vsock:3", "vsock:a:1", "vsock:3:1,x")),
        ("vsock:3:0", "a port that cannot be"),
        ("vsock:0:1", "a CID that cannot be"),
        ("vsock:4294967295:1", "a CID that cannot be"),
        ("unix:", "unix:PATH is needed"),
        (f"unix:{LONG}x", "too long: 107 bytes"),
        *((uri, "does not do") for uri in ("file:/x", "fd:3", "defer:x", "exec:cat", "rdma:h:4444")),
        ("TCP:h:1", "is needed"),
    ],
)
def test_ways_that_do_not_do(uri: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_uri(uri)


@pytest.mark.parametrize(
    "limits",
    [
        *({name: value} for name in ("timeout", "stop", "recovery") for value in (0, -1, math.nan, math.inf)),
        *({"downtime": value} for value in (0, -1, 2_000_001)),
    ],
    ids=str,
)
def test_limits_that_are_none(limits: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="must be"):
        Limits(**limits)


Change = Callable[[], Request]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: replace(REQUEST, devices=()), "no device"),
        (lambda: replace(REQUEST, destination_qmp="/a"), "same QEMU"),
        (lambda: replace(REQUEST, destination_qmp="/x/../a"), "same QEMU"),
        (lambda: replace(REQUEST, destination_qmp=""), "no path of a socket"),
        (lambda: replace(REQUEST, source_qmp=LONG + "x"), "no path of a socket"),
        (lambda: replace(REQUEST, source_qmp="h:70000"), "a port from 1 to 65535"),
        (lambda: replace(REQUEST, devices=REQUEST.devices * 2), "nic is named twice"),
        (
            lambda: replace(REQUEST, devices=(DeviceRequest("nic", Path("/c"), Path("/c")),)),
            "control socket /c is named twice",
        ),
    ],
)
def test_requests_that_contradict_themselves(change: Change, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        change()


# Hand-over or write-through


def growth(*pages: int) -> Growth:
    made = Growth()
    for place, count in enumerate(pages):
        made.add(place * 0.1, count)
    return made


AFFORDABLE = int(BUDGET_MS / PAGE_MS)


@pytest.mark.parametrize(
    ("pages", "chosen"),
    [
        ((0, 0, 0, 0), Writes.HAND_OVER),
        ((0, 90, 90, 90), Writes.HAND_OVER),  # the same memory again and again
        ((0, 50, 100, 150), Writes.WRITE_THROUGH),  # 500 pages a second
        ((0, 2 * AFFORDABLE, 2 * AFFORDABLE, 2 * AFFORDABLE), Writes.WRITE_THROUGH),
    ],
)
def test_the_choice_follows_what_the_devices_write(pages: tuple[int, ...], chosen: Writes) -> None:
    assert choose(Writes.AUTO, [growth(*pages), growth(0)], 2.0) is chosen
    for asked in (Writes.HAND_OVER, Writes.WRITE_THROUGH):
        assert choose(asked, [growth(*pages)], 2.0) is asked


def test_how_long_copying_takes_at_least() -> None:
    assert horizon(1 << 30, 1 << 27) == 8
    assert horizon(1 << 20, 0) == 1
    assert horizon(1 << 40, 1 << 20) == 30
