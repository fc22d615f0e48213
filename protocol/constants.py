# SPDX-License-Identifier: BSD-3-Clause
"""Numbers of the vfio-user specification and of `linux/vfio.h`, in their spelling without the prefixes
`VFIO_USER_`, `VFIO_DEVICE_` and `VFIO_`.

Sources: QEMU's docs/interop/vfio-user.rst (16-18), libvfio-user 0b28d205 docs/vfio-user.rst (14 and the
migration region), linux/vfio.h (all the values that the specification only names).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final


class Command(IntEnum):
    """Message commands (specification: "Commands"). 14 is of v1, 16 to 18 are of v2."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Role(IntEnum):
    """Which end of the connection: the VMM is the client, the device is the server."""

    CLIENT = 0
    SERVER = 1

    @property
    def peer(self) -> Role:
        return Role(1 - self)


# Header (specification: "Header")
HEADER_SIZE: Final = 16
TYPE_MASK: Final = 0xF
TYPE_COMMAND: Final = 0x0
TYPE_REPLY: Final = 0x1
FLAG_NO_REPLY: Final = 0x10
FLAG_ERROR: Final = 0x20
ERROR_REPLY_FLAGS: Final = TYPE_REPLY | FLAG_ERROR
MAX_MESSAGE_ID: Final = 0xFFFF

# Version and capabilities (specification: "VFIO_USER_VERSION")
VERSION_MAJOR: Final = 0
VERSION_MINOR: Final = 1
DEFAULT_MAX_MSG_FDS: Final = 1
DEFAULT_MAX_DATA_XFER_SIZE: Final = 1 << 20
DEFAULT_MAX_DMA_MAPS: Final = 65535
DEFAULT_PGSIZES: Final = 4096
DEFAULT_MIGRATION_PGSIZE: Final = 4096
DEFAULT_MAX_BITMAP_SIZE: Final = 256 << 20

SCM_MAX_FD: Final = 253
"""The kernel's limit of file descriptors in one control message (net/scm.h)."""

MESSAGE_OVERHEAD: Final = 4096
"""Room for the header and the fixed part of a message beside max_data_xfer_size bytes of data."""
DEFAULT_MAX_MESSAGE_SIZE: Final = DEFAULT_MAX_DATA_XFER_SIZE + MESSAGE_OVERHEAD

# Sizes of fixed parts, for argsz (tests compare them with layouts.py)
DEVICE_INFO_SIZE: Final = 16
REGION_INFO_SIZE: Final = 32
REGION_IO_FDS_SIZE: Final = 16
SUB_REGION_SIZE: Final = 40
SUB_REGION_SHADOW_SIZE: Final = 48
IRQ_INFO_SIZE: Final = 16
IRQ_SET_SIZE: Final = 20
DMA_MAP_SIZE: Final = 32
DMA_UNMAP_SIZE: Final = 24
BITMAP_SIZE: Final = 16
BITMAP_RANGE_SIZE: Final = 32
DIRTY_PAGES_SIZE: Final = 8
DEVICE_FEATURE_SIZE: Final = 8
MIG_DATA_SIZE: Final = 8
MAX_WRITE_MULTI_DATA: Final = 8


class DmaMapFlags(IntFlag):
    """Specification: "VFIO_USER_DMA_MAP". MMAP and FILE_IO are libvfio-user's, newer than the text."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    FILE_IO = 1 << 3


class DmaUnmapFlags(IntFlag):
    """v1 specification: "VFIO_USER_DMA_UNMAP"."""

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


class DeviceFlags(IntFlag):
    """Specification: "VFIO_USER_DEVICE_GET_INFO"."""

    RESET = 1 << 0
    PCI = 1 << 1


class RegionInfoFlags(IntFlag):
    """Specification: "VFIO_USER_DEVICE_GET_REGION_INFO"."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class RegionInfoCap(IntEnum):
    """Capability ids of a region info reply (linux/vfio.h)."""

    SPARSE_MMAP = 1
    TYPE = 2
    MSIX_MAPPABLE = 3


REGION_TYPE_MIGRATION: Final = 3
REGION_SUBTYPE_MIGRATION: Final = 1


class IoFdType(IntEnum):
    """Specification: "Sub-Region IO FD info format"; SHADOW is libvfio-user's."""

    IOEVENTFD = 0
    IOREGIONFD = 1
    IOEVENTFD_SHADOW = 2


class IoeventfdFlags(IntFlag):
    """KVM_IOEVENTFD_FLAG_* (linux/kvm.h)."""

    DATAMATCH = 1 << 0
    PIO = 1 << 1
    DEASSIGN = 1 << 2
    VIRTIO_CCW_NOTIFY = 1 << 3


class IoregionfdFlags(IntFlag):
    """KVM_IOREGION_* (proposed kernel series that the specification links to)."""

    PIO = 1 << 0
    POSTED_WRITES = 1 << 1


class IrqInfoFlags(IntFlag):
    """Specification: "VFIO_USER_DEVICE_GET_IRQ_INFO"."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqSetFlags(IntFlag):
    """Specification: "VFIO_USER_DEVICE_SET_IRQS"; one DATA and one ACTION flag at a time."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


IRQ_SET_DATA_TYPE_MASK: Final = IrqSetFlags.DATA_NONE | IrqSetFlags.DATA_BOOL | IrqSetFlags.DATA_EVENTFD
IRQ_SET_ACTION_TYPE_MASK: Final = (
    IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER
)


class PciRegion(IntEnum):
    """VFIO_PCI_*_REGION_INDEX (linux/vfio.h). Device specific regions start at PCI_NUM_REGIONS."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


PCI_NUM_REGIONS: Final = 9


class PciIrq(IntEnum):
    """VFIO_PCI_*_IRQ_INDEX (linux/vfio.h)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


PCI_NUM_IRQS: Final = 5


class DirtyPagesFlags(IntFlag):
    """v1 specification: "VFIO_USER_DIRTY_PAGES"; one at a time."""

    START = 1 << 0
    STOP = 1 << 1
    GET_BITMAP = 1 << 2


class MigrationV1State(IntFlag):
    """device_state of the migration region (v1): bits, of which the kernel of 5.8-5.17 allows some."""

    STOP = 0
    RUNNING = 1 << 0
    SAVING = 1 << 1
    RESUMING = 1 << 2
    ERROR = SAVING | RESUMING


class DeviceFeature(IntEnum):
    """Specification: "Device Features"."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8


DEVICE_FEATURE_MASK: Final = 0xFFFF


class DeviceFeatureFlags(IntFlag):
    """Action bits beside the feature index in `flags` (specification: "VFIO_USER_DEVICE_FEATURE")."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class MigrationFlags(IntFlag):
    """Specification: "VFIO_DEVICE_FEATURE_MIGRATION"."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class MigrationState(IntEnum):
    """Specification: "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE" (v2)."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7
