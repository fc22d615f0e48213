# SPDX-License-Identifier: BSD-3-Clause
"""Who answers the server's DMA_READ and DMA_WRITE."""

from errno import EFAULT
from typing import Protocol

from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.values import Payload


class DmaTarget(Protocol):
    """Guest memory for DMA_READ and DMA_WRITE; raises VfioUserError with the errno to answer."""

    def dma_read(self, address: int, count: int) -> Payload: ...

    def dma_write(self, address: int, data: Payload) -> None: ...


class NoDma:
    """A client without memory."""

    def dma_read(self, address: int, count: int) -> Payload:
        raise DeviceError(f"no guest memory at {address:#x}", EFAULT)

    def dma_write(self, address: int, data: Payload) -> None:
        raise DeviceError(f"no guest memory at {address:#x}", EFAULT)
