# SPDX-License-Identifier: BSD-3-Clause
"""The request for CPUs that wake fast, against a file in place of the kernel's device."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vfio_user.protocol.errors import DeviceError
from vfio_user.server.cpu_latency import NO_LIMIT, CpuLatency


class Later:
    """Timers that a test fires itself."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def __call__(self, _nanoseconds: int, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def pass_time(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "cpu_dma_latency"
    path.touch()
    return path


def asked(device: Path) -> list[int]:
    return [value for (value,) in struct.iter_unpack("=i", device.read_bytes())]


def test_it_asks_once_while_there_is_work_and_withdraws_after_a_quiet_time(device: Path) -> None:
    later = Later()
    latency = CpuLatency(3, later, str(device))
    assert asked(device) == []
    latency.note_work()
    latency.note_work()
    later.pass_time()
    latency.note_work()
    later.pass_time()
    assert latency.held
    assert asked(device) == [3]
    later.pass_time()
    assert asked(device) == [3, NO_LIMIT]
    assert not latency.held
    assert not later.calls
    latency.note_work()
    assert asked(device) == [3, NO_LIMIT, 3]
    latency.close()


def test_a_timer_that_comes_after_the_end_is_harmless(device: Path) -> None:
    later = Later()
    latency = CpuLatency(0, later, str(device))
    latency.note_work()
    latency.close()
    later.pass_time()
    later.pass_time()
    latency.close()
    assert asked(device) == [0]


def test_no_access_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="run as root, or leave --cpu-latency away"):
        CpuLatency(0, Later(), str(tmp_path / "missing"))
