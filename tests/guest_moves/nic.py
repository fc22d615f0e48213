# SPDX-License-Identifier: BSD-3-Clause
"""A guest whose e1000 carries checked transfers and pings while it is moved."""

import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from vfio_user.client.background import background
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.moving import Model, Moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import TRIES, Wire, self_test

HOST, GUEST = "10.9.0.1", "10.9.0.2"
NIC = Model("e1000", "nic", tap=True)
STOP, HOLD = "/tmp/stop", "/tmp/hold"
HELD_WORDS = "threadirqs isolcpus=1 irqaffinity=0 rcupdate.rcu_cpu_stall_timeout=120"
_COMPLAINTS = (
    *("timed out", "timeout", "warning", "call trace", "bug:", "failed", "reset", "is down"),
    *("nobody cared", "disabling irq"),
)
_HARMLESS = ("CPU speed", "mitigation")
HANG = "Detected Tx Unit Hang"
_TOLD = r"^\[ *(\d+\.\d+)\] .*"
_HANG = re.compile(_TOLD + HANG + r"(?:\n.*){1,12}?time_stamp +<(\w+)>(?:\n.*){1,6}?jiffies +<(\w+)>", re.M)
_MOVED = re.compile(_TOLD + r"moved; it stood still (\d+\.\d+) s ago", re.M)
_HZ = 250  # Debian's kernels
_AFTER = 2.0
"""Seconds after the standstill in which a frame that is sent is still the move's affair."""
QUIET = 20
"""Interrupts in a second without traffic: the driver's own few, as it looks after the card every two seconds,
and those of who shares the line. One that is left high has thousands."""


@dataclass(slots=True)
class Transfers:
    """One connection each way, for as long as the block lasts; `rounds` (of a megabyte) once it is over."""

    rounds: list[int] = field(default_factory=list)


@contextlib.asynccontextmanager
async def transferring(moving: Moving, namespace: Namespace, least: int) -> AsyncIterator[Transfers]:
    """Inside the block data flow both ways, and on until there were `least` rounds of each; at the end every
    byte is right, or TrafficError."""
    transfers, stop = Transfers(), trio.Event()
    wire = Wire(moving.guest, namespace, HOST)
    await moving.guest.check(f"rm -f {STOP}")
    async with background() as nursery:
        ended = [trio.Event(), trio.Event()]

        async def run(number: int) -> None:
            way = wire.send_until(stop, least) if number else wire.receive_until(STOP, least)
            transfers.rounds.append(await way)
            ended[number].set()

        for number in (0, 1):
            nursery.start_soon(run, number)
        yield transfers
        stop.set()
        await moving.guest.check(f"touch {STOP}", 60)
        for event in ended:
            await event.wait()


@contextlib.asynccontextmanager
async def intx_held(moving: Moving) -> AsyncIterator[None]:
    """Inside the block the guest does not serve the NIC's interrupt: the pin goes high and stays so.

    The guest needs hold.c, two CPUs and HELD_WORDS: the interrupt's thread waits behind a busy one that goes
    first; all else is on the other CPU.
    """
    guest = moving.guest
    await guest.check("echo -1 > /proc/sys/kernel/sched_rt_runtime_us")
    await guest.check(
        "echo 2 > /proc/irq/$(grep eth0 /proc/interrupts | cut -d : -f 1 | tr -d ' ')/smp_affinity"
    )
    async with open_control(moving.here.controls[NIC.id]) as control:
        with trio.fail_after(120):
            while not await _hold(guest, control):
                await guest.check(f"rm -f {HOLD}")
    try:
        yield
    finally:
        await moving.guest.check(f"rm -f {HOLD}", 60)


async def _hold(guest: Machine, control: ControlClient) -> bool:
    """Whether the pin is high. It is not if the driver was at work, with its interrupts off."""
    await guest.check(f"hold 1 {HOLD}", 60)
    with trio.move_on_after(0.3):
        while not (await control.call("configuration"))["intx"]["level"]:  # noqa: ASYNC110
            await trio.sleep(0.01)
        return True
    return False


def complaints(log: str) -> list[str]:
    """What the guest's kernel does not say when nothing is wrong."""
    lines = [line for line in log.splitlines() if not any(word in line for word in _HARMLESS)]
    found = [line for line in lines if any(word in line.lower() for word in _COMPLAINTS)]
    return found + hangs(log)


async def note_move(guest: Machine, seconds: float) -> None:
    """Writes into the guest's log that it stood still so long ago (its clock did, too)."""
    await guest.check(f"echo 'vfio-user: moved; it stood still {seconds:.3f} s ago' > /dev/kmsg")


def hangs(log: str) -> list[str]:
    """The frames that took more than a second ("Tx Unit Hang") and were on their way in a move, or sent right
    after one. Not those of other times: on a busy machine the last one of a full ring is one, and a card that
    hangs for good is reset after five seconds."""
    moves = [float(at) - float(ago) for at, ago in _MOVED.findall(log)]
    found = []
    for hang in _HANG.finditer(log):
        told, sent, now = float(hang[1]), int(hang[2], 16), int(hang[3], 16)
        begun = told - (now - sent) / _HZ
        if any(begun <= move + _AFTER and move <= told for move in moves):
            found.append(f"{HANG}: sent {begun:.3f}, told {told:.3f}; moves: {moves}")
    return found


async def interrupts_of_a_second(guest: Machine) -> int:
    """Those of the NIC's line."""
    look = "grep eth0 /proc/interrupts"
    before, after = (await guest.check(f"{look}; sleep 1; {look}")).splitlines()
    return _count(after) - _count(before)


def _count(line: str) -> int:
    """The sum over the CPUs."""
    _, *words = line.split()
    return sum(int(word) for word in itertools.takewhile(str.isdigit, words))


async def check_self_test(guest: Machine) -> str:
    """The driver's own test of the card, all five parts; its report. How many tries it took is told."""
    report, tries = await self_test(guest)
    print(f"note: the driver's self-test took {tries} of {TRIES} tries")
    codes = dict(re.findall(r"^(\w+) test .*\t\s*(\d+)$", report, re.MULTILINE))
    assert codes == dict.fromkeys(("Register", "Eeprom", "Interrupt", "Loopback", "Link"), "0"), report
    return report
