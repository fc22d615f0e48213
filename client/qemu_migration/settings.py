# SPDX-License-Identifier: BSD-3-Clause
"""Capabilities and parameters of QEMU's migration that we change, and put back as they were."""

from collections.abc import Mapping
from typing import Any

from vfio_user.client.qemu_migration.facts import QemuFacts
from vfio_user.client.qemu_migration.qemu_side import QemuSide


class Settings:
    """Of one QEMU; `facts` say what they were before."""

    def __init__(self, side: QemuSide, facts: QemuFacts) -> None:
        self._side = side
        self._facts = facts
        self._capabilities: dict[str, bool] = {}
        self._parameters: dict[str, Any] = {}

    async def set_capabilities(self, wanted: Mapping[str, bool]) -> None:
        """QmpError, QmpLost. What is so already, and what this QEMU does not know, is left alone."""
        had = self._facts.capabilities
        changed = {name: on for name, on in wanted.items() if had.get(name, on) != on}
        self._capabilities |= {name: had[name] for name in changed}
        if changed:
            await self._send_capabilities(changed)

    async def set_parameters(self, wanted: Mapping[str, Any]) -> None:
        """QmpError, QmpLost."""
        had = self._facts.parameters
        changed = {name: value for name, value in wanted.items() if had.get(name) != value}
        self._parameters |= {name: had[name] for name in changed if name in had}
        if changed:
            await self._side.qmp.execute("migrate-set-parameters", **changed)

    async def put_back(self) -> None:
        """QmpError, QmpLost; QEMU takes no other capabilities while it migrates."""
        if self._capabilities:
            await self._send_capabilities(self._capabilities)
            self._capabilities = {}
        if self._parameters:
            await self._side.qmp.execute("migrate-set-parameters", **self._parameters)
            self._parameters = {}

    @property
    def owed(self) -> tuple[str, ...]:
        """Lines for QEMU's monitor that put back what has not been put back."""
        capabilities = (
            f"migrate_set_capability {name} {'on' if on else 'off'}"
            for name, on in self._capabilities.items()
        )
        parameters = (f"migrate_set_parameter {name} {value}" for name, value in self._parameters.items())
        return *capabilities, *parameters

    async def _send_capabilities(self, values: Mapping[str, bool]) -> None:
        rows = [{"capability": name, "state": on} for name, on in values.items()]
        await self._side.qmp.execute("migrate-set-capabilities", capabilities=rows)
