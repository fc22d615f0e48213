# SPDX-License-Identifier: BSD-3-Clause
"""The guest machine, with QEMU's own e1000 in place of a device of ours."""

import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from vfio_user.client.qemu.command import DEFAULT_SLOTS, Chipset, MachineOptions, VfioUserDevice
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import CommandError, Machine, MachineError, open_machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.process import running

GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]


def _with_e1000(chipset: Chipset) -> MachineOptions:
    bus = "pcie.0" if chipset == "q35" else "pci.0"
    device = f"e1000,netdev=n,bus={bus},addr={DEFAULT_SLOTS[chipset][0]:x}"
    return MachineOptions(chipset=chipset, extra=["-netdev", "hubport,id=n,hubid=0", "-device", device])


def _command_of(pid: int) -> str:
    """The command line of a process; empty when there is none."""
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("chipset", ["q35", "i440fx"])
async def test_the_drivers_self_test_runs_on_an_unshared_line(
    guest_machine: GuestMachine, chipset: Chipset
) -> None:
    async with guest_machine(_with_e1000(chipset)) as guest:
        # The driver names the kind of line only when asked for messages about the hardware.
        await guest.check("ethtool -s eth0 msglvl hw on")
        _, report = await guest.run("ethtool -t eth0 offline", timeout=60)
        codes = dict(re.findall(r"^(\w+) test .*\t\s*(\d+)$", report, re.MULTILINE))
        # QEMU's own device fails the first (register 0x28) and the fourth.
        assert codes == {"Register": "40", "Eeprom": "0", "Interrupt": "0", "Loopback": "13", "Link": "0"}
        assert "testing unshared interrupt" in await guest.kernel_log()


async def test_what_can_be_asked_of_a_guest(guest_machine: GuestMachine) -> None:
    """One guest for all of it; the last command is at work when QEMU is killed."""
    async with guest_machine(MachineOptions(files={"etc/motto": b"own\n"})) as guest:
        await awkward_commands(guest)
        await commands_side_by_side(guest)
        await binary_output_arrives_unchanged(guest)
        await a_command_out_of_time_leaves_the_shell_usable(guest)
        await qmp_answers(guest)
        await kill_ends_qemu_itself_and_fails_what_was_running(guest)
    assert not _command_of(guest.pid)
    assert not os.path.lexists(guest.folder)  # noqa: ASYNC240


async def awkward_commands(guest: Machine) -> None:
    assert await guest.run("cat /etc/motto; exit 3") == (3, "own\n")
    awkward = "it's \\ \t $HOME `x` é\n%s" + "y" * 8000
    assert await guest.check(f"cat <<'END'\n{awkward}\nEND") == awkward + "\n"


async def commands_side_by_side(guest: Machine) -> None:
    answers: dict[int, str] = {}

    async def ask(number: int) -> None:
        answers[number] = await guest.check(f"sleep 0.{number % 3}; seq {number} 400")

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(ask, number)
    wanted = {n: "".join(f"{k}\n" for k in range(n, 401)) for n in range(12)}
    assert answers == wanted


async def binary_output_arrives_unchanged(guest: Machine) -> None:
    data = await guest.read_file("/usr/sbin/ethtool")
    assert (await guest.check("sha256sum /usr/sbin/ethtool")).split()[0] == hashlib.sha256(data).hexdigest()


async def a_command_out_of_time_leaves_the_shell_usable(guest: Machine) -> None:
    with pytest.raises(CommandError, match=r"killed after 1 s: sleep 100"):
        await guest.run("sleep 100", timeout=1)
    with pytest.raises(CommandError, match="status 1"):
        await guest.check("false")
    assert await guest.check("echo on") == "on\n"


async def qmp_answers(guest: Machine) -> None:
    async with await trio.open_unix_socket(guest.qmp_path) as qmp:
        greeting = json.loads(await qmp.receive_some(65536))
    assert greeting["QMP"]["version"]["qemu"]["major"] >= 10


async def kill_ends_qemu_itself_and_fails_what_was_running(guest: Machine) -> None:
    assert "qemu-system-x86_64" in _command_of(guest.pid)

    async def outlived() -> None:
        with pytest.raises(MachineError, match="QEMU ended during the command"):
            await guest.run("sleep 100")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outlived)
        await trio.sleep(0.1)
        await guest.kill()
    assert await guest.wait_end() == -signal.SIGKILL


async def test_reboot_power_off_and_what_comes_after(guest_machine: GuestMachine) -> None:
    async with guest_machine(MachineOptions(mapped=False)) as guest:
        await guest.check("touch /gone")
        await guest.reboot()
        assert (await guest.run("test -e /gone")).status == 1
        assert await guest.power_off() == 0
        with pytest.raises(MachineError, match="QEMU has ended"):
            await guest.run("true")


@pytest.mark.root
async def test_qemu_runs_in_the_namespace(guest_machine: GuestMachine, netns: str) -> None:
    async with guest_machine(MachineOptions(netns=netns)) as guest:
        inside = os.stat(f"/run/netns/{netns}").st_ino
        assert os.stat(f"/proc/{guest.pid}/ns/net").st_ino == inside
        assert os.stat("/proc/self/ns/net").st_ino != inside


@pytest.mark.lab
@pytest.mark.parametrize(
    ("chipset", "mapped", "root_port", "place"),
    [("q35", True, False, "00:04.0"), ("q35", False, True, "01:00.0"), ("i440fx", True, False, "00:04.0")],
)
async def test_a_vfio_user_device_of_the_c_library_is_seen(
    guest_machine: GuestMachine,
    libvfio_lab: Lab,
    tmp_path: Path,
    chipset: Chipset,
    mapped: bool,
    root_port: bool,
    place: str,
) -> None:
    path = tmp_path / "gpio"
    server = [str(libvfio_lab.sample("gpio-pci-idio-16")), str(path)]
    device = VfioUserDevice(path, root_port=root_port)
    async with running(server, tmp_path / "log"):
        with trio.fail_after(60):
            while not Namespace("").listens(path):  # noqa: ASYNC110  # it has its name a moment before
                await trio.sleep(0.01)
        async with guest_machine(MachineOptions(chipset, mapped, devices=[device])) as guest:
            assert f"{place} 0000: 494f:0dc8" in await guest.check("lspci -n")


async def test_a_wrong_argument_is_told_with_qemus_own_words(lab: Lab) -> None:
    async with open_machine(lab, MachineOptions(extra=["-device", "no-such-device"])) as guest:
        with pytest.raises(MachineError, match="no-such-device"):
            await guest.wait_boot(timeout=20)


_OWNER = """
import sys, trio
from pathlib import Path
from vfio_user.client.qemu.command import MachineOptions
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import open_machine

async def main():
    async with open_machine(Lab(Path(sys.argv[1])), MachineOptions()) as guest:
        print(guest.pid, guest.folder, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def test_qemu_dies_with_us(lab: Lab) -> None:
    command = [sys.executable, "-c", _OWNER, str(lab.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        qemu = os.pidfd_open(int(pid))
        owner.kill()
    try:
        ended, _, _ = select.select([qemu], [], [], 10)
        assert ended == [qemu]
    finally:
        os.close(qemu)
        shutil.rmtree(folder)
