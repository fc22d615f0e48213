# SPDX-License-Identifier: BSD-3-Clause
"""Rounds in the guest: each measures all NICs one after the other, in an order that turns with the rounds."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from vfio_user.benchmarks.guest_bed import BEST, BUILT_IN, DEFAULT, NICS, OURS, PLAIN, Bed, Shape
from vfio_user.benchmarks.network import Nic
from vfio_user.benchmarks.results import Results
from vfio_user.client.background import background
from vfio_user.client.control import ControlClient, open_control

DIRECTIONS: Mapping[str, bool] = {"out": False, "in": True}
SECONDS = 2.0
SHAPES: Mapping[str, Shape] = {
    "ipv6": Shape(ipv6=True),
    "mss": Shape(mss=777),
    "jumbo": Shape(mtu=9000),
}
_PINGS = 50
_REPORT_EVERY = 0.25  # seconds
_PREFIX: Mapping[str, str] = {DEFAULT.key: "default.", OURS.key: "", BEST.key: "best."}
_TCP: Mapping[str, str] = {DEFAULT.key: "default", OURS.key: "tcp", BEST.key: "best"}


def turned(nics: Sequence[Nic], number: int) -> list[Nic]:
    """The NICs in the order of round `number`."""
    start = number % len(nics)
    return [*nics[start:], *nics[:start]]


async def throughput(bed: Bed, number: int, results: Results) -> None:
    """TCP out and in with all four."""
    for direction, incoming in DIRECTIONS.items():
        rates = {nic.key: await bed.iperf(nic, SECONDS, incoming=incoming) for nic in turned(NICS, number)}
        for key, row in _TCP.items():
            results.add(f"{row}.{direction}", rates[key], rates[BUILT_IN.key])


async def logged(bed: Bed, number: int, results: Results) -> None:
    """TCP in with and without the log of dirty pages, reported as a migration does while it copies."""
    async with open_control(bed.control(OURS)) as control:
        rates = {}
        for log in (True, False) if number % 2 else (False, True):
            async with _dirty_log(control) if log else contextlib.nullcontext():
                rates[log] = await bed.iperf(OURS, SECONDS, incoming=True)
    results.add("logged.in", rates[True], rates[False])


@contextlib.asynccontextmanager
async def _dirty_log(control: ControlClient) -> AsyncIterator[None]:
    await control.call("log-start")
    async with background() as nursery:
        nursery.start_soon(_report_again_and_again, control)
        yield
    await control.call("log-stop")


async def _report_again_and_again(control: ControlClient) -> None:
    while True:
        await trio.sleep(_REPORT_EVERY)
        await control.call("log-report", clear=True)


async def latency(bed: Bed, number: int, results: Results) -> None:
    """Ping and one byte to and fro with all four."""
    order = turned(NICS, number)
    pings = {nic.key: await bed.ping(nic, _PINGS) for nic in order}
    trips = {nic.key: await bed.request_response(nic, 1.0) for nic in order}
    for nic in (DEFAULT, OURS, BEST):
        results.add(f"{_PREFIX[nic.key]}ping", pings[nic.key], pings[BUILT_IN.key])
        results.add(f"{_PREFIX[nic.key]}rr", trips[nic.key][0], trips[BUILT_IN.key][0])
    results.add("rr.p99", trips[OURS.key][1], trips[BUILT_IN.key][1])


async def shapes(bed: Bed, number: int, results: Results) -> None:
    """Throughput of IPv6, odd segments and jumbo frames; in the first round their content is checked."""
    if number == 0:
        await _payloads(bed, "plain", PLAIN, results)
    for name, shape in SHAPES.items():
        await _with_mtu(bed, shape.mtu)
        try:
            await _shape(bed, name, shape, number, results)
        finally:
            await _with_mtu(bed, PLAIN.mtu, only_if=shape.mtu)


async def _with_mtu(bed: Bed, mtu: int, only_if: int = 0) -> None:
    if (only_if or mtu) != PLAIN.mtu:
        for nic in NICS:
            await bed.set_mtu(nic, mtu)


async def _shape(bed: Bed, name: str, shape: Shape, number: int, results: Results) -> None:
    if number == 0:
        await _payloads(bed, name, shape, results)
    for direction, incoming in DIRECTIONS.items():
        rates = {
            nic.key: await bed.iperf(nic, SECONDS / 2, incoming=incoming, shape=shape)
            for nic in turned((OURS, BUILT_IN), number)
        }
        results.add(f"{name}.{direction}", rates[OURS.key], rates[BUILT_IN.key])


async def _payloads(bed: Bed, name: str, shape: Shape, results: Results) -> None:
    for nic in (OURS, BEST):
        for direction, incoming in DIRECTIONS.items():
            good = await bed.payload_arrives(nic, incoming=incoming, shape=shape)
            results.payloads[f"{name} {direction}, {nic.key}"] = good


@dataclass(frozen=True, slots=True)
class GuestSuite:
    """A row of `GUEST_SUITES`."""

    text: str
    rounds: int
    quick_rounds: int
    run: Callable[[Bed, int, Results], Awaitable[None]]


GUEST_SUITES: Mapping[str, GuestSuite] = {
    "throughput": GuestSuite("guest TCP", 5, 2, throughput),
    "logged": GuestSuite("guest TCP in with the dirty log", 7, 2, logged),
    "latency": GuestSuite("guest ping and request/response", 5, 2, latency),
    "shapes": GuestSuite("guest IPv6, odd segments, jumbo frames", 2, 1, shapes),
}
