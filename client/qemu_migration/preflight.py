# SPDX-License-Identifier: BSD-3-Clause
"""What must hold before anything is touched: one row for each check. Pure: `Facts` in, reasons out.

What QEMU would find out by itself, late, is here as far as it is cheap to ask.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vfio_user.client.qemu_migration.facts import DeviceFacts, Facts, QemuFacts
from vfio_user.client.qemu_migration.request import Request

OLDEST_QEMU = (10, 1, 1)

BAD_CAPABILITIES: Mapping[str, str] = {
    "postcopy-ram": "the device's server maps the guest's memory, and would find zeros in pages that are "
    "still to come",
    "x-ignore-shared": "memory that servers map is shared memory, which QEMU would not send",
    "release-ram": "QEMU would drop pages that the device still uses",
    "background-snapshot": "it protects pages from the CPUs, but not from a device that maps them",
    "x-colo": "it keeps two guests, and copies the device's writes to none",
    "mapped-ram": "it goes to a file, not to a QEMU that waits",
}
"""Capability -> why a guest with a device that is served outside of QEMU cannot be moved with it."""

EQUAL_CAPABILITIES = ("multifd", "return-path", "validate-uuid", "switchover-ack")
"""QEMU's stream is understood only with the same on both sides."""

_BETWEEN = (None, "none", "completed", "failed", "cancelled")
"""What a QEMU says of migration when none is under way."""

_MOVED = "postmigrate"
"""The run state of a QEMU that has sent all of its guest."""

_Take = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
_SAME: Mapping[str, _Take] = {
    "model": lambda state, configuration: state.get("model"),
    "version of the state": lambda state, configuration: state.get("state_version"),
    "configuration space at power-on": lambda state, configuration: configuration.get("power_on"),
    "BARs": lambda state, configuration: [
        {name: value for name, value in bar.items() if name != "address"}
        for bar in configuration.get("bars", [])
    ],
    "size of the option ROM": lambda state, configuration: configuration.get("rom_size"),
    "MSI-X table": lambda state, configuration: _shape(configuration.get("msix")),
    "number of MSI vectors": lambda state, configuration: _shape(configuration.get("msi")),
}
"""What both servers of a device have to agree on."""


def _shape(capability: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Without what the guest sets."""
    if capability is None:
        return None
    return {name: capability[name] for name in ("vectors", "table", "pba") if name in capability}


# QEMU


def _source_runs(facts: Facts, request: Request) -> Iterator[str]:
    if facts.source.status == _MOVED:
        yield (
            f"the source's guest has been moved away (state {_MOVED!r}): never continue it while "
            "it may run elsewhere"
        )
    elif facts.source.status not in ("running", "paused"):
        yield f"the source's guest is in the state {facts.source.status!r}: it must run, or be paused"


def _nothing_under_way(facts: Facts, request: Request) -> Iterator[str]:
    status = facts.source.migration.get("status")
    if status not in _BETWEEN:
        yield f"the source's QEMU migrates already ({status})"


def _destination_waits(facts: Facts, request: Request) -> Iterator[str]:
    if facts.destination.status != "inmigrate":
        yield (
            f"the destination's QEMU does not wait for a guest (it is in the state "
            f"{facts.destination.status!r}): start it with -incoming defer, or -incoming and a URI, and -S"
        )
    elif (status := facts.destination.migration.get("status")) not in (None, "none", "setup"):
        yield f"the destination's QEMU has begun to receive already ({status}): start it again"


def _destination_listens(facts: Facts, request: Request) -> Iterator[str]:
    """QEMU keeps the state in which a `migrate-incoming` has failed, and takes no other one."""
    migration = facts.destination.migration
    if migration.get("status") == "setup" and not migration.get("socket-address"):
        yield (
            "the destination's QEMU listens at no socket (an earlier migrate-incoming has failed, by a wrong "
            "URI for one): start this QEMU anew"
        )


def _versions(facts: Facts, request: Request) -> Iterator[str]:
    for side, qemu in (("source", facts.source), ("destination", facts.destination)):
        if qemu.version < OLDEST_QEMU:
            yield f"the {side}'s QEMU is {_dotted(qemu.version)}; {_dotted(OLDEST_QEMU)} or later is needed"


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _machines(facts: Facts, request: Request) -> Iterator[str]:
    if facts.source.machine != facts.destination.machine:
        yield f"the machines differ: {facts.source.machine} and {facts.destination.machine}"
    if facts.source.memory != facts.destination.memory:
        yield f"the sizes of memory differ: {facts.source.memory} and {facts.destination.memory} bytes"


def _capabilities(facts: Facts, request: Request) -> Iterator[str]:
    for side, qemu in (("source", facts.source), ("destination", facts.destination)):
        for name, why in BAD_CAPABILITIES.items():
            if qemu.capabilities.get(name):
                yield f"the capability {name} is on at the {side}: {why}"


def _equal_capabilities(facts: Facts, request: Request) -> Iterator[str]:
    for name in EQUAL_CAPABILITIES:
        if facts.source.capabilities.get(name, False) != facts.destination.capabilities.get(name, False):
            yield f"the capability {name} is on at one side only"


def _needed_capabilities(facts: Facts, request: Request) -> Iterator[str]:
    if "pause-before-switchover" not in facts.source.capabilities:
        yield "the source's QEMU lacks the capability pause-before-switchover"


def _mode(facts: Facts, request: Request) -> Iterator[str]:
    for side, qemu in (("source", facts.source), ("destination", facts.destination)):
        if (mode := qemu.parameters.get("mode", "normal")) != "normal":
            yield (
                f"the parameter mode is {mode} at the {side}: such a QEMU hands its memory over, and is no "
                "move of a device; only normal does"
            )


# The guest's devices


def _named_devices(facts: Facts, request: Request) -> Iterator[str]:
    for device in request.devices:
        here, there = facts.source.place(device.id), facts.destination.place(device.id)
        for side, place, qemu in (("source", here, facts.source), ("destination", there, facts.destination)):
            if place is None:
                yield f"the {side}'s QEMU has no vfio-user device {device.id!r} ({_known(qemu)})"
        if here and there and (here.bus, here.address) != (there.bus, there.address):
            yield (
                f"{device.id} is at {here.address} of {here.bus} at the source, and at {there.address} of "
                f"{there.bus} at the destination"
            )


def _known(qemu: QemuFacts) -> str:
    names = [place.id or f"one without id= at {place.address}" for place in qemu.devices]
    return f"it has {', '.join(names) or 'none'}"


def _all_devices(facts: Facts, request: Request) -> Iterator[str]:
    named = {device.id for device in request.devices}
    for side, qemu in (("source", facts.source), ("destination", facts.destination)):
        for place in qemu.devices:
            if place.id not in named:
                name = place.id or f"without id= at {place.address} of {place.bus}"
                yield (
                    f"the {side}'s guest has a vfio-user device {name} that no --device names: QEMU would "
                    "move the guest without it, and say nothing"
                )


# The servers


def _devices(check: Callable[[DeviceFacts], Iterator[str]]) -> "Test":
    def test(facts: Facts, request: Request) -> Iterator[str]:
        for device in facts.devices:
            for reason in check(device):
                yield f"{device.id}: {reason}"

    return test


def _drives_itself(device: DeviceFacts) -> Iterator[str]:
    """At work, or able to: it asked for what the protocol has for it when it took the device."""
    for side, state in _sides(device):
        migration, edition = state["migration"], state["client"].get("migrates_by")
        if migration["owner"] == "client" and migration["state"] != "RUNNING":
            how = f"state {migration['state']}"
        elif edition is not None:
            how = f"it has asked for the protocol's migration, {edition}"
        else:
            continue
        yield f"the {side}'s VMM moves the device itself ({how}), and needs no help: use its own command"


def _sides(device: DeviceFacts) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ("source", device.source), ("destination", device.destination)


def _engine(device: DeviceFacts) -> Iterator[str]:
    for side, state in _sides(device):
        if state["engine"] != "native":
            yield (
                f"the {side}'s server has the engine {state['engine']}, which keeps its dirty log to itself: "
                "serve with --engine native"
            )


def _attached(device: DeviceFacts) -> Iterator[str]:
    for side, state in _sides(device):
        if not state["client"]["attached"]:
            yield f"no VMM is connected to the {side}'s server: is it another device's control socket?"


def _identity(facts: Facts, request: Request) -> Iterator[str]:
    """The source's guest has mapped its BARs: QEMU and server must agree where. At the destination nobody has
    given the device any addresses yet."""
    for device in facts.devices:
        seen = facts.source.bars.get(device.id, {})
        for bar in device.source_configuration.get("bars", ()):
            here, there = bar["address"], seen.get(bar["index"], _UNMAPPED)
            if 0 <= there < _UNMAPPED and here != there:
                yield (
                    f"{device.id}: QEMU has its BAR {bar['index']} at {there:#x}, and the source's server at "
                    f"{here or 0:#x}: is it another device's control socket?"
                )
        if any(bar["address"] for bar in device.destination_configuration.get("bars", ())):
            yield (
                f"{device.id}: a guest uses the device of the destination's server already: is it another "
                "device's control socket, or the source's own?"
            )


_UNMAPPED = (1 << 64) - 1


def _free(facts: Facts, request: Request) -> Iterator[str]:
    for device in facts.devices:
        for side, state in _sides(device):
            reasons = [*_busy(side, state)]
            if side == "destination" or facts.source.status != _MOVED:
                reasons += _stopped(side, state)
            yield from (f"{device.id}: {reason}" for reason in reasons)


def _busy(side: str, state: Mapping[str, Any]) -> Iterator[str]:
    if (transfer := state["transfer"]) is not None:
        yield f"a {transfer['method']} is under way at the {side}"
    if state["dirty_log"]["owner"] is not None:
        yield f"the {state['dirty_log']['owner']} has the dirty log at the {side}"
    if state["write_through"]:
        yield f"write-through is on at the {side} already: another controller is at work"


def _stopped(side: str, state: Mapping[str, Any]) -> Iterator[str]:
    """Not for a guest that was moved away: who resumes its device has two of it, and one of them writes to
    memory that nobody owns."""
    migration = state["migration"]
    held = migration["owner"] == "controller" or (migration["state"] == "RUNNING" and not state["running"])
    if held and state["transfer"] is None:
        yield f"a controller has stopped the device at the {side}: resume it first"


def _same(device: DeviceFacts) -> Iterator[str]:
    for name, take in _SAME.items():
        here = take(device.source, device.source_configuration)
        there = take(device.destination, device.destination_configuration)
        if here != there:
            yield f"the two servers differ: {name}: {_short(here)} and {_short(there)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _saved(device: DeviceFacts) -> Iterator[str]:
    for side, state in _sides(device):
        if state["migration"].get("available") is False:
            yield f"the model {state['model']} cannot be saved and restored ({side})"


Test = Callable[[Facts, Request], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Check:
    """`text`: what must hold, for the docs. `find` gives the reasons why it does not."""

    text: str
    find: Test


CHECKS: tuple[Check, ...] = (
    Check("the source's guest runs, or is paused", _source_runs),
    Check("its QEMU does not migrate already", _nothing_under_way),
    Check("the destination's QEMU waits for a guest and has received nothing yet", _destination_waits),
    Check("if it was given a URI already, it listens there", _destination_listens),
    Check("both QEMUs are 10.1.1 or later", _versions),
    Check("machine type and size of memory are the same", _machines),
    Check("no capability is on that makes QEMU move memory in another way", _capabilities),
    Check("capabilities that shape the stream are the same", _equal_capabilities),
    Check("the source's QEMU can pause before the switch-over", _needed_capabilities),
    Check("the migration mode is `normal`, not one of CPR", _mode),
    Check("each device is in both QEMUs, with the same `id=` at the same address", _named_devices),
    Check("no vfio-user device of the guest is left out", _all_devices),
    Check(
        "no VMM moves its devices itself, nor has asked for the protocol's migration, v1 or v2",
        _devices(_drives_itself),
    ),
    Check("both servers have the native engine", _devices(_engine)),
    Check("both servers have a VMM", _devices(_attached)),
    Check("the control socket is that of the device, by its BARs", _identity),
    Check("no controller has anything under way", _free),
    Check("the model can be saved and restored", _devices(_saved)),
    Check("model, version, BARs, interrupts and configuration space are the same", _devices(_same)),
)


def find_reasons(facts: Facts, request: Request) -> tuple[str, ...]:
    """Why the guest cannot be moved; none when it can."""
    return tuple(reason for check in CHECKS for reason in check.find(facts, request))
