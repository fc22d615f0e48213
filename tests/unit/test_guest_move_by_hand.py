# SPDX-License-Identifier: BSD-3-Clause
"""What the user of `vfio-user migrate` is told to do, for each end that a move can have."""

from dataclasses import replace
from pathlib import Path

import pytest

from vfio_user.client.qemu_migration.request import DeviceRequest, Request
from vfio_user.client.qemu_migration.standing import DeviceStanding, End, Standing, advise
from vfio_user.client.qemu_migration.whose import Guest

RUNS = DeviceStanding("runs", True, True)
STILL = DeviceStanding("stands still", False, True)
ALONE = DeviceStanding("runs, and no VMM is connected to it", False, False)
SILENT = DeviceStanding("does not answer")
REQUEST = Request("/a.qmp", "/b.qmp", (DeviceRequest("nic", Path("/a"), Path("/b")),), "tcp:h:1")


LOST = "QEMU has left the server of nic: the device is lost to this guest until"


def side(state: str | None, device: DeviceStanding = RUNS, refused: bool = False) -> Standing:
    return Standing("words", state, {"nic": device}, refused)


GONE = side(None, ALONE, refused=True)
UNHEARD = side(None, ALONE)
"""Its monitor is silent, or serves another client."""
HOME = End(REQUEST, side("running"), GONE)
ARRIVED = End(REQUEST, side("postmigrate", STILL), side("running"))


@pytest.mark.parametrize(
    ("end", "guest", "lines"),
    [
        (HOME, Guest.SOURCE, []),
        (replace(HOME, source=side("paused"), was_running=False), Guest.SOURCE, []),
        (replace(HOME, owed=("set x",)), Guest.SOURCE, ["`set x` in the source's monitor (/a.qmp)"]),
        (replace(HOME, source=GONE, owed=("set x",)), Guest.SOURCE, ["only then start the guest anew"]),
        (replace(ARRIVED, owed=("set x",)), Guest.DESTINATION, ["end the source's QEMU"]),
        (replace(HOME, destination=side("inmigrate")), Guest.SOURCE, ["end the destination's QEMU (/b.qmp)"]),
        (replace(HOME, destination=side(None, SILENT)), Guest.SOURCE, ["never continue it: it has a copy"]),
        (replace(HOME, source=side("running", STILL)), Guest.SOURCE, ["ctl /a resume`: nic stands still"]),
        (replace(HOME, source=side("running", SILENT)), Guest.SOURCE, ["look for the server of nic"]),
        (
            replace(HOME, source=side("postmigrate")),
            Guest.SOURCE,
            ["`cont` in the source's monitor"],
        ),
        (replace(HOME, source=side("finish-migrate")), Guest.SOURCE, ["`migrate_cancel` in the source's"]),
        (replace(HOME, source=side("paused")), Guest.SOURCE, ["into the state paused"]),
        (replace(HOME, source=side(None)), Guest.SOURCE, ["reach the source's monitor (/a.qmp)"]),
        (replace(HOME, source=GONE), Guest.SOURCE, ["no process of either QEMU is left, and only then"]),
        (replace(HOME, source=UNHEARD), Guest.SOURCE, [LOST, "reach the source's monitor (/a.qmp)"]),
        (replace(HOME, source=side("running", ALONE)), Guest.SOURCE, [LOST]),
        (replace(HOME, destination=UNHEARD), Guest.SOURCE, ["end the destination's QEMU"]),
        (replace(ARRIVED, source=UNHEARD), Guest.DESTINATION, ["end the source's QEMU (/a.qmp)"]),
        (
            replace(ARRIVED, destination=side("running", ALONE)),
            Guest.DESTINATION,
            ["end the source's QEMU", LOST],
        ),
        (
            replace(ARRIVED, destination=GONE),
            Guest.DESTINATION,
            ["end the source's QEMU", "the destination's QEMU (/b.qmp) has ended"],
        ),
        (
            End(REQUEST, side(None, STILL), side(None)),
            Guest.SOURCE,
            ["end the destination's QEMU", "ctl /a resume", "reach the source's monitor"],
        ),
        (ARRIVED, Guest.DESTINATION, ["end the source's QEMU (/a.qmp); never continue it"]),
        (replace(ARRIVED, source=GONE), Guest.DESTINATION, []),
        (
            replace(ARRIVED, destination=side("running", STILL)),
            Guest.DESTINATION,
            ["end the source's QEMU", "ctl /b resume`: nic stands still"],
        ),
        (
            replace(HOME, source=GONE),
            Guest.NOWHERE,
            ["end the destination's QEMU (/b.qmp)", "the source's QEMU (/a.qmp) has ended, and the guest"],
        ),
        (
            replace(HOME, source=UNHEARD),
            Guest.NOWHERE,
            [
                "end the destination's QEMU (/b.qmp)",
                "Only when it is gone start the guest anew",
                "if it lives, `vfio-user ctl /a resume`",
                "if it lives, reach the source's monitor (/a.qmp)",
            ],
        ),
        (
            End(REQUEST, side(None), side(None), started=True),
            Guest.UNKNOWN,
            [
                "(/b.qmp) was told to start it",
                "two of the guest must never run",
                "then `vfio-user ctl /a resume`",
                "then reach the source's monitor (/a.qmp)",
            ],
        ),
    ],
)
def test_what_is_left_to_the_user(end: End, guest: Guest, lines: list[str]) -> None:
    told = advise(end, guest)
    assert len(told) == len(lines), told
    for said, words in zip(told, lines, strict=True):
        assert words in said
        assert "\n" not in said


def test_a_side_that_is_gone_is_said_to_be() -> None:
    assert str(GONE) == (
        "words, and has left its servers: as far as can be told it has ended; nic runs, and no VMM is "
        "connected to it"
    )
    assert str(UNHEARD) == "words; nic runs, and no VMM is connected to it"
    assert str(side("running")) == "words; nic runs"
