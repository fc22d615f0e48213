# SPDX-License-Identifier: BSD-3-Clause
"""What can be set about an e1000 (`--set NAME=VALUE`)."""

import re
from dataclasses import dataclass
from enum import Enum

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


class Verify(Enum):
    """Whose checksums of received frames are verified, where the guest wants it (RXCSUM)."""

    AUTO = "auto"
    """Of few frames; those of a burst are left to the guest."""
    ALWAYS = "always"
    TRUST = "trust"
    """The network vouches for TCP: it is reported as right, unseen. All else is as with AUTO."""


def parse_verify(text: str) -> Verify:
    try:
        return Verify(text)
    except ValueError:
        raise ValueError(f'it is "auto", "always" or "trust", not {text!r}') from None


@dataclass(frozen=True, slots=True)
class Settings:
    """The parsed options."""

    mac: bytes = parse_mac(DEFAULT_MAC)
    itr: int = 0
    """The least time between interrupts in nanoseconds, whatever the guest asks for."""
    rx_itr: int = 0
    """The same for one that only receives, if it is longer."""
    verify: Verify = Verify.AUTO
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
        "for bulk transfers",
    ),
    Option(
        "rx_itr",
        parse_interval,
        "guest",
        "a longer floor for what is only received; it ends where few receive descriptors are left",
    ),
    Option(
        "verify",
        parse_verify,
        "auto",
        "checksums of received frames: auto (left to the guest while frames queue up), always, or trust "
        "(the network vouches for TCP)",
    ),
    Option(
        "fcs",
        lambda text: _parse_choice(text, "zero", "real"),
        "zero",
        "frame check sequence of received frames where the guest wants it: zero (cheap) or real",
    ),
)
