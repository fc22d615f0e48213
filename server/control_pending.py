# SPDX-License-Identifier: BSD-3-Clause
"""Message interrupts that a device owes because the VMM from which it has moved had not delivered them.

A VMM that keeps the MSI-X table itself takes the signal of a masked vector, and makes it a pending bit of its
own. One that does not move the device loses that bit; the device's own pending bits take its place.
"""

from typing import Any

from vfio_user.device_models.device import IrqIndex
from vfio_user.protocol.json_rpc import INVALID_PARAMS, REFUSED, RpcError
from vfio_user.server.control_device import DeviceControl

MESSAGES = (IrqIndex.MSI, IrqIndex.MSIX)
MOST_VECTORS = 2048
"""Of MSI-X (PCI Local Bus 3.0, 6.8.2)."""


def pend(control: DeviceControl, index: int, mask: bytes) -> Any:
    """Let the stopped model keep the vectors of `mask` pending. RpcError: none is, or not all can be."""
    if control.host.running or not control.claimed:
        raise RpcError(REFUSED, "no controller has stopped the device: stop it first")
    if control.transfer is not None:
        raise RpcError(REFUSED, f"a {control.transfer.method} is under way: wait, or cancel it")
    device, known = control.device, IrqIndex(index)
    bits, count = int.from_bytes(mask, "little"), device.irqs.get(known, 0)
    if bits >> count:
        raise RpcError(INVALID_PARAMS, f"vectors: there are {count} of {known.name}")
    vectors = [vector for vector in range(count) if bits >> vector & 1]
    if not all(device.pend_irq(known, vector) for vector in vectors):
        raise RpcError(REFUSED, f"a device of the model {device.model} keeps no message pending")
    return {"pended": len(vectors)}
