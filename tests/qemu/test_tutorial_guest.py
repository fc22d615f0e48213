# SPDX-License-Identifier: BSD-3-Clause
"""The last part of the tutorial: its device in QEMU, driven by its shell commands in a real guest."""

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from vfio_user.client.qemu.command import MachineOptions, VfioUserDevice, device_words
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.process import running

Step = tuple[str, str, str]
GuestMachine = Callable[[MachineOptions], AbstractAsyncContextManager[Machine]]

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]


async def test_the_tutorials_device_sums_what_the_guest_sums(
    tutorial: list[Step],
    write_step: Callable[[Path, Step], None],
    guest_machine: GuestMachine,
    tmp_path: Path,
) -> None:
    for step in tutorial:
        if "=" in step[1]:
            write_step(tmp_path, step)
    take_small_bites(tmp_path / "my_device.py")
    blocks = {kind: text for _, kind, text in tutorial}  # the last `serve` is that for QEMU
    server = [str(Path(sys.executable).parent / "vfio-user"), *shlex.split(blocks["serve"])[1:]]
    socket = tmp_path / "my.sock"
    script = f'cd "{tmp_path}" && exec "$@"'
    async with running(["sh", "-c", script, "sh", *server], tmp_path / "log"):
        with trio.fail_after(60):
            while not socket.exists():  # noqa: ASYNC110
                await trio.sleep(0.02)
        device = VfioUserDevice(socket)
        async with guest_machine(MachineOptions(devices=[device])) as guest:
            words = (await guest.check(blocks["guest"])).split()
    status, total, wanted = words
    assert status == "0x00000001"
    assert int(total, 16) == int(wanted, 16) != 0
    _is_the_documented_command(blocks["qemu"], device)


def take_small_bites(module: Path) -> None:
    """A sum takes thousands of steps, so that a guest that does not wait for it finds the device busy."""
    whole = module.read_text()
    small = whole.replace("CHUNK = 64 * 1024 ", "CHUNK = 4 ")
    assert small != whole
    module.write_text(small)


def _is_the_documented_command(text: str, device: VfioUserDevice) -> None:
    """What the tutorial types is what we have just started, but for names and the place on the bus."""
    words = shlex.split(text)
    shown = json.loads(words[words.index("-device") + 1])
    ours = json.loads(device_words(MachineOptions(devices=[device]))[1])
    assert shown == {"driver": ours["driver"], "socket": ours["socket"] | {"path": "my.sock"}}
    assert any(word.startswith("memory-backend-memfd,") and "share=on" in word for word in words)
