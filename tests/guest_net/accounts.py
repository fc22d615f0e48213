# SPDX-License-Identifier: BSD-3-Clause
"""What a server has counted of a guest's traffic, and what it proves."""

from collections.abc import Mapping


def check_way(counters: Mapping[str, int], mapped: bool, rounds: int) -> None:
    """All DMA went the way that the guest's memory allows, and no less than so many rounds each way."""
    used, unused = ("mapped", "message") if mapped else ("message", "mapped")
    payload = rounds * 1_000_000
    assert min(counters[f"dma_{used}_read_bytes"], counters[f"dma_{used}_write_bytes"]) > payload
    ways = [f"dma_{way}_{kind}s" for way in (unused, "file") for kind in ("read", "write")]
    assert {name: counters[name] for name in ways} == dict.fromkeys(ways, 0)
