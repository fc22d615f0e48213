# SPDX-License-Identifier: BSD-3-Clause
"""A VLAN between two cards of one guest, each end in a network namespace of its own.

Only the guest's kernel has to know VLANs: a bridge takes their frames from TAP to TAP as they are.
"""

import hashlib
from collections.abc import Sequence

from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import BLOB, BLOB_PATH, Counts

VLAN = 5
ENDS = ("10.9.5.1", "10.9.5.2")
FEATURES = ("tx-vlan-offload", "rx-vlan-offload", "rx-vlan-filter")


async def add_vlan(guest: Machine, interface: str, name: str, tag: int) -> None:
    """The driver leaves tags to the card: it inserts, strips and filters them."""
    await guest.check(f"modprobe 8021q && ip link add link {interface} name {name} type vlan id {tag}")
    features = await guest.check(f"ethtool -k {interface}")
    assert [name for name in FEATURES if f"{name}: on" not in features] == []


async def check_vlan(guest: Machine, namespace: Namespace, interfaces: Sequence[str], counts: Counts) -> None:
    """Pings, and a transfer each way, through the cards `interfaces`, whose TAPs are t0 and t1."""
    namespace.ip("link add bridge0 type bridge")
    namespace.sysctl("net.ipv6.conf.bridge0.disable_ipv6", 1)
    namespace.ip("link set bridge0 up")
    for number in (0, 1):
        namespace.ip(f"link set t{number} master bridge0")
    elsewhere = await _new_namespace(guest)
    ends = ("", f"nsenter -t {elsewhere} -n")
    for number, interface in enumerate(interfaces):
        await add_vlan(guest, interface, f"v{number}", VLAN)
    await guest.check(f"ip link set v1 netns {elsewhere}")
    for number, (end, address) in enumerate(zip(ends, ENDS, strict=True)):
        await guest.check(f"{end} ip address add {address}/24 dev v{number}")
        await guest.check(f"{end} ip link set v{number} up")
    for end, peer in zip(ends, reversed(ENDS), strict=True):
        await guest.check(f"{end} ping -q -c 1 -w 30 {peer}", 40)  # the bridge begins in its own time
        told = await guest.check(f"{end} ping -q -c {counts.pings} -i 0.01 {peer}", 60)
        assert f"{counts.pings} packets transmitted, {counts.pings} packets received" in told
    for receiver, sender, address in zip(ends, reversed(ends), ENDS, strict=True):
        take = f"{receiver} socat -u TCP-LISTEN:5000 - | sha256sum"
        give = f"{sender} socat -u OPEN:/{BLOB_PATH} TCP:{address}:5000,retry=100,interval=0.1"
        told = await guest.check(f"({give}) & {take}; wait", 120)
        assert told.split()[0] == hashlib.sha256(BLOB).hexdigest()


async def _new_namespace(guest: Machine) -> str:
    """The number of a process of the guest that has a network of its own."""
    pid = (await guest.check("unshare -n sleep 100000 > /dev/null & echo $!")).strip()
    ready = f'[ "$(readlink /proc/{pid}/ns/net)" != "$(readlink /proc/self/ns/net)" ]'
    await guest.check(f"until {ready}; do sleep 0.1; done")
    return pid
