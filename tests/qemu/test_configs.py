# SPDX-License-Identifier: BSD-3-Clause
"""Every file of qemu-configs, started step by step exactly as it says, with the real QEMU."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from vfio_user.client.qemu.command import MachineOptions, MachinePaths
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import Machine, open_machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.process import Child, running
from vfio_user.client.qemu.traffic import GUEST_FILES, REDUCED, Wire
from vfio_user.client.server_process import ServerProcess, started

CONFIGS = Path(__file__).parents[2] / "qemu-configs"

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(600)]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A file with its steps; all of them run in the test's own namespace."""

    path: Path
    lab: Lab
    namespace: Namespace
    folder: Path

    def words(self, step: str, *more: str) -> list[str]:
        return ["env", *self._environment(), "sh", str(self.path), step, *more]

    def _environment(self) -> list[str]:
        chosen = {
            "SOCKET": self.folder / "device.socket",
            "PASST": self.folder / "passt.socket",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "QEMU": self.lab.qemu.program,
            "VFIO_USER_LAB": self.lab.root,
        }
        return [f"{name}={value}" for name, value in chosen.items()]

    def running(self, step: str, *more: str) -> contextlib.AbstractAsyncContextManager[Child]:
        return running(self.words(step, *more), self.folder / f"{step}.log", netns=self.namespace.name)

    def server(self) -> contextlib.AbstractAsyncContextManager[ServerProcess]:
        return started(self.words("server"), netns=self.namespace.name)

    def output(self, step: str) -> str:
        return self.namespace.run(*self.words(step))

    @contextlib.asynccontextmanager
    async def guest(self, files: Mapping[str, bytes] | None = None) -> AsyncIterator[Machine]:
        """The `qemu` step with a second serial port, for our commands, and with files in the guest."""
        options = MachineOptions(netns=self.namespace.name, files=files or {})
        async with open_machine(self.lab, options, self._command) as guest:
            await guest.wait_boot()
            yield guest

    def _command(self, options: MachineOptions, paths: MachinePaths, agent_fd: int) -> Sequence[str]:
        more = ["-chardev", f"socket,id=agent,fd={agent_fd}", "-serial", "chardev:agent"]
        if options.files:
            more += ["-initrd", str(paths.initrd)]
        return self.words("qemu", *more)


@pytest.fixture
def scenario(lab: Lab, namespace: Namespace, socket_folder: Path, request: pytest.FixtureRequest) -> Scenario:
    socket_folder.chmod(0o777)  # for passt, which runs as another user
    return Scenario(CONFIGS / str(request.param), lab, namespace, socket_folder)


async def check(scenario: Scenario, way: str, chipset: str, place: str) -> None:
    """Server, QEMU, what the file says to type in the guest; DMA went `way`; the device is at `place`."""
    async with scenario.server() as server:
        async with scenario.guest() as guest:
            await guest.check(scenario.output("guest"))
            assert re.search(rf"^{place} .*8086:100e", await guest.check("lspci -n"), re.MULTILINE)
            assert chipset in await guest.check("lspci -n -s 00:00.0")
            counters = await server.ask_counters()
            assert counters["net_received_frames"] > 0
            assert await guest.power_off() == 0
        ways = {name for name in ("mapped", "message", "file") if counters[f"dma_{name}_writes"]}
        assert ways == {way}
        await server.stop()
        assert server.trouble() == []


Q35, I440FX = "8086:29c0", "8086:1237"


@pytest.mark.parametrize(
    ("scenario", "way", "chipset", "place"),
    [
        ("mapped-memory.sh", "mapped", Q35, "00:01.0"),
        ("message-memory.sh", "message", Q35, "00:01.0"),
        ("i440fx.sh", "mapped", I440FX, "00:04.0"),
        ("root-port.sh", "mapped", Q35, "01:00.0"),
    ],
    indirect=["scenario"],
)
async def test_on_echo(scenario: Scenario, way: str, chipset: str, place: str) -> None:
    await check(scenario, way, chipset, place)


@pytest.mark.parametrize("scenario", ["tap.sh"], indirect=True)
async def test_on_tap(scenario: Scenario) -> None:
    scenario.output("network")
    await check(scenario, "mapped", Q35, "00:01.0")


@pytest.mark.usefixtures("passt_program")
@pytest.mark.parametrize("scenario", ["passt.sh"], indirect=True)
async def test_on_passt(scenario: Scenario) -> None:
    scenario.namespace.add_uplink("192.0.2.15/24", "192.0.2.1")
    async with scenario.running("network", "--runas", "nobody"):
        with trio.fail_after(60):
            while not scenario.namespace.listens(scenario.folder / "passt.socket"):  # noqa: ASYNC110
                await trio.sleep(0.01)
        async with scenario.server() as server:
            async with scenario.guest(GUEST_FILES) as guest:
                await guest.check(scenario.output("guest"))
                await Wire(guest, scenario.namespace, "10.0.4.1", "127.0.0.1").receive(REDUCED.short_rounds)
            await server.stop()
            assert server.trouble() == []


def test_there_is_a_test_for_every_file() -> None:
    tested = {"guest.sh", "mapped-memory.sh", "message-memory.sh", "i440fx.sh", "root-port.sh"}
    files = {path.name for path in CONFIGS.glob("*.sh")}
    assert files == tested | {"tap.sh", "passt.sh"}
    readme = (CONFIGS / "README.md").read_text()
    assert all(f"({name})" in readme for name in files)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*[!t].sh")))
def test_without_a_step_a_file_explains_itself(name: str) -> None:
    done = subprocess.run(["sh", CONFIGS / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert f"sh {name} server" in done.stdout
