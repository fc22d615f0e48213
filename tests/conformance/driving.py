# SPDX-License-Identifier: BSD-3-Clause
"""How a driver uses the scratch and faulty devices, in raw messages."""

import struct
from typing import Any

import trio

from conformance import wire
from conformance.patience import in_time
from conformance.raw import Answer, RawClient

PAGE = 4096
SOURCE, DOORBELL, STATUS = 0xFE0, 0xFF8, 0xFFC
BUSY, DONE, FAILED = 1, 2, 4


async def read_word(raw: RawClient, offset: int, region: int = 0) -> int:
    reply = (await raw.call(wire.REGION_READ, wire.region_read(region, offset, 4))).ok
    return int.from_bytes(reply[16:], "little")


async def write_word(raw: RawClient, offset: int, value: int, region: int = 0) -> None:
    body = wire.region_write(region, offset, value.to_bytes(4, "little"))
    assert (await raw.call(wire.REGION_WRITE, body)).ok


async def post(raw: RawClient, offset: int, data: bytes, region: int = 0) -> None:
    await raw.command(wire.REGION_WRITE, wire.region_write(region, offset, data), flags=wire.NO_REPLY)


async def enable_bus_master(raw: RawClient) -> None:
    body = wire.region_write(wire.CONFIG, wire.COMMAND_REGISTER, wire.BUS_MASTER)
    assert (await raw.call(wire.REGION_WRITE, body)).ok


CAPABILITIES, MSI, MSIX = 0x34, 0x05, 0x11
_ENABLE = {wire.MSI: (MSI, 0x0001), wire.MSIX: (MSIX, 0x8000)}


async def switch_interrupts(raw: RawClient, index: int, on: bool) -> None:
    """Do to the configuration space what a driver does when it begins or ends to use MSI or MSI-X."""
    wanted, bit = _ENABLE[index]
    place = await _config_read(raw, CAPABILITIES, 1)
    while await _config_read(raw, place, 1) != wanted:
        place = await _config_read(raw, place + 1, 1)
    control = await _config_read(raw, place + 2, 2)
    value = (control & ~bit | bit * on).to_bytes(2, "little")
    assert (await raw.call(wire.REGION_WRITE, wire.region_write(wire.CONFIG, place + 2, value))).ok


async def _config_read(raw: RawClient, offset: int, count: int) -> int:
    reply = (await raw.call(wire.REGION_READ, wire.region_read(wire.CONFIG, offset, count))).ok
    return int.from_bytes(reply[16:], "little")


async def map_private(raw: RawClient, address: int, size: int, flags: int = 3) -> None:
    """Memory without a descriptor: DMA goes by message."""
    assert (await raw.call(wire.DMA_MAP, wire.dma_map(address, size, 0, flags))).ok == b""


async def start_copy(raw: RawClient, source: int, destination: int, length: int) -> None:
    """Ring the doorbell of the scratch device, posted, as QEMU writes to a BAR."""
    await post(raw, STATUS, struct.pack("<I", DONE | FAILED))
    await post(raw, SOURCE, struct.pack("<QQI", source, destination, length))
    await post(raw, DOORBELL, bytes(4))


async def finished(raw: RawClient) -> int:
    """The status register once the device is no longer busy."""
    with in_time():
        while (status := await read_word(raw, STATUS)) & BUSY:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)
    return status


def dma_fields(request: Answer) -> tuple[int, int, bytes]:
    """Address, count and data of DMA_READ or DMA_WRITE."""
    assert request.flags == 0
    address, count = struct.unpack_from("=QQ", request.body)
    return address, count, request.body[16:]


async def serve_dma(raw: RawClient, memory: bytearray, count: int) -> list[Answer]:
    """Answer `count` requests of the server as they come: memory that starts at address 0."""
    requests = []
    for _ in range(count):
        request = await raw.receive()
        requests.append(request)
        await answer_dma(raw, request, memory)
    return requests


async def answer_dma(raw: RawClient, request: Answer, memory: bytearray) -> None:
    address, count, data = dma_fields(request)
    if request.command == wire.DMA_READ:
        await raw.answer(request, wire.dma_read_reply(address, bytes(memory[address : address + count])))
    else:
        assert (request.command, len(data)) == (wire.DMA_WRITE, count)
        memory[address : address + count] = data
        await raw.answer(request, wire.dma_write_reply(address, count))


async def prepare_private(raw: RawClient, size: int = 16 * PAGE, **capabilities: Any) -> None:
    """Negotiate, map memory by message at address 0, switch the bus master on."""
    await raw.negotiate(capabilities)
    await map_private(raw, 0, size)
    await enable_bus_master(raw)
