# SPDX-License-Identifier: BSD-3-Clause
"""Marks, the table and the JSON file."""

import hashlib
import io
import json
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from vfio_user.benchmarks import guest_runs, payload
from vfio_user.benchmarks.engine_runs import FIGURES, LIBRARY, NATIVE
from vfio_user.benchmarks.guest_bed import Bed
from vfio_user.benchmarks.marks import BUILT_IN, MEASURES, UNLOGGED_GUEST, Measure
from vfio_user.benchmarks.protocol_runs import MODES
from vfio_user.benchmarks.report import TABLE_WIDTH, as_json, payload_lines, table_of
from vfio_user.benchmarks.results import Results

MOST = Measure("k", "latency", "µs", "a peer", "most", 1.6, 1.2)
LEAST = Measure("k", "rate", "MB/s", "a peer", "least", 1.5, 3.5)


@pytest.mark.parametrize(
    ("measure", "ratio", "verdict"),
    [
        (MOST, 1.2, "moonshot"),
        (MOST, 1.21, "met"),
        (MOST, 1.6, "met"),
        (MOST, 1.61, "missed"),
        (LEAST, 3.5, "moonshot"),
        (LEAST, 3.49, "met"),
        (LEAST, 1.5, "met"),
        (LEAST, 1.49, "missed"),
        (Measure("k", "t", "u", "p", "least", 1.1), 9.0, "met"),
        (Measure("k", "t", "u", "p"), 9.0, ""),
    ],
)
def test_verdicts_at_the_bounds(measure: Measure, ratio: float, verdict: str) -> None:
    assert measure.verdict(ratio) == verdict


@pytest.mark.parametrize(("more", "verdict"), [(-3.0, "met"), (20.0, "met"), (20.1, "missed")])
def test_a_mark_that_is_a_difference(more: float, verdict: str) -> None:
    measure = Measure("k", "downtime", "ms", "a peer", allowance=20.0)
    assert measure.verdict(9.0, more) == verdict
    assert measure.mark_text() == "≤ +20"


def test_a_moonshot_is_beyond_its_mark() -> None:
    for measure in MEASURES.values():
        assert (measure.mark is None) == (measure.sense == "none"), measure
        if measure.mark is not None and measure.moonshot is not None:
            assert measure.verdict(measure.moonshot) == "moonshot"
            assert measure.verdict(measure.mark) == "met"


def test_every_key_that_the_rounds_build_is_a_measure() -> None:
    protocol = ("read.{}.p50", "wake.{}", "flight.{}", "posted.{}", "bulk64k.{}", "bulk1m.{}", "dma10k.{}")
    keys = [key.format(mode) for key in protocol for mode in MODES]
    keys += [f"{name}.{key}.{mode}" for name in (NATIVE, LIBRARY) for key in FIGURES for mode in MODES]
    assert set(keys) <= set(MEASURES)


class QuietBed:
    """A bed without a guest: whatever is measured is 1."""

    async def iperf(self, *_: object, **__: object) -> float:
        return 1.0

    async def ping(self, *_: object) -> float:
        return 1.0

    async def request_response(self, *_: object) -> tuple[float, float]:
        return 1.0, 1.0

    async def set_mtu(self, *_: object) -> None: ...

    async def payload_arrives(self, *_: object, **__: object) -> bool:
        return True

    def control(self, _: object) -> Path:
        return Path("control")


class QuietControl:
    async def call(self, method: str, **_: object) -> None: ...


@asynccontextmanager
async def quiet_control(_: Path) -> AsyncIterator[QuietControl]:
    yield QuietControl()


async def test_the_rounds_in_the_guest_have_their_measures_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest_runs, "open_control", quiet_control)
    results = Results()
    for suite in guest_runs.GUEST_SUITES.values():
        for number in range(2):
            await suite.run(cast(Bed, QuietBed()), number, results)
    assert results.left_out == []
    ours = {key for key, measure in MEASURES.items() if measure.peer in (BUILT_IN, UNLOGGED_GUEST)}
    assert set(results.figures()) == ours


def _text(results: Results) -> str:
    output = io.StringIO()
    Console(file=output, width=TABLE_WIDTH).print(table_of(results.figures(), "a title"))
    return output.getvalue()


def test_the_table_shows_ratio_mark_and_verdict_under_each_peer() -> None:
    results = Results()
    results.add("tcp.out", 1500.0, 1500.0)
    results.add("read.same.p50", 4.4, 4.0)
    lines = _text(results).splitlines()
    read = next(line for line in lines if "REGION_READ" in line)
    assert [cell.strip() for cell in read.strip("│").split("│")] == [
        "REGION_READ 8 bytes, one CPU, p50 [µs]",
        "4.4",
        "4",
        "1.10",
        "1.10-1.10",
        "≤ 1.6",
        "≤ 1.2",
        "moonshot",
    ]
    tcp = next(line for line in lines if "guest TCP out" in line)
    assert "1,500" in tcp
    assert "missed" in tcp
    assert lines.index(read) < lines.index(tcp)  # the order of the marks, not of the runs
    assert sum("against" in line for line in lines) == 2


def test_json_has_figures_marks_and_what_was_left_out() -> None:
    results = Results(left_out=["latency: no root"], payloads={"plain out, ours": True})
    results.add("flight.same", 5.0, 2.0)
    document = json.loads(json.dumps(as_json(results, {"cpus": 2})))
    figure = document["figures"]["flight.same"]
    assert (figure["ratio"], figure["mark"], figure["verdict"], figure["rounds"]) == (2.5, 2.5, "met", 1)
    assert document["left_out"] == ["latency: no root"]
    assert document["payloads"] == {"plain out, ours": True}
    assert document["machine"] == {"cpus": 2}


def test_a_damaged_payload_is_named() -> None:
    assert list(payload_lines({})) == []
    lines = list(payload_lines({"plain in, ours": True, "mss out, best": False}))
    assert lines == [
        "payload: 1 of 2 transfers with the right SHA-256",
        "payload DAMAGED: mss out, best",
    ]


def test_both_ends_of_a_transfer_see_the_same_bytes() -> None:
    data = bytes(range(256)) * 1000
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=payload.send, args=(ours, data))
        sender.start()
        assert payload.receive(theirs) == hashlib.sha256(data).hexdigest()
        sender.join()
