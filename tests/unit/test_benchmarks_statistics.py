# SPDX-License-Identifier: BSD-3-Clause
"""From samples to figures, and from the output of tools to samples."""

import math

import pytest

from vfio_user.benchmarks.dma_runs import map_pair
from vfio_user.benchmarks.guest_bed import BEST, BUILT_IN, DEFAULT, NICS, OURS, ping_times, received_rate
from vfio_user.benchmarks.guest_runs import turned
from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.statistics import Figure, Series, percentile
from vfio_user.benchmarks.wire import read_reply_head
from vfio_user.protocol import codec, layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import HEADER_SIZE


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (50, 50), (50.5, 51), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_the_nearest_rank(percent: float, value: int) -> None:
    assert percentile(range(100, 0, -1), percent) == value


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    series = Series()
    # The machine was four times slower in the second round: it drops out of the ratio.
    for ours, theirs in ((2.0, 1.0), (8.0, 4.0), (2.2, 1.0)):
        series.add(ours, theirs)
    figure = series.figure()
    assert figure == Figure(ours=2.2, theirs=1.0, ratio=2.0, low=2.0, high=2.2, rounds=3, more=figure.more)
    assert figure.more == pytest.approx(1.2)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_what_is_no_measurement_is_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no measurement"):
        Series().add(*pair)


def test_results_take_known_measures_only() -> None:
    results = Results()
    results.add("read.same.p50", 3.0, 2.0)
    assert results.figures()["read.same.p50"].ratio == 1.5
    for _ in range(2):
        results.add("no.such.measure", 1.0, 1.0)
    assert list(results.figures()) == ["read.same.p50"]
    assert results.left_out == ["no.such.measure: there is no such measure"]


def test_ping_times_of_busybox() -> None:
    output = (
        "PING 10.99.1.1 (10.99.1.1): 56 data bytes\n"
        "64 bytes from 10.99.1.1: seq=0 ttl=64 time=1.250 ms\n"
        "64 bytes from 10.99.1.1: seq=1 ttl=64 time=0.9 ms\n"
        "2 packets transmitted, 2 packets received, 0% packet loss\n"
        "round-trip min/avg/max = 0.900/1.075/1.250 ms\n"
    )
    assert ping_times(output) == [1250.0, 900.0]


def test_rate_is_what_the_receiver_saw() -> None:
    end = {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 1.5e9}}
    assert received_rate({"end": end}) == 1500.0


def test_a_failed_run_is_told_in_its_own_words() -> None:
    with pytest.raises(BenchmarkError, match="unable to connect"):
        received_rate({"end": {}, "error": "unable to connect to server"})


def test_each_nic_is_first_in_turn() -> None:
    assert [turned(NICS, number)[0] for number in range(4)] == [DEFAULT, OURS, BEST, BUILT_IN]
    assert all(
        sorted(nic.key for nic in turned(NICS, n)) == ["best", "built-in", "default", "ours"]
        for n in range(4)
    )


def test_nics_share_nothing() -> None:
    names = [name for nic in NICS for name in (nic.tap, nic.mac, *nic.addresses(1), *nic.addresses(2))]
    assert len(set(names)) == len(names) == 6 * len(NICS)


def test_the_expected_reply_is_that_of_the_codec() -> None:
    reply = codec.pack_region_read_reply(7, 16, 2, b"12345678")
    assert read_reply_head(7, 16, 2, 8) == reply[: codec.ACCESS_SIZE]


def test_map_and_unmap_name_the_same_region() -> None:
    pair = map_pair(1 << 32, 1 << 20)
    mapped = layouts.parse(m.DmaMapRequest, pair.map_message[HEADER_SIZE:])
    unmapped = layouts.parse(m.DmaUnmapRequest, pair.unmap_message[HEADER_SIZE:])
    assert (mapped.address, mapped.size) == (unmapped.address, unmapped.size) == (1 << 32, 1 << 20)
    for message in (pair.map_message, pair.unmap_message):
        assert codec.unpack_header(message)[2] == len(message)
