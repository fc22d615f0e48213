# SPDX-License-Identifier: BSD-3-Clause
"""One context of libvfio-user, with Python types. Every method raises OSError when its function fails."""

import contextlib
import ctypes
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vfio_user.device_models.regions import Area, Buffer
from vfio_user.protocol.messages import Ioeventfd
from vfio_user.server.engines import libvfio_user_abi as abi
from vfio_user.server.engines.libvfio_user_guard import Guard
from vfio_user.server.engines.libvfio_user_library import Library
from vfio_user.transport.listener import BACKLOG

logger = logging.getLogger(__name__)

RegionAccess = Callable[[int | None, int, int, int, bool], int]
"""Context, address of the buffer, count, offset, whether it is a write; gives the count."""


class Context:
    """Made by `vfu_create_ctx`, which listens at `path`; to be destroyed with `destroy`."""

    def __init__(self, library: Library, path: Path) -> None:
        self.abi = library.abi
        self.guard = Guard()
        self._call = library.functions
        self._pointer: int = self._call["vfu_create_ctx"](
            abi.TRANS_SOCK, os.fsencode(path), abi.FLAG_ATTACH_NB, None, abi.DEV_TYPE_PCI
        )
        # What is called for every access of the device to memory is looked up once.
        self._addr_to_sgl = self._call["vfu_addr_to_sgl"]
        self._mark_dirty = self._call["vfu_sgl_mark_dirty"]
        self._irq_trigger = self._call["vfu_irq_trigger"]
        self._run_ctx = self._call["vfu_run_ctx"]
        self._sg = ctypes.create_string_buffer(self._call["dma_sg_size"]())
        try:
            self._setup_log()
            self._let_clients_wait()
        except BaseException:
            self.destroy()
            raise

    def destroy(self) -> None:
        """Release everything; a client that is there is told of by the callbacks of the loss of a client."""
        pointer, self._pointer = self._pointer, 0
        if pointer:
            self._call["vfu_destroy_ctx"](pointer)
        self.guard.release()
        self.guard.reraise()

    # Setting up

    def _let_clients_wait(self) -> None:
        """The library listens with a backlog of 0: a second client that waits would not even connect."""
        with socket.socket(fileno=os.dup(self.poll_fd())) as listener:
            listener.listen(BACKLOG)

    def _setup_log(self) -> None:
        level = abi.LogLevel.INFO if logger.isEnabledFor(logging.DEBUG) else abi.LogLevel.CRIT
        callback = self.guard.callback(abi.LOG, _log, None)
        self._call["vfu_setup_log"](self._pointer, callback, level)

    def setup_region(
        self,
        index: int,
        size: int,
        access: RegionAccess,
        flags: abi.RegionFlag,
        areas: Sequence[Area] = (),
        fd: int = -1,
    ) -> None:
        """A region; what of it can be mapped is in `fd` at the same offsets, no `areas`: all of it."""
        iovecs = (abi.IoVec * len(areas))(*[abi.IoVec(a.offset, a.size) for a in areas]) if areas else None
        callback = self.guard.callback(abi.ACCESS, access)
        self._call["vfu_setup_region"](self._pointer, index, size, callback, flags, iovecs, len(areas), fd, 0)

    def create_ioeventfd(self, index: int, fd: int, sub_region: Ioeventfd) -> None:
        """A doorbell whose writes come by the eventfd; it stays the caller's."""
        self._call["vfu_create_ioeventfd"](
            self._pointer,
            index,
            fd,
            sub_region.offset,
            sub_region.size,
            sub_region.flags,
            sub_region.datamatch,
            -1,
            0,
        )

    def setup_irqs(self, index: int, count: int, on_state: Callable[..., None]) -> None:
        """`on_state(start, count, masked)` is told of MASK and UNMASK, whatever data came with them."""

        def irq_state(_context: object, start: int, count: int, masked: bool) -> None:
            on_state(start, count, masked)

        callback = self.guard.callback(abi.IRQ_STATE, irq_state, None)
        self._call["vfu_setup_device_nr_irqs"](self._pointer, index, count)
        self._call["vfu_setup_irq_state_callback"](self._pointer, index, callback)

    def setup_dma(self, register: Callable[..., None], unregister: Callable[..., None], limit: int) -> None:
        """`register(info)` and `unregister(info)` are told of regions; the library must know both to map
        them. `limit`: at most so many, where the library can be told."""
        callbacks = [self.guard.callback(abi.DMA, _with_info(call), None) for call in (register, unregister)]
        limits = [limit] if self.abi is abi.Abi.V2_LIMIT else []
        self._call["vfu_setup_device_dma"](self._pointer, *limits, *callbacks)

    def setup_life(self, quiesce: Callable[[], None], reset: Callable[[abi.Reset], None]) -> None:
        """`quiesce()` before memory, reset and state change; `reset(why)` also when a client is lost."""

        def quiesce_device(_context: object) -> int:
            quiesce()
            return 0

        def reset_device(_context: object, why: int) -> int:
            reset(abi.Reset(why))
            return 0

        self._call["vfu_setup_device_quiesce_cb"](
            self._pointer, self.guard.callback(abi.QUIESCE, quiesce_device)
        )
        self._call["vfu_setup_device_reset_cb"](self._pointer, self.guard.callback(abi.RESET, reset_device))

    def setup_migration_v1(self, size: int, callbacks: abi.MigrationCallbacksV1) -> None:
        """The migration region: the library's registers, and a data area of `size` bytes after them."""
        offset = self._call["vfu_get_migr_register_area_size"]()
        flags = abi.RegionFlag.READ | abi.RegionFlag.WRITE
        self._call["vfu_setup_region"](
            self._pointer, abi.V1_MIGRATION_REGION, offset + size, abi.ACCESS(), flags, None, 0, -1, 0
        )
        self._setup_migration(ctypes.byref(callbacks), offset)

    def setup_migration_v2(self, callbacks: abi.MigrationCallbacksV2) -> None:
        self._setup_migration(ctypes.byref(callbacks))

    def _setup_migration(self, *arguments: Any) -> None:
        """The library copies the structure; the callbacks in it are kept by our guard."""
        self._call["vfu_setup_device_migration_callbacks"](self._pointer, *arguments)

    def realize(self) -> None:
        self._call["vfu_realize_ctx"](self._pointer)

    # Serving

    def poll_fd(self) -> int:
        """Readable when there is something to do for `attach` or `run`; another one after each change."""
        return int(self._call["vfu_get_poll_fd"](self._pointer))

    def attach(self) -> bool:
        """Take a client that waits and negotiate. False: none waits. OSError: it was refused; EINTR: a signal
        came while it said nothing, and the library gave it up."""
        try:
            self._call["vfu_attach_ctx"](self._pointer)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            raise
        finally:
            self.guard.reraise()
        return True

    def run(self) -> int:
        """Serve one request, if there is one; how many were served. OSError: ENOTCONN when the client has
        gone, others when the stream cannot be read; EINTR: a signal came while a message was half sent."""
        try:
            return int(self._run_ctx(self._pointer))
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return 0
            raise
        finally:
            self.guard.reraise()

    def drop_client(self) -> None:
        """End the connection: the library has no function for that, and finds the end at the next `run`."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.poll_fd())) as client:
            client.shutdown(socket.SHUT_RDWR)
            while client.recv(65536, socket.MSG_DONTWAIT):  # what is left would be read as requests
                pass

    # The device's doings

    def trigger(self, vector: int) -> bool:
        """Signal an eventfd; the indexes share them. False: the client has given none."""
        try:
            self._irq_trigger(self._pointer, vector)
        except OSError:
            return False
        return True

    def mark_dirty(self, address: int, length: int) -> None:
        """Note that the range, of one mapped region, has been written; no effect while nothing is logged."""
        self._addr_to_sgl(self._pointer, address, length, self._sg, 1, abi.PROT_WRITE)
        self._mark_dirty(self._pointer, self._sg, 1)

    def read(self, address: int, length: int) -> bytes:
        """By message, waiting for the reply. The range lies in one region that is not mapped."""
        data = ctypes.create_string_buffer(length)
        self._transfer("vfu_sgl_read", address, length, data, abi.PROT_READ)
        return data.raw

    def write(self, address: int, data: Buffer) -> None:
        """The same in the other direction."""
        copied = ctypes.create_string_buffer(bytes(data), len(data))
        self._transfer("vfu_sgl_write", address, len(data), copied, abi.PROT_WRITE)

    def _transfer(self, name: str, address: int, length: int, data: Any, protection: int) -> None:
        self._addr_to_sgl(self._pointer, address, length, self._sg, 1, protection)
        try:
            self._call[name](self._pointer, self._sg, 1, data, abi.SGL_DIRECT_ACCESS)
        finally:
            self.guard.reraise()


def _log(_context: object, level: int, text: bytes) -> None:
    """What the library calls an error is a request that it refuses: for -vv, as the native engine's."""
    ours = logging.ERROR if level <= abi.LogLevel.CRIT else logging.DEBUG
    logger.log(ours, "%s", text.decode(errors="replace"))


def _with_info(call: Callable[..., None]) -> Callable[..., None]:
    def dma_callback(_context: object, info: Any) -> None:
        call(info.contents)

    return dma_callback
