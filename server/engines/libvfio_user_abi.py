# SPDX-License-Identifier: BSD-3-Clause
"""What libvfio-user's binary interface is: structures, constants, and one table of function signatures.

From the headers `libvfio-user.h` of the revisions that `Abi` names. Every revision has the same soname; how
they are told apart is in `libvfio_user_library`.

Arguments that a later revision appended are always passed: a C function of the supported machines does not
look at arguments that it does not have (its caller removes them).
"""

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_bool,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_ssize_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Any

SONAME = "libvfio-user.so.0"

CType = Any
"""A ctypes type, or None for void."""


class Abi(Enum):
    """The revisions that are known, by what of their interface differs."""

    V1 = "v1"
    """Until September 2023; Debian's qemu source has it: migration region, DIRTY_PAGES."""
    V2 = "v2"
    """From September 2023 on: DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE."""
    V2_LIMIT = "v2 with a limit of DMA regions"
    """From March 2026 on: `vfu_setup_device_dma` has the limit as its second argument."""


class Fails(Enum):
    """How a function says that it failed; the reason is then in errno."""

    NEVER = "never"
    NEGATIVE = "a negative result"
    NULL = "a null pointer"


# Constants

TRANS_SOCK, DEV_TYPE_PCI = 0, 0
FLAG_ATTACH_NB = 1
CONFIG_REGION, V1_MIGRATION_REGION = 7, 9
REGIONS = 9
"""Region indexes of a device; v1's migration region follows."""
PROT_READ, PROT_WRITE = 1, 2
SGL_DIRECT_ACCESS = 1
"""For reading and writing: by the descriptor where the client asked for that, not by message."""
CALLBACKS_VERSION = {Abi.V1: 1, Abi.V2: 2, Abi.V2_LIMIT: 2}


class RegionFlag(IntFlag):
    """VFU_REGION_FLAG_*."""

    READ = 1
    WRITE = 2
    MEM = 4
    ALWAYS_CB = 8
    """For the configuration space: our own does all of it."""


class Reset(IntEnum):
    """vfu_reset_type_t."""

    DEVICE = 0
    LOST_CONN = 1
    PCI_FLR = 2


class MigrationState(IntEnum):
    """vfu_migr_state_t."""

    STOP = 0
    RUNNING = 1
    STOP_AND_COPY = 2
    PRE_COPY = 3
    RESUME = 4


class LogLevel(IntEnum):
    """syslog(3)."""

    CRIT = 2
    ERR = 3
    WARNING = 4
    INFO = 6
    DEBUG = 7


# Structures


class IoVec(ctypes.Structure):
    """struct iovec; in a DMA region's `iova` the base is a guest address."""

    _fields_ = (("base", c_void_p), ("length", c_size_t))


class DmaInfo(ctypes.Structure):
    """vfu_dma_info_t."""

    _fields_ = (
        ("iova", IoVec),
        ("vaddr", c_void_p),
        ("mapping", IoVec),
        ("page_size", c_size_t),
        ("prot", c_uint32),
    )


# Callbacks: all with errno, which ctypes hands over when they return


def _callback(result: CType, *arguments: CType) -> CType:
    return CFUNCTYPE(result, *arguments, use_errno=True)


CTX = c_void_p
LOG = _callback(None, CTX, c_int, c_char_p)
ACCESS = _callback(c_ssize_t, CTX, c_void_p, c_size_t, c_int64, c_bool)
QUIESCE = _callback(c_int, CTX)
RESET = _callback(c_int, CTX, c_int)
DMA = _callback(None, CTX, POINTER(DmaInfo))
IRQ_STATE = _callback(None, CTX, c_uint32, c_uint32, c_bool)
TRANSITION = _callback(c_int, CTX, c_int)
PENDING = _callback(c_uint64, CTX)
PREPARE = _callback(c_int, CTX, POINTER(c_uint64), POINTER(c_uint64))
DATA_V1 = _callback(c_ssize_t, CTX, c_void_p, c_uint64, c_uint64)
WRITTEN = _callback(c_int, CTX, c_uint64)
DATA_V2 = _callback(c_ssize_t, CTX, c_void_p, c_uint64)


class MigrationCallbacksV1(ctypes.Structure):
    """vfu_migration_callbacks_t of v1: chunks at an offset in the migration region."""

    _fields_ = (
        ("version", c_int),
        ("transition", TRANSITION),
        ("get_pending_bytes", PENDING),
        ("prepare_data", PREPARE),
        ("read_data", DATA_V1),
        ("write_data", DATA_V1),
        ("data_written", WRITTEN),
    )


class MigrationCallbacksV2(ctypes.Structure):
    """vfu_migration_callbacks_t of v2: a stream."""

    _fields_ = (
        ("version", c_int),
        ("transition", TRANSITION),
        ("read_data", DATA_V2),
        ("write_data", DATA_V2),
    )


# Functions

EVERY = frozenset(Abi)
V2_ONLY = frozenset({Abi.V2, Abi.V2_LIMIT})


@dataclass(frozen=True, slots=True)
class Function:
    """One exported function, as the revisions in `abis` have it."""

    name: str
    result: CType
    arguments: tuple[CType, ...]
    fails: Fails = Fails.NEVER
    abis: frozenset[Abi] = EVERY


SGL = c_void_p
"""An array of scatter-gather entries; only the library knows what is in one."""

FUNCTIONS: tuple[Function, ...] = (
    Function("vfu_create_ctx", c_void_p, (c_int, c_char_p, c_int, c_void_p, c_int), Fails.NULL),
    Function("vfu_realize_ctx", c_int, (CTX,), Fails.NEGATIVE),
    Function("vfu_attach_ctx", c_int, (CTX,), Fails.NEGATIVE),
    Function("vfu_get_poll_fd", c_int, (CTX,)),
    Function("vfu_run_ctx", c_int, (CTX,), Fails.NEGATIVE),
    Function("vfu_destroy_ctx", None, (CTX,)),
    Function("vfu_setup_log", c_int, (CTX, LOG, c_int), Fails.NEGATIVE),
    Function(
        "vfu_setup_region",
        c_int,
        (CTX, c_int, c_size_t, ACCESS, c_int, POINTER(IoVec), c_uint32, c_int, c_uint64),
        Fails.NEGATIVE,
    ),
    Function(
        "vfu_create_ioeventfd",  # the last two arguments are v2's: shadow descriptor (-1: none) and offset
        c_int,
        (CTX, c_uint32, c_int, c_size_t, c_uint32, c_uint32, c_uint64, c_int, c_size_t),
        Fails.NEGATIVE,
    ),
    Function("vfu_setup_device_reset_cb", c_int, (CTX, RESET), Fails.NEGATIVE),
    Function("vfu_setup_device_quiesce_cb", None, (CTX, QUIESCE)),
    Function("vfu_setup_device_nr_irqs", c_int, (CTX, c_int, c_uint32), Fails.NEGATIVE),
    Function("vfu_setup_irq_state_callback", c_int, (CTX, c_int, IRQ_STATE), Fails.NEGATIVE),
    Function("vfu_irq_trigger", c_int, (CTX, c_uint32), Fails.NEGATIVE),
    Function("vfu_setup_device_dma", c_int, (CTX, DMA, DMA), Fails.NEGATIVE, EVERY - {Abi.V2_LIMIT}),
    Function(
        "vfu_setup_device_dma",
        c_int,
        (CTX, c_size_t, DMA, DMA),
        Fails.NEGATIVE,
        frozenset({Abi.V2_LIMIT}),
    ),
    Function("dma_sg_size", c_size_t, ()),
    Function("vfu_addr_to_sgl", c_int, (CTX, c_uint64, c_size_t, SGL, c_size_t, c_int), Fails.NEGATIVE),
    Function("vfu_sgl_mark_dirty", None, (CTX, SGL, c_size_t)),
    # The last argument, flags, is that of 2026.
    Function("vfu_sgl_read", c_int, (CTX, SGL, c_size_t, c_void_p, c_int), Fails.NEGATIVE),
    Function("vfu_sgl_write", c_int, (CTX, SGL, c_size_t, c_void_p, c_int), Fails.NEGATIVE),
    Function("vfu_get_migr_register_area_size", c_size_t, (), abis=frozenset({Abi.V1})),
    Function(
        "vfu_setup_device_migration_callbacks",
        c_int,
        (CTX, POINTER(MigrationCallbacksV1), c_uint64),
        Fails.NEGATIVE,
        frozenset({Abi.V1}),
    ),
    Function(
        "vfu_setup_device_migration_callbacks",
        c_int,
        (CTX, POINTER(MigrationCallbacksV2)),
        Fails.NEGATIVE,
        V2_ONLY,
    ),
)
"""What we call. A name that stands twice differs between revisions."""
