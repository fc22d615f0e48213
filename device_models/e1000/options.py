# SPDX-License-Identifier: BSD-3-Clause
"""What can be set about an e1000 (`--set NAME=VALUE`)."""

import re
from dataclasses import dataclass

from vfio_user.device_models.device import Option

DEFAULT_MAC = "52:54:00:12:34:56"
LONGEST_INTERVAL = 5000
"""Microseconds; Linux' interrupt test waits 10 ms for an interrupt."""

_MAC = re.compile(r"[0-9a-f]{2}([:-][0-9a-f]{2}){5}", re.IGNORECASE)


def parse_mac(text: str) -> bytes:
    """A station address such as 52:54:00:12:34:56, as 6 bytes."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"{text!r} is not an Ethernet address such as {DEFAULT_MAC}")
    address = bytes.fromhex(text.replace(":", "").replace("-", ""))
    if address[0] & 1 or not any(address):
        raise ValueError(f"{text} is not the address of one station (multicast, or all zero)")
    return address


def parse_interval(text: str) -> int:
    """The least time between interrupts: "guest" is 0, a number of microseconds is given in nanoseconds."""
    if text == "guest":
        return 0
    if not text.isascii() or not text.isdigit() or int(text) > LONGEST_INTERVAL:
        raise ValueError(f'it is "guest" or microseconds from 0 to {LONGEST_INTERVAL}, not {text!r}')
    return int(text) * 1000


@dataclass(frozen=True, slots=True)
class Settings:
    """The parsed options."""

    mac: bytes = parse_mac(DEFAULT_MAC)
    itr: int = 0
    """The least time between interrupts in nanoseconds, whatever the guest asks for."""
    verify: bool = False
    """Verify the checksums of all received frames for which the guest wants it."""
    fcs: bool = False
    """Give received frames their real frame check sequence."""


def _parse_choice(text: str, no: str, yes: str) -> bool:
    if text not in (no, yes):
        raise ValueError(f'it is "{no}" or "{yes}", not {text!r}')
    return text == yes


OPTIONS = (
    Option("mac", parse_mac, DEFAULT_MAC, "station address, as written in the EEPROM"),
    Option(
        "itr",
        parse_interval,
        "guest",
        "least time between interrupts: guest (what its driver asks for), or microseconds as a floor "
        "(a longer one buys throughput with latency)",
    ),
    Option(
        "verify",
        lambda text: _parse_choice(text, "auto", "always"),
        "auto",
        "checksums of received frames: auto (left to the guest while frames queue up) or always",
    ),
    Option(
        "fcs",
        lambda text: _parse_choice(text, "zero", "real"),
        "zero",
        "frame check sequence of received frames where the guest wants it: zero (cheap) or real",
    ),
)
