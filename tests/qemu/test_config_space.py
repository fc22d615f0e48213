# SPDX-License-Identifier: BSD-3-Clause
"""`lspci -vvv` (pciutils) reads our configuration spaces and finds nothing malformed."""

import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from vfio_user.client.client import open_client
from vfio_user.client.qemu.command import MachineOptions, VfioUserDevice
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.server_process import ServerProcess
from vfio_user.protocol.constants import PciRegion

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]
Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]

# What pciutils writes for a chain that is broken or looped, a capability it cannot read or does not know,
# an impossible header.
COMPLAINT = re.compile(
    r"<[^>]*(?:chain|unreadable|denied|\?)[^>]*>|!!!|Capability ID 0x|Capabilities: \[\w+\] #|rev ff"
)
MODELS = {"e1000": "Power Management", "scratch": ""}

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def lspci(lspci_program: str, tmp_path: Path) -> Callable[[bytes], str]:
    """What `lspci -vvv` says of a configuration space."""

    def explain(space: bytes) -> str:
        rows = (f"{at:02x}: {space[at : at + 16].hex(' ')}" for at in range(0, len(space), 16))
        (tmp_path / "dump").write_text("\n".join(["00:04.0 Device", *rows, ""]))
        words = [lspci_program, "-F", str(tmp_path / "dump"), "-vvv"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    return explain


async def space_of(server: ServerProcess) -> bytes:
    async with open_client(server.path) as client:
        size = (await client.get_region_info(PciRegion.CONFIG)).size
        return bytes(await client.region_read(PciRegion.CONFIG, 0, size))


@pytest.mark.parametrize("model", MODELS)
async def test_a_dump_has_no_malformed_capability(
    serve: Serve, lspci: Callable[[bytes], str], model: str
) -> None:
    async with serve(model) as server:
        text = lspci(await space_of(server))
    assert COMPLAINT.findall(text) == []
    assert MODELS[model] in text


async def test_a_malformed_one_would_be_found(serve: Serve, lspci: Callable[[bytes], str]) -> None:
    async with serve("e1000") as server:
        space = bytearray(await space_of(server))
    first = space[0x34]
    space[first + 1] = first
    assert "chain looped" in lspci(bytes(space))
    assert COMPLAINT.search(lspci(bytes(space)))
    space[first : first + 2] = b"\xee\0"
    assert COMPLAINT.search(lspci(bytes(space)))


@pytest.mark.qemu
async def test_the_guest_sees_them_whole(
    guest_machine: GuestMachine, serve: Serve, lspci: Callable[[bytes], str]
) -> None:
    async with serve("e1000", name="e1000") as nic, serve("scratch", name="scratch") as scratch:
        devices = [VfioUserDevice(nic.path), VfioUserDevice(scratch.path)]
        async with guest_machine(MachineOptions(devices=devices)) as guest:
            for place in ("00:04.0", "00:05.0"):
                text = await guest.check(f"lspci -vvv -s {place}")
                assert "Interrupt: pin A routed to IRQ" in text
                assert COMPLAINT.findall(text) == []
                rows = (await guest.check(f"lspci -xxx -s {place}")).splitlines()[1:]
                space = bytes.fromhex("".join(row.partition(": ")[2] for row in rows))
                assert len(space) == 256
                assert COMPLAINT.findall(lspci(space)) == []
