# SPDX-License-Identifier: BSD-3-Clause
"""The control socket of a server with the libvfio-user engine: what it can do, and what it refuses."""

from pathlib import Path

import pytest

from conformance.limits import require_library
from vfio_user.client.control import open_control
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.client.server_process import serving
from vfio_user.protocol.codec import REGION_ACCESS
from vfio_user.protocol.constants import FLAG_NO_REPLY, Command
from vfio_user.protocol.json_rpc import RpcError

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _library() -> None:
    require_library()


async def test_stop_save_load_and_what_the_library_keeps_to_itself(tmp_path: Path) -> None:
    path, file = tmp_path / "c", tmp_path / "f"
    words = ["--engine", "libvfio-user", "--set", "memory=64K", "--control", str(path)]
    async with (
        serving("scratch", tmp_path / "s", words) as server,
        open_control(path) as control,
        open_vmm(server.path, VmmOptions(((0, 1 << 20),))) as vmm,
    ):
        await vmm.write(0, 0, 42)
        state = await control.call("state")
        assert (state["engine"], state["client"]["attached"], state["running"]) == (
            "libvfio-user",
            True,
            True,
        )
        assert (state["memory"]["mapped"], state["dirty_log"]) == (1 << 20, None)
        told = await control.call("configuration")
        addresses = {bar["index"]: bar["address"] for bar in told["bars"]}
        assert addresses == {index: bar.address for index, bar in vmm.bars.items()}
        assert told["intx"] == {"pin": 1, "level": False, "unanswered": None}
        with file.open("wb") as stream:
            assert (await control.call("save", fd=stream.fileno()))["running"]
        assert not (await control.call("stop"))["running"]
        await control.call("blank", on=True)
        assert await vmm.read(0, 0) == 0
        await vmm.write(0, 0, 44)
        await control.call("blank", on=False)
        assert await vmm.read(0, 0) == 42
        await control.call("blank", on=True)
        await control.call("blank", on=False)
        await vmm.write(0, 0, 43)
        with file.open("rb") as stream:
            assert not (await control.call("load", fd=stream.fileno()))["running"]
        assert (await control.call("resume"))["running"]
        assert await vmm.read(0, 0) == 42
        for method, params in (
            ("log-start", {}),
            ("log-stop", {}),
            ("log-report", {}),
            ("log-hand-over", {}),
            ("write-through", {"on": True}),
            ("guest-read", {"address": 0, "length": 4}),
            ("guest-write", {"address": 0, "data": "00"}),
        ):
            with pytest.raises(RpcError, match="the libvfio-user engine"):
                await control.call(method, **params)
        assert await control.call("reset") == {"running": True}
        assert await vmm.read(0, 0) == 0


async def test_a_stop_comes_behind_what_was_posted_before(tmp_path: Path) -> None:
    """`describe` reads in the same step as the stop."""
    path, count, size = tmp_path / "c", 3000, REGION_ACCESS.size + 1
    words = ["--engine", "libvfio-user", "--control", str(path)]
    async with (
        serving("scratch", tmp_path / "s", words) as server,
        open_control(path) as control,
        open_vmm(server.path, VmmOptions(((0, 1 << 20),))) as vmm,
    ):
        # The interrupt line of the configuration space (PCI 3.0, 6.2.4), which `describe` reads.
        head = REGION_ACCESS.pack(0, Command.REGION_WRITE, size, FLAG_NO_REPLY, 0, 0x3C, 7, 1)
        data = [head + bytes((i % 251,)) for i in range(count)]
        vmm.client.link.send_raw((b"".join(data),))
        told = await control.call("stop", wait=20_000, describe=True)
        assert bytes.fromhex(told["configuration"]["space"])[0x3C] == (count - 1) % 251
