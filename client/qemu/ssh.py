# SPDX-License-Identifier: BSD-3-Clause
"""An sshd of our own in a network namespace, and sockets that `ssh -L` forwards from another one.

    async with open_sshd(lab, second, "10.8.0.2", folder) as server:
        async with forwarded(server, first, {folder / "here": destination.qmp}):
            ... whoever connects to folder / "here" talks to the destination's QMP ...

Keys, configuration and the one user that it knows (root, without a password) are made for it; it sees its own
/etc/passwd, /etc/shadow and /run, nothing else of the machine changes. Needs root.
"""

import contextlib
import shlex
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.process import running
from vfio_user.client.qemu.ssh_programs import KEYGEN, SSH, SSHD

PORT = 2222
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
_SHADOW = "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n"
_CONFIGURATION = """\
ListenAddress {address}:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
PermitRootLogin prohibit-password
AllowStreamLocalForwarding yes
"""
# A mount namespace: what is mounted in it is gone with its last process.
_OWN_FILES = """\
mount --make-rprivate / &&
mount --bind {folder}/passwd /etc/passwd && mount --bind {folder}/shadow /etc/shadow &&
mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec {sshd}"""


@dataclass(frozen=True, slots=True)
class SshServer:
    """A running sshd: where it listens, and the folder with its keys."""

    lab: Lab
    address: str
    folder: Path


@contextlib.asynccontextmanager
async def open_sshd(lab: Lab, namespace: Namespace, address: str, folder: Path) -> AsyncIterator[SshServer]:
    """An sshd at `address` in `namespace`; its files are in `folder`. LabError where the lab has none."""
    _write_files(lab, address, folder)
    # -r: it does not start itself anew for each client, which would be by the machine's own loader.
    sshd = shlex.join([*lab.ssh(SSHD), "-D", "-e", "-r", "-f", str(folder / "configuration")])
    script = _OWN_FILES.format(folder=shlex.quote(str(folder)), sshd=sshd)
    words = ["unshare", "--mount", "--", "sh", "-c", script]
    async with running(words, folder / "sshd.log", netns=namespace.name) as child:
        with trio.fail_after(60):
            while "Server listening" not in child.log_text():
                if child.popen.poll() is not None:
                    raise OSError(f"sshd has ended: {child.log_text()}")
                await trio.sleep(0.01)
        yield SshServer(lab, address, folder)


def _write_files(lab: Lab, address: str, folder: Path) -> None:
    for name in ("host", "user"):
        words = [*lab.ssh(KEYGEN), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    host_key = " ".join((folder / "host.pub").read_text().split()[:2])
    files = {
        "passwd": _PASSWD,
        "shadow": _SHADOW,
        "known": f"[{address}]:{PORT} {host_key}\n",
        "configuration": _CONFIGURATION.format(address=address, port=PORT, folder=folder),
    }
    for name, text in files.items():
        (folder / name).write_text(text)


@contextlib.asynccontextmanager
async def forwarded(
    server: SshServer, namespace: Namespace, sockets: Mapping[Path, Path]
) -> AsyncIterator[None]:
    """Inside the block, `ssh -L` in `namespace` forwards each UNIX socket (key) to one there (value)."""
    words = [*server.lab.ssh(SSH), "-F", "none", "-N", "-p", str(PORT), "-i", str(server.folder / "user")]
    words += ["-o", f"UserKnownHostsFile={server.folder / 'known'}", "-o", "GlobalKnownHostsFile=none"]
    words += ["-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
    for here, there in sockets.items():
        words += ["-L", f"{here}:{there}"]
    words.append(f"root@{server.address}")
    async with running(words, server.folder / "ssh.log", netns=namespace.name) as child:
        with trio.fail_after(60):
            while not all(namespace.listens(path) for path in sockets):
                if child.popen.poll() is not None:
                    raise OSError(f"ssh has ended: {child.log_text()}")
                await trio.sleep(0.01)
        yield
