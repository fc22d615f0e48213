# SPDX-License-Identifier: BSD-3-Clause
"""One guest with four NICs: our e1000 as it comes, tuned, with the best policy, and QEMU's built-in one.

All are in the same guest, so that whatever slows the machine slows all of them.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from vfio_user.benchmarks.network import Nic, namespace_with
from vfio_user.benchmarks.processes import BenchmarkError, compiled, our_server, server_process
from vfio_user.benchmarks.statistics import percentile
from vfio_user.client.qemu.command import MachineOptions, VfioUserDevice
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import Machine, open_machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.process import namespace_words, running

TRUST = "verify=trust"  # the TAP's frames come from this host
BEST_POLICY = ("itr=1000", "rx_itr=2000", TRUST)
DEFAULT, OURS = Nic("default", 1, ()), Nic("ours", 2, (TRUST,), tuned=True)
BEST, BUILT_IN = Nic("best", 3, BEST_POLICY, tuned=True), Nic("built-in", 4, None)
NICS = (DEFAULT, OURS, BEST, BUILT_IN)
_BUILT_IN_SLOT = "7"  # a free one with an interrupt line of its own (client/qemu/command.py)

RR_PORT, PAYLOAD_PORT = 5300, 5400
PAYLOAD_SIZE = 16 << 20
_PAYLOAD = "/payload"
_PROGRAMS = ("ip", "sysctl", "nsenter", "setpriv", "iperf3")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a transfer looks like: the address family, the TCP segment size (0: its own), the MTU."""

    ipv6: bool = False
    mss: int = 0
    mtu: int = 1500


PLAIN = Shape()


@dataclass(frozen=True, slots=True)
class Bed:
    """The booted guest, its NICs' names in it, and the namespace of the other end."""

    guest: Machine
    namespace: Namespace
    names: dict[str, str]
    payload: Path
    digest: str
    folder: Path

    def control(self, nic: Nic) -> Path:
        """The control socket of the NIC's server."""
        return control_path(self.folder, nic)

    def host(self, nic: Nic, ipv6: bool = False) -> str:
        return nic.host6 if ipv6 else nic.host4

    def place(self, nic: Nic) -> None:
        """Put QEMU's threads where they are to be while `nic` is measured; the built-in NIC has all CPUs."""
        cpus = os.sched_getaffinity(0)
        qemu = {min(cpus)} if nic.tuned else cpus
        for thread in Path(f"/proc/{self.guest.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), qemu)

    async def iperf(self, nic: Nic, seconds: float, *, incoming: bool, shape: Shape = PLAIN) -> float:
        """Mbit/s of TCP payload that arrived; `incoming` is towards the guest."""
        self.place(nic)
        words = ["iperf3 -J -i 0 -O 1", f"-t {seconds:g}", f"-c {self.host(nic, shape.ipv6)}"]
        words += ["-R"] if incoming else []
        words += [f"-M {shape.mss}"] if shape.mss else []
        report = json.loads(await self.guest.check(" ".join(words), timeout=seconds + 20))
        return received_rate(report)

    async def ping(self, nic: Nic, count: int) -> float:
        """Median round trip in microseconds; BenchmarkError when a reply is lost."""
        self.place(nic)
        output = await self.guest.check(f"ping -c {count} -i 0.02 {nic.host4}", timeout=count * 0.1 + 10)
        times = ping_times(output)
        if len(times) != count:
            raise BenchmarkError(f"{nic.key}: {count - len(times)} of {count} pings lost")
        return percentile(times, 50)

    async def request_response(self, nic: Nic, seconds: float) -> tuple[float, float]:
        """p50 and p99 of one byte there and one back over TCP, in microseconds."""
        self.place(nic)
        output = await self.guest.check(f"tcp_rr {nic.host4} {RR_PORT} {seconds:g}", timeout=seconds + 20)
        _, p50, p99, _ = map(float, output.split())
        return p50, p99

    async def set_mtu(self, nic: Nic, mtu: int) -> None:
        """On both ends; returns when frames pass again."""
        self.namespace.ip(f"link set {nic.tap} mtu {mtu}")
        await self.guest.check(f"ip link set {self.names[nic.key]} mtu {mtu}")
        await self.wait_link(nic)

    async def wait_link(self, nic: Nic) -> None:
        one = f"ping -c 1 -W 1 {nic.host4} >/dev/null"
        await self.guest.check(f"for i in 1 2 3 4 5 6 7 8 9; do {one} && exit 0; done; exit 1", timeout=30)

    async def payload_arrives(self, nic: Nic, *, incoming: bool, shape: Shape = PLAIN) -> bool:
        """Whether 16 MiB of random bytes arrive with the right SHA-256."""
        host = self.host(nic, shape.ipv6)
        there = f"TCP:[{host}]" if shape.ipv6 else f"TCP:{host}"
        there += f":{PAYLOAD_PORT},retry=50,interval=0.1"
        command = f"socat -u {there} - | sha256sum" if incoming else f"socat -u OPEN:{_PAYLOAD} {there}"
        words = [sys.executable, "-m", "vfio_user.benchmarks.payload", str(PAYLOAD_PORT), str(shape.mss)]
        words += ["send", str(self.payload)] if incoming else ["receive"]
        log = self.payload.with_name(f"payload-{nic.key}-{time.monotonic_ns()}.log")
        async with running(words, log, netns=self.namespace.name) as host_end:
            output = await self.guest.check(command, timeout=60)
            with trio.move_on_after(30):
                await host_end.wait()
            digests = [host_end.log_text().strip(), *(output.split()[:1] if incoming else [])]
        return digests == [self.digest] * len(digests)


def received_rate(report: Any) -> float:
    """Mbit/s that the receiver saw, from the JSON of iperf3. BenchmarkError when the run failed."""
    try:
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e6
    except (KeyError, TypeError, ValueError):
        raise BenchmarkError(f"iperf3: {report.get('error', 'no result')}") from None


def ping_times(output: str) -> list[float]:
    """Round trips in microseconds, from the lines of ping."""
    return [float(text) * 1000 for text in re.findall(r"time=([\d.]+) ms", output)]


@contextlib.asynccontextmanager
async def open_bed(lab: Lab, folder: Path) -> AsyncIterator[Bed]:
    """Servers, guest and the host's ends of all measurements; root is needed. Gone when the block is left."""
    _require(lab)
    program = compiled("tcp_rr", folder, "-static")
    payload = random.Random(1).randbytes(PAYLOAD_SIZE)
    payload_path = folder / "payload"
    payload_path.write_bytes(payload)
    async with contextlib.AsyncExitStack() as stack:
        namespace = stack.enter_context(namespace_with(NICS))
        devices = [_serve(stack, nic, namespace, folder) for nic in NICS if nic.options is not None]
        for name, words in _helpers(program).items():
            await stack.enter_async_context(running(words, folder / f"{name}.log", netns=namespace.name))
        options = MachineOptions(
            memory_mib=384,
            devices=devices,
            netns=namespace.name,
            extra=_built_in_words(BUILT_IN),
            files={"usr/bin/tcp_rr": program, _PAYLOAD.lstrip("/"): payload_path},
        )
        guest = await stack.enter_async_context(open_machine(lab, options))
        await guest.wait_boot()
        bed = Bed(guest, namespace, {}, payload_path, hashlib.sha256(payload).hexdigest(), folder)
        for nic in NICS:
            await _configure(bed, nic)
        yield bed


def _require(lab: Lab) -> None:
    """BenchmarkError or LabError says what is missing and how to get it."""
    if os.geteuid() != 0:
        raise BenchmarkError("network namespaces and TAPs need root: run it as root")
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        raise BenchmarkError(f"no {', '.join(missing)}: apt-get install iproute2 procps util-linux iperf3")
    assert all(path.is_file() for path in (lab.qemu.program, lab.kernel, lab.initrd))


def _serve(stack: contextlib.AsyncExitStack, nic: Nic, namespace: Namespace, folder: Path) -> VfioUserDevice:
    settings = [word for option in (f"mac={nic.mac}", *(nic.options or ())) for word in ("--set", option)]
    latency = ("--cpu-latency", "0") if nic.tuned else ()
    control = ("--control", str(control_path(folder, nic)))
    words = our_server("e1000", "--net", f"tap:{nic.tap}", *control, *latency, *settings)
    process = stack.enter_context(server_process(nic.key, words, folder, namespace_words(namespace.name)))
    process.connect().close()  # it listens
    if nic.tuned:
        os.sched_setaffinity(process.popen.pid, {max(os.sched_getaffinity(0))})
    return VfioUserDevice(process.socket_path, id=nic.key)


def control_path(folder: Path, nic: Nic) -> Path:
    """Where a NIC's server has its control socket."""
    return folder / f"{nic.key}.control"


def _built_in_words(nic: Nic) -> list[str]:
    backend = f"tap,id=n,ifname={nic.tap},script=no,downscript=no"
    return ["-netdev", backend, "-device", f"e1000,netdev=n,bus=pcie.0,addr={_BUILT_IN_SLOT},mac={nic.mac}"]


def _helpers(program: Path) -> dict[str, list[str]]:
    return {"iperf3": ["iperf3", "-s"], "tcp_rr": [str(program), "serve", str(RR_PORT)]}


_CONFIGURE = """
for link in /sys/class/net/*; do
    [ "$(cat $link/address)" = {mac} ] || continue
    name=${{link##*/}}
    echo 0 > /proc/sys/net/ipv6/conf/$name/accept_dad
    ip addr add {v4}/24 dev $name && ip link set $name up && ip addr add {v6}/64 dev $name || exit 1
    echo $name
    exit 0
done
exit 1
"""


async def _configure(bed: Bed, nic: Nic) -> None:
    v4, v6 = nic.addresses(2)
    name = await bed.guest.check(_CONFIGURE.format(mac=nic.mac, v4=v4, v6=v6))
    bed.names[nic.key] = name.strip()
    await bed.wait_link(nic)
