# SPDX-License-Identifier: BSD-3-Clause
"""The downtime beside a device that writes counts only if it wrote."""

import pytest

from vfio_user.benchmarks.downtime_runs import RATE, WRITER, check_rate
from vfio_user.benchmarks.processes import BenchmarkError
from vfio_user.benchmarks.writing_device import PIECE, Writer
from vfio_user.client.qemu_migration.report import DeviceReport, Outcome, Progress, Report, Step
from vfio_user.client.qemu_migration.request import Writes
from vfio_user.device_models.fake_host import FakeHost


def moved(megabytes: int) -> Report:
    """Memory was copied for two seconds."""
    times = ((Step.CHECK, 0.1), (Step.PRECOPY, 0.5), (Step.PRECOPY, 1.0), (Step.STOP, 2.5), (Step.DONE, 2.6))
    return Report(
        Outcome.COMPLETED,
        *("destination", "", ""),
        2.6,
        Writes.WRITE_THROUGH,
        devices=(
            DeviceReport("nic", "e1000", message_bytes=1 << 40),
            DeviceReport(WRITER.id, "writer", message_bytes=megabytes * 1_000_000),
        ),
        samples=tuple(Progress(step, seconds) for step, seconds in times),
    )


def test_a_device_that_is_slower_than_it_was_told_to_be() -> None:
    check_rate(moved(2 * RATE))
    check_rate(moved(181))
    with pytest.raises(BenchmarkError, match="wrote 89 MB/s by message instead of 100"):
        check_rate(moved(178))


@pytest.mark.parametrize("tick", [2_000_000, 2_300_000])
def test_the_writer_writes_as_much_as_it_is_told_to(tick: int) -> None:
    """However late its timer is."""
    host = FakeHost()
    writer = Writer(host, base=0, size=1 << 20)
    writer.config.write(4, b"\x06\x00")
    writer.regions[0].write(0, RATE.to_bytes(4, "little"))
    for _ in range(1_000_000_000 // tick):
        host.now += tick  # and what was due at 2 ms is so now
        host.timers.run_due()
        host.run()
    written = int.from_bytes(writer.regions[0].read(8, 8), "little") * PIECE
    assert written == pytest.approx(RATE * 1_000_000, rel=0.01)
