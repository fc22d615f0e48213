# SPDX-License-Identifier: BSD-3-Clause
"""A guest with two devices is moved between two hosts (namespaces) by `vfio-user migrate`, and back.

QEMU's stream goes over TCP; the other host's sockets are reached through `ssh -L`, and nothing else is.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from guest_moves.counts import MOVES, SOAK
from guest_moves.guest_programs import begin_scribbling, check_scribbling, scribble_options
from guest_moves.nic import GUEST, HOST, NIC, complaints, note_move, transferring
from guest_moves.pinger import pinging
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import BRIDGE, Model, Moving, Side, open_moving, two_hosts
from vfio_user.client.qemu.namespace import Namespace, open_namespace
from vfio_user.client.qemu.process import running
from vfio_user.client.qemu.ssh import SshServer, forwarded, open_sshd
from vfio_user.client.qemu.traffic import GUEST_FILES, bring_up

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(600)]

OTHER_HOST = "10.9.0.3"
PORT = 4444
RATE = 10


@pytest.fixture
def other(namespace: Namespace) -> Iterator[Namespace]:
    """The second host."""
    with open_namespace(f"{namespace.name}-b") as opened:
        yield opened


async def test_two_devices_between_two_hosts(
    ssh_lab: Lab,
    namespace: Namespace,
    other: Namespace,
    scribble: Path,
    scribbler: Model,
    socket_folder: Path,
) -> None:
    places = two_hosts(namespace, other, f"{HOST}/24")
    other.ip(f"address add {OTHER_HOST}/24 dev {BRIDGE}")
    options = scribble_options(scribble, GUEST_FILES)
    async with (
        open_moving(ssh_lab, options, [NIC, scribbler], places) as moving,
        open_sshd(ssh_lab, other, OTHER_HOST, socket_folder) as server,
    ):
        await bring_up(moving.guest, f"{GUEST}/24")
        await moving.guest.check("dmesg -c")
        async with pinging(namespace, GUEST) as pinger, transferring(moving, namespace, 3) as transfers:
            for number in range(MOVES if SOAK else 2):
                await begin_scribbling(moving.guest, RATE)
                await move_by_command(moving, server, namespace, socket_folder / f"{number}")
                await pinger.next_answer()
                found = await check_scribbling(moving.guest)
                assert (found["stale"], found["lost"]) == (0, 0)
        assert min(transfers.rounds) > 2
        assert complaints(await moving.guest.kernel_log()) == []


async def move_by_command(moving: Moving, server: SshServer, here: Namespace, folder: Path) -> None:
    """The command runs on the first host, whichever way the guest goes."""
    folder.mkdir()  # noqa: ASYNC240
    source, destination = moving.here, await moving.prepare()
    away = destination if source.place.namespace is here else source
    sockets = {folder / "qmp": away.qmp} | {folder / id: path for id, path in away.controls.items()}
    reached = {path: near for near, path in sockets.items()}
    host = OTHER_HOST if away is destination else HOST
    report = folder / "report.json"
    words = [sys.executable, "-c", "from vfio_user.cli.main import main; main()", "migrate"]
    words += [f"tcp:{host}:{PORT}", "--report", str(report), *_sockets(source, destination, reached)]
    async with forwarded(server, here, sockets), running(words, folder / "log", netns=here.name) as child:
        assert await child.wait() == 0, child.log_text()
    told = json.loads(report.read_text())
    assert (told["outcome"], told["guest"], told["notes"]) == ("completed", "destination", [])
    assert [device["id"] for device in told["devices"]] == list(source.controls)
    await moving.moved(destination)
    await note_move(moving.guest, 2.0)  # announcements and all


def _sockets(source: Side, destination: Side, reached: Mapping[Path, Path]) -> list[str]:
    def near(path: Path) -> str:
        return str(reached.get(path, path))

    words = ["--source-qmp", near(source.qmp), "--destination-qmp", near(destination.qmp)]
    for id, path in source.controls.items():
        words += ["--device", f"{id}={near(path)},{near(destination.controls[id])}"]
    return words
