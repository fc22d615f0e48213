# SPDX-License-Identifier: BSD-3-Clause
"""Real processes of other users at a control socket."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from migration.control_bed import serving
from vfio_user.client.control import open_control

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to be another user"),
]

NOBODY = 65534
# It becomes that user after it has begun: root's Python may not be everybody's to run.
ASK = """
import os, socket, sys
path, user = sys.argv[1], int(sys.argv[2])
with socket.socket(socket.AF_UNIX) as sock:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    try:
        sock.connect(path)
        sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"state"}\\n')
        print(len(sock.recv(1 << 16)) > 0)
    except OSError as error:
        print(type(error).__name__)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Everybody may come in here."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


async def ask(path: Path, user: int) -> str:
    words = [sys.executable, "-c", ASK, str(path), str(user)]
    with trio.fail_after(20):
        done = await trio.run_process(words, capture_stdout=True)
    return done.stdout.decode().strip()


async def test_another_user_is_turned_away(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the file's mode; and, where somebody has changed that, by who it is."""
    async with serving(folder) as served:
        assert await ask(served.control_path, NOBODY) == "PermissionError"
        assert await ask(served.control_path, 0) == "True"
        served.control_path.chmod(0o666)
        assert await ask(served.control_path, NOBODY) in ("False", "ConnectionResetError", "BrokenPipeError")
        assert f"a controller of user {NOBODY} was turned away: only user 0 and root may" in caplog.text
        async with open_control(served.control_path) as control:
            assert (await control.call("state"))["model"] == "scratch"
