# SPDX-License-Identifier: BSD-3-Clause
"""The client's drivers against servers that answer nonsense: a clear error, never a wrong migration."""

import struct
from typing import cast

import pytest

from vfio_user.client.client import Client
from vfio_user.client.errors import RemoteError
from vfio_user.client.memory import GuestRam
from vfio_user.client.migration.driver import DeviceLost
from vfio_user.client.migration.pages import PageSet
from vfio_user.client.migration.report import MigrationError
from vfio_user.client.migration.v1 import V1Driver, find_region
from vfio_user.client.migration.v2 import V2Driver, whole_pages
from vfio_user.protocol import messages as m
from vfio_user.protocol.capabilities import Migration, Session
from vfio_user.protocol.constants import Command, DeviceFeature, MigrationFlags, MigrationState
from vfio_user.protocol.values import BitmapRange, Payload, TypeCapability

REGION = m.DeviceGetRegionInfoReply(7, 9, 0x3000, capabilities=(TypeCapability(3, 1),))
SESSION = Session(1, 8, 8, 8192, 100, 4096, Migration(4096, 1 << 20), False)


class Server:
    """What a server answers, in place of a `Client`: its migration region, and its features."""

    def __init__(self) -> None:
        self.session: Session | None = SESSION
        self.registers = {0: 1, 8: 0, 16: 0x1000, 24: 0}
        self.area = bytes(range(256)) * 0x30
        self.written: list[tuple[int, bytes]] = []
        self.refused: dict[int, int] = {}
        """Errno for a value that is written to device_state."""
        self.data = [b""]
        self.bitmap = b""
        self.regions = {9: REGION}
        self.num_regions = 10

    @property
    def client(self) -> Client:
        return cast(Client, self)

    async def get_info(self) -> m.DeviceGetInfoReply:
        return m.DeviceGetInfoReply(3, self.num_regions, 5)

    async def get_region_info(self, index: int) -> m.DeviceGetRegionInfoReply:
        return self.regions.get(index, m.DeviceGetRegionInfoReply(0, index, 0))

    async def region_read(self, region: int, offset: int, count: int) -> bytes:
        assert region == 9
        if offset in self.registers and count in (4, 8):
            return self.registers[offset].to_bytes(count, "little")
        return self.area[offset : offset + count]

    async def region_write(self, region: int, offset: int, data: Payload) -> None:
        value = int.from_bytes(data, "little")
        if not offset and value in self.refused:
            raise RemoteError(Command.REGION_WRITE, self.refused[value])
        self.written.append((offset, bytes(data)))
        if offset in self.registers:
            self.registers[offset] = value

    async def dirty_pages_bitmap(self, wanted: BitmapRange) -> Payload:
        return self.bitmap

    async def mig_data_read(self, size: int) -> Payload:
        return self.data.pop(0)

    async def get_feature(self, feature: DeviceFeature, data: Payload = b"", room: int = 0) -> Payload:
        return struct.pack("<II", self.registers[0], 0)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def v1(server: Server) -> V1Driver:
    return V1Driver(server.client, REGION)


@pytest.fixture
def v2(server: Server) -> V2Driver:
    return V2Driver(server.client, MigrationFlags.STOP_COPY)


# v1


async def test_the_region_is_found_by_its_type(server: Server) -> None:
    assert await find_region(server.client) is REGION
    server.regions = {9: m.DeviceGetRegionInfoReply(7, 9, 0x3000, capabilities=(TypeCapability(3, 2),))}
    assert await find_region(server.client) is None
    server.regions, server.num_regions = {12: REGION}, 13
    assert await find_region(server.client) is REGION


async def test_a_region_without_room_for_the_registers_is_none(server: Server) -> None:
    server.regions = {9: m.DeviceGetRegionInfoReply(7, 9, 32, capabilities=(TypeCapability(3, 1),))}
    assert await find_region(server.client) is None


async def test_a_server_with_very_many_regions_is_not_asked_for_all(server: Server) -> None:
    server.regions, server.num_regions = {}, 1 << 31
    assert await find_region(server.client) is None


@pytest.mark.parametrize("bits", [5, 7, 8, 0xFFFFFFFF])
async def test_a_state_that_is_none(server: Server, v1: V1Driver, bits: int) -> None:
    server.registers[0] = bits
    with pytest.raises(MigrationError, match="is no state"):
        await v1.state()


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 100), (31, 1), (0x3000, 1), (0x2FFF, 2), (0x1000, 1 << 63), ((1 << 64) - 1, 2), (0x1000, 0x2001)],
)
async def test_data_outside_the_region(server: Server, v1: V1Driver, offset: int, size: int) -> None:
    server.registers |= {8: 1, 16: offset, 24: size}
    with pytest.raises(MigrationError, match="leave the region"):
        await v1.read_state()


async def test_pending_but_no_data(server: Server, v1: V1Driver) -> None:
    server.registers |= {8: 10, 24: 0}
    with pytest.raises(MigrationError, match="10 bytes are pending, and data_size is 0"):
        await v1.read_state()


async def test_data_is_read_in_messages_of_the_agreed_size(server: Server, v1: V1Driver) -> None:
    server.registers |= {8: 1, 16: 0x800, 24: 0x2800}
    assert await v1.read_state() == server.area[0x800:0x3000]
    server.registers[8] = 0
    assert await v1.read_state() is None


async def test_a_piece_larger_than_the_area_is_written_in_several_iterations(
    server: Server, v1: V1Driver
) -> None:
    data = bytes(range(250)) * 50
    await v1.write_state(data)
    sizes = [int.from_bytes(value, "little") for offset, value in server.written if offset == 24]
    assert sizes == [0x2000, len(data) - 0x2000]
    assert b"".join(value for offset, value in server.written if offset != 24) == data


@pytest.mark.parametrize("offset", [0, 16, 0x3000, 1 << 40])
async def test_no_place_to_write_data(server: Server, v1: V1Driver, offset: int) -> None:
    server.registers[16] = offset
    with pytest.raises(MigrationError, match="leave the region"):
        await v1.write_state(b"data")
    assert server.written == []


async def test_a_server_that_refuses_the_short_way_back_is_led_the_long_one(
    server: Server, v1: V1Driver
) -> None:
    """v1 specification, the table of transitions: pre-copy leads to stop-and-copy only."""
    server.registers[0] = 3
    refused = server.refused

    class Strict(dict[int, int]):
        def __contains__(self, value: object) -> bool:
            return value == 1 and server.registers[0] == 3

        def __missing__(self, value: int) -> int:
            return 22

    server.refused = Strict(refused)
    await v1.resume()
    assert [int.from_bytes(value, "little") for _, value in server.written] == [2, 1]


async def test_a_device_in_error_is_lost(server: Server, v1: V1Driver) -> None:
    server.registers[0] = 6
    with pytest.raises(DeviceLost, match="only a reset"):
        await v1.resume()


async def test_no_dirty_log_without_the_capability(server: Server, v1: V1Driver) -> None:
    server.session = None
    with pytest.raises(MigrationError, match="capability migration"):
        await v1.start_log(())


async def test_a_bitmap_that_is_too_short(server: Server, v1: V1Driver) -> None:
    with GuestRam() as ram:
        ram.add(0, 64 * 4096)
        v1.ranges = ram.ranges
        server.bitmap = b"\xff" * 7
        with pytest.raises(MigrationError, match="7 bytes, 8 were asked for"):
            await v1.read_log(PageSet(ram.ranges))


# v2


@pytest.mark.parametrize("number", [8, 100, 0xFFFFFFFF])
async def test_a_v2_state_that_is_none(server: Server, v2: V2Driver, number: int) -> None:
    server.registers[0] = number
    with pytest.raises(MigrationError, match="which is none"):
        await v2.state()


async def test_a_v2_device_in_error_is_lost(server: Server, v2: V2Driver) -> None:
    server.registers[0] = MigrationState.ERROR
    with pytest.raises(DeviceLost):
        await v2.resume()


async def test_a_short_read_is_the_last_one(server: Server, v2: V2Driver) -> None:
    server.data = [b"x" * 8192, b"y" * 10, b"never asked for"]
    assert [await v2.read_state() for _ in range(3)] == [b"x" * 8192, b"y" * 10, None]


async def test_an_empty_read_is_the_last_one_too(server: Server, v2: V2Driver) -> None:
    server.data = [b"x" * 8192, b"", b"never asked for"]
    assert [await v2.read_state() for _ in range(2)] == [b"x" * 8192, None]


async def test_more_than_was_asked_for(server: Server, v2: V2Driver) -> None:
    server.data = [b"x" * 8193]
    with pytest.raises(MigrationError, match="8193 bytes in answer to 8192"):
        await v2.read_state()


def test_ranges_to_log_are_whole_pages_and_do_not_overlap() -> None:
    with GuestRam() as ram:
        ram.add_file([(0, 0xA0000), (0xC0000, 0x40000), (1 << 32, 4096), ((1 << 32) + 8192, 4096)])

        def logged(page_size: int) -> list[tuple[int, int]]:
            return [(part.iova, part.length) for part in whole_pages(ram.ranges, page_size)]

        assert logged(4096) == [(part.address, part.size) for part in ram.ranges]
        assert logged(8192) == [(0, 0xA0000), (0xC0000, 0x40000), (1 << 32, 16384)]
        assert logged(1 << 21) == [(0, 1 << 21), (1 << 32, 1 << 21)]
