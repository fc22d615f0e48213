# SPDX-License-Identifier: BSD-3-Clause
"""A guest with an e1000 and a device with MSI-X: vectors, masks and pending bits of the one, and the
interrupts of the other, are there after each move."""

from dataclasses import replace

import pytest

from guest_moves.by_tool import move
from guest_moves.counts import MOVES, SOAK
from guest_moves.nic import GUEST as ADDRESS
from guest_moves.nic import HOST, NIC, complaints
from guest_moves.pinger import pinging
from guest_moves.vectors import (
    GUEST,
    mask_all,
    model,
    require_all_masked,
    require_marks,
    require_vectors,
    set_up,
    use_vectors,
)
from vfio_user.client.qemu.command import Chipset
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import bring_up

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(600)]

CHIPSETS: tuple[Chipset, ...] = ("q35", "i440fx")


@pytest.mark.parametrize("chipset", CHIPSETS if SOAK else CHIPSETS[1:])
async def test_vectors_are_kept_beside_a_card(lab: Lab, namespace: Namespace, chipset: Chipset) -> None:
    options = replace(GUEST, chipset=chipset, kernel_words="mem=128M")
    places = one_host(namespace, f"{HOST}/24")
    async with open_moving(lab, options, [NIC, model()], places) as moving:
        await bring_up(moving.guest, f"{ADDRESS}/24")
        await moving.guest.check("dmesg -c")
        guest = await set_up(moving.guest)
        async with pinging(namespace, ADDRESS) as pinger:
            for number in range(MOVES if SOAK else 2):
                await use_vectors(guest)
                if number % 2:
                    await mask_all(guest)
                before = await guest.space()
                await move(moving)
                guest = replace(guest, machine=moving.guest)
                assert await guest.space() == before
                await require_marks(guest)
                if number % 2:
                    await require_all_masked(guest)
                await require_vectors(guest)
                await pinger.next_answer()
        assert complaints(await moving.guest.kernel_log()) == []
