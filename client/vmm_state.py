# SPDX-License-Identifier: BSD-3-Clause
"""What a VMM knows of a device and the device does not: it goes with the guest when that is moved.

Eventfds belong to a connection; here is only which interrupts have one. The order at the destination is
QEMU's: the command register while the device takes its state, then the interrupts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vfio_user.client.config_space import COMMAND, Bar, CommandBits
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.interrupts import Irqs


@dataclass(frozen=True, slots=True)
class VmmState:
    """`intx`, `msi` and `msix` are the numbers of vectors that have an eventfd; `msix_masked` are those that
    the guest has masked: in the table, which the VMM watches."""

    command: int
    bars: tuple[Bar, ...]
    intx: int
    resample: bool
    msi: int
    msix: int
    msix_masked: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def parse_vmm_state(values: Mapping[str, Any]) -> VmmState:
    """The reverse of `as_dict`. TypeError or KeyError when it is something else."""
    bars = tuple(Bar(**bar) for bar in values["bars"])
    return VmmState(**{**values, "bars": bars, "msix_masked": tuple(values["msix_masked"])})


def save_vmm(vmm: FakeVmm) -> VmmState:
    return VmmState(
        command=int(vmm.config.command),
        bars=tuple(vmm.bars.values()),
        intx=len(vmm.intx.vectors),
        resample=vmm.intx.resamples,
        msi=len(vmm.msi.vectors),
        msix=len(vmm.msix.vectors),
        msix_masked=tuple(sorted(vmm.msix.masked)),
    )


async def restore_config(vmm: FakeVmm, state: VmmState) -> None:
    """Addresses, and the command register, which a device's own state need not have."""
    vmm.bars = {bar.index: bar for bar in state.bars}
    await vmm.config.write(COMMAND, int(CommandBits(state.command)), 2)


async def restore_irqs(vmm: FakeVmm, state: VmmState) -> None:
    """Give the server eventfds for the vectors that had one; masks first, or what is pending would fire."""
    for vector in state.msix_masked:
        await vmm.msix.mask(vector)
    for irqs, count in ((vmm.msi, state.msi), (vmm.msix, state.msix)):
        await _set(irqs, count)
    if state.intx:
        await vmm.intx.enable(state.intx, resample=state.resample)
    elif vmm.intx.vectors:
        await vmm.intx.disable()


async def _set(irqs: Irqs, count: int) -> None:
    if count:
        await irqs.enable(count)
    elif irqs.vectors:
        await irqs.disable()
