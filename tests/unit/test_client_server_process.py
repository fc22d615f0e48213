# SPDX-License-Identifier: BSD-3-Clause
"""The server as a second process: listening, counting, ending, and every way in which it does not."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from vfio_user.client.errors import RemoteError
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.client.server_process import ServerError, ServerProcess, serving


async def test_counters_of_every_client(tmp_path: Path) -> None:
    async with serving("scratch", tmp_path / "s") as server:
        for number in (1, 2):
            async with open_vmm(server.path, VmmOptions(((0, 0x10000),))) as vmm:
                await vmm.write(0, 0xFF0, 100)
                await vmm.write(0, 0xFF8, 1)
                await vmm.intx.wait()
            left = await server.counters(f"client {number} has left")
            assert left["dma_mapped_write_bytes"] == 100 * number
        assert (await server.ask_counters())["clients_served"] == 2
        assert (await server.ask_counters())["irqs_intx"] == 2
        assert (await server.stop())["clients_served"] == 2
    assert not server.path.exists()


async def test_what_it_holds_and_what_it_complains_of(tmp_path: Path) -> None:
    async with serving("scratch", tmp_path / "s", ["-vv"]) as server:
        alone = server.holdings()
        async with open_vmm(server.path, VmmOptions(((0, 0x10000),))) as vmm:
            assert any("memfd" in name for name in server.holdings().mappings)
            assert server.trouble() == []
            with pytest.raises(RemoteError, match="EINVAL"):
                await vmm.client.region_read(99, 0, 4)
        await server.counters("client 1 has left")
        assert server.holdings() == alone
        (line,) = server.trouble()
        assert "REGION_READ refused" in line


async def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no model 'nonsense'"):
        async with serving("nonsense", tmp_path / "s"):
            pytest.fail("there is no such model")


async def test_a_server_that_is_killed(tmp_path: Path) -> None:
    async with serving("scratch", tmp_path / "s") as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="status -9"):
            await server.stop()


async def test_leaving_the_block_ends_the_server(tmp_path: Path) -> None:
    async with serving("scratch", tmp_path / "s") as server:
        pass
    assert server.popen.returncode == -signal.SIGKILL


async def test_what_is_logged_among_counters_is_no_counter() -> None:
    with subprocess.Popen(["true"]) as popen:  # noqa: ASYNC220  # it ends at once
        server = ServerProcess(popen)
        block = ["hello", "# counters: SIGUSR1", "frames 7", "12:00 WARNING net: gone 3 times", "bytes 9", ""]
        for line in (*block, "bye"):
            server.take_line(line)
    assert await server.counters("SIGUSR1", timeout=0) == {"frames": 7, "bytes": 9}
    assert server.lines == ["hello", "12:00 WARNING net: gone 3 times", "bye"]


async def test_an_environment_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from vfio_user.device_models.scratch import Scratch\n\n\nclass Theirs(Scratch):\n    pass\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    async with serving("theirs:Theirs", tmp_path / "s", environment=environment) as server:
        assert (await server.stop())["clients_served"] == 0
