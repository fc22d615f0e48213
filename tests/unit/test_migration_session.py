# SPDX-License-Identifier: BSD-3-Clause
"""Migration in a server's host and session, without a socket: doorbells by eventfd, memory, refused posts."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from vfio_user.device_models.device import Host
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Doorbell
from vfio_user.device_models.registers import Register, RegisterFile
from vfio_user.protocol.constants import MigrationState, MigrationV1State
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.fastpath import HotTables
from vfio_user.server.host import ServerHost
from vfio_user.server.migration import region as region_module
from vfio_user.server.migration.region import DATA_OFFSET, MigrationRegion
from vfio_user.transport.poller import Poller

S = MigrationState


class Counter(PciDevice):
    """Counts how often its doorbell was rung, and copies that count in a task."""

    model = "counter"
    summary = "counts doorbells"
    identity = Identity(vendor_id=0x1234, device_id=0x0007, class_code=0xFF0000)
    state_version = 1

    def __init__(self, host: Host) -> None:
        rows = (Register("BELL", 0), Register("RUNG", 4), Register("SERVED", 8))
        self.registers = RegisterFile(4096, rows, on_write={"BELL": self._ring})
        self.registers.doorbells = (Doorbell(0, 4),)
        super().__init__(host, {0: Bar(self.registers)})

    def _ring(self, _index: int, _value: int) -> None:
        self.registers.cell("RUNG").value += 1
        self.host.start("serve", self._serve)

    async def _serve(self) -> None:
        self.registers.cell("SERVED").value = self.registers.cell("RUNG").value

    def restored(self) -> None:
        super().restored()
        if self.registers.cell("SERVED").value != self.registers.cell("RUNG").value:
            self.host.start("serve", self._serve)

    @property
    def counts(self) -> tuple[int, int]:
        return self.registers.cell("RUNG").value, self.registers.cell("SERVED").value


class Bench:
    def __init__(self) -> None:
        self.poller = Poller()
        self.host = ServerHost(self.poller)
        self.device = Counter(self.host)
        self.host.install(self.device)
        self.device.reset()
        self.host.resume()

    def close(self) -> None:
        self.host.detach()
        self.host.close()
        self.poller.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = len(os.listdir("/proc/self/fd"))
    with closing(Bench()) as bench:
        yield bench
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


# "doorbells are remembered": also those that the guest rang just before it was stopped


def test_a_doorbell_that_was_signalled_before_the_stop_is_saved(bench: Bench) -> None:
    """KVM has signalled it, the guest is paused, and the request to stop is served first."""
    os.eventfd_write(bench.host.ioeventfds.offer(0, 1).fds[0], 1)
    bench.host.migration.set_state(S.STOP_COPY)
    assert bench.device.counts == (1, 0)
    data = b"".join(map(bytes, bench.host.migration.read(1 << 20)))
    with closing(Bench()) as other:
        other.host.migration.set_state(S.RESUMING)
        other.host.migration.write(data)
        other.host.migration.set_state(S.STOP)
        assert other.device.counts == (1, 0)
        other.host.migration.set_state(S.RUNNING)
        other.host.tasks.run_ready()
        assert other.device.counts == (1, 1)


@pytest.mark.parametrize("state", [S.RUNNING_P2P, S.STOP, S.STOP_COPY, S.PRE_COPY_P2P])
def test_a_doorbell_by_eventfd_is_taken_while_the_device_stands_still(
    bench: Bench, state: MigrationState
) -> None:
    fd = bench.host.ioeventfds.offer(0, 1).fds[0]
    bench.host.migration.set_state(state)
    os.eventfd_write(fd, 1)
    bench.poller.poll()
    bench.host.tasks.run_ready()
    assert bench.device.counts == (1, 0)
    bench.host.migration.set_state(S.RUNNING)
    bench.host.tasks.run_ready()
    assert bench.device.counts == (1, 1)


# The migration region


def test_the_hot_loop_leaves_the_migration_region_to_the_session(bench: Bench) -> None:
    """There an error of the client is EINVAL, and no access makes the device run."""
    assert bench.host.migration_index == 9
    assert isinstance(bench.host.regions[9], MigrationRegion)
    tables = HotTables(bench.device.regions, None)
    assert 9 not in tables.readable
    assert 9 not in tables.writable


def test_its_memory_is_made_when_it_is_asked_for_and_goes_with_the_client(bench: Bench) -> None:
    before = len(os.listdir("/proc/self/fd"))
    region = bench.host.migration_region
    region.write(0, bytes([MigrationV1State.SAVING, 0, 0, 0]))
    region.read(8, 8)
    assert len(os.listdir("/proc/self/fd")) == before
    region.read(16, 8)
    assert len(os.listdir("/proc/self/fd")) > before
    first = region.memory
    bench.host.detach()
    assert len(os.listdir("/proc/self/fd")) == before
    assert region.memory is not first


def test_no_memory_for_the_data_area_is_an_error_and_nothing_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(size: int) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    region = bench.host.migration_region
    region.write(0, bytes([MigrationV1State.SAVING, 0, 0, 0]))
    pending = region.read(8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(region_module, "MemfdMemory", fail)
        with pytest.raises(DeviceError) as caught:
            region.read(16, 8)
        assert caught.value.errno == errno.EMFILE
    assert region.read(8, 8) == pending
    region.read(16, 8)
    size = int.from_bytes(region.read(24, 8), "little")
    assert region.read(DATA_OFFSET, 8) == b"vfiouser"
    assert size >= int.from_bytes(pending, "little") > 0
