# SPDX-License-Identifier: BSD-3-Clause
"""Which received frames are for us (Software Developer's Manual, 3.2.1, "Packet Address Filtering")."""

from vfio_user.device_models.e1000.bits import RAH_AV, Rctl
from vfio_user.device_models.registers import RegisterFile

BROADCAST = b"\xff" * 6

REJECTED, ACCEPTED, INEXACT, FLOW_CONTROL = 0, 1, 2, 4
"""Verdicts on a destination. INEXACT comes with ACCEPTED; FLOW_CONTROL says that it is FCAL and FCAH."""

_MOST_REMEMBERED = 1024
_HASH_SHIFT = (4, 3, 2, 0)
"""By RCTL.MO: how far the last 16 bits of an address are shifted right to give the 12 of the table."""


class AddressFilter:
    """Destination and VLAN filters. Verdicts are remembered until a register of the filter is written."""

    def __init__(self, file: RegisterFile) -> None:
        self._rctl = file.cell("RCTL")
        self._low, self._high = file.array("RAL"), file.array("RAH")
        self._table, self._vlans = file.array("MTA"), file.array("VFTA")
        self._flow = file.cell("FCAL"), file.cell("FCAH")
        self.verdicts: dict[bytes, int] = {}

    def changed(self) -> None:
        """A register that the verdicts depend on was written."""
        self.verdicts.clear()

    def judge(self, destination: bytes) -> int:
        """The verdict on a destination address (6 bytes)."""
        if len(self.verdicts) >= _MOST_REMEMBERED:
            self.verdicts.clear()
        verdict = self.verdicts[destination] = self._judge(destination)
        return verdict

    def _judge(self, destination: bytes) -> int:
        control = self._rctl.value
        flow = FLOW_CONTROL if destination == self._flow_address() else 0
        if self._exact(destination) or (destination == BROADCAST and control & Rctl.BAM):
            return flow | ACCEPTED
        if destination[0] & 1:
            accepted = control & Rctl.MPE or self._hashed(destination)
        else:
            accepted = control & Rctl.UPE
        return flow | (ACCEPTED | INEXACT if accepted else REJECTED)

    def _flow_address(self) -> bytes:
        low, high = self._flow
        return low.value.to_bytes(4, "little") + high.value.to_bytes(2, "little")

    def _exact(self, destination: bytes) -> bool:
        low, high = int.from_bytes(destination[:4], "little"), int.from_bytes(destination[4:], "little")
        return any(
            cell.value == low and self._high[index].value & (RAH_AV | 0xFFFF) == RAH_AV | high
            for index, cell in enumerate(self._low)
        )

    def _hashed(self, destination: bytes) -> bool:
        shift = _HASH_SHIFT[self._rctl.value >> Rctl.MO_SHIFT & 3]
        place = (destination[4] | destination[5] << 8) >> shift & 0xFFF
        return bool(self._table[place >> 5].value >> (place & 31) & 1)

    def vlan_passes(self, tag: int) -> bool:
        """Whether a tagged frame passes, with RCTL.VFE; `tag` is the 16 bits after the type (9.3)."""
        control, identifier = self._rctl.value, tag & 0xFFF
        if control & Rctl.CFIEN and bool(tag & 0x1000) != bool(control & Rctl.CFI):
            return False
        return bool(self._vlans[identifier >> 5].value >> (identifier & 31) & 1)
