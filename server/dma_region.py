# SPDX-License-Identifier: BSD-3-Clause
"""One DMA region, in the three ways to reach its memory: mapped, by file I/O, by message.

Which way is used (`open_region`):
- with a descriptor, `mmap` if the file cannot shrink (a memfd with F_SEAL_SHRINK), or if the operator
  trusts the client with its memory: otherwise a client that truncates its file kills us with SIGBUS;
- with any other regular file, `pread` and `pwrite`, which come back short where the file has ended;
- without a descriptor, DMA_READ and DMA_WRITE messages; also for a file that takes no `pwrite` (hugetlbfs).
"""

import errno
import fcntl
import logging
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vfio_user.device_models.device import DmaError
from vfio_user.device_models.regions import Buffer
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError
from vfio_user.server.dirty import DirtyLog
from vfio_user.transport.fds import OwnedFd

logger = logging.getLogger(__name__)

_MAX_FILE_OFFSET = (1 << 63) - 1


class Access(Enum):
    """How the memory of a region is reached."""

    MAPPED = "mapped"
    FILE = "file"
    MESSAGE = "message"


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """What DMA_MAP says of a region: addresses, sizes and the offset in the file, in bytes."""

    address: int
    size: int
    offset: int = 0
    readable: bool = True
    writable: bool = True


class DmaRegion:
    """A range of guest memory that the client has given to the device; reached by message.

    `read_view` and `write_view` are the mapping, or None where there is none or the direction is not
    allowed. `store` (and `store_many`, the same for a batch) is the one way in which a device's write
    reaches memory, and marks the dirty log.
    """

    __slots__ = ("address", "dirty", "end", "read_view", "readable", "size", "writable", "write_view")

    access = Access.MESSAGE

    def __init__(self, spec: RegionSpec) -> None:
        self.address = spec.address
        self.size = spec.size
        self.end = spec.address + spec.size
        """First address after the region. A region that has been unmapped ends at its start."""
        self.readable = spec.readable
        self.writable = spec.writable
        self.read_view: memoryview | None = None
        self.write_view: memoryview | None = None
        self.dirty: DirtyLog | None = None
        """None while writes are not logged. Writes by message never are: the client makes them itself."""

    def load(self, offset: int, length: int) -> Buffer:
        """Bytes of the region, perhaps as a read-only view. DmaError when they cannot be had."""
        raise DmaError(self.address + offset, length, "the region is reached by message only")

    def store(self, offset: int, data: Buffer) -> None:
        """Write into the region and mark the dirty log. DmaError when it cannot be done."""
        raise DmaError(self.address + offset, len(data), "the region is reached by message only")

    def store_many(self, segments: Sequence[tuple[int, Buffer]]) -> None:
        """`store` every (address, data); none is empty, and all lie in the region."""
        for address, data in segments:
            self.store(address - self.address, data)

    def close(self) -> None:
        """Let go of the memory. `address` and `size` can still be asked."""
        self.end = self.address


class MappedRegion(DmaRegion):
    """A region in our address space."""

    __slots__ = ("_mapping",)

    access = Access.MAPPED

    def __init__(self, spec: RegionSpec, fd: int) -> None:
        super().__init__(spec)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if spec.writable else 0)
        self._mapping: mmap.mmap | None = mmap.mmap(
            fd, spec.size, flags=mmap.MAP_SHARED, prot=protection, offset=spec.offset
        )
        whole = memoryview(self._mapping)
        self.read_view = whole.toreadonly() if spec.readable else None
        self.write_view = whole if spec.writable else None

    def load(self, offset: int, length: int) -> Buffer:
        assert self.read_view is not None
        return self.read_view[offset : offset + length]

    def store(self, offset: int, data: Buffer) -> None:
        assert self.write_view is not None
        length = len(data)
        self.write_view[offset : offset + length] = data
        if self.dirty is not None:
            self.dirty.mark(offset, length)

    def store_many(self, segments: Sequence[tuple[int, Buffer]]) -> None:
        # Without a call for each segment: half of what a small write costs. Each mark comes before its write,
        # so that none is missing should a model's data be of the wrong kind; no report can come between.
        view, start, log = self.write_view, self.address, self.dirty
        assert view is not None
        if log is None:
            for address, data in segments:
                offset = address - start
                view[offset : offset + len(data)] = data
            return
        bits, shift = log.bits, log.shift
        for address, data in segments:
            offset = address - start
            end = offset + len(data)
            page = offset >> shift
            if (end - 1) >> shift == page:
                bits[page >> 3] |= 1 << (page & 7)
            else:
                log.mark(offset, end - offset)
            view[offset:end] = data

    def close(self) -> None:
        """Unmap. While a device keeps a view against its contract, the mapping stays until that is gone."""
        super().close()
        mapping, self._mapping = self._mapping, None
        self.read_view = self.write_view = None
        if mapping is None:
            return
        try:
            mapping.close()
        except BufferError:
            logger.error(
                "the device still holds a view of guest memory %#x, which is being unmapped", self.address
            )


class FileRegion(DmaRegion):
    """A region whose file could shrink under a mapping."""

    __slots__ = ("_fd", "_offset")

    access = Access.FILE

    def __init__(self, spec: RegionSpec, fd: OwnedFd) -> None:
        super().__init__(spec)
        self._fd = fd
        self._offset = spec.offset

    def load(self, offset: int, length: int) -> Buffer:
        data = b""
        while len(data) < length:
            try:
                part = os.pread(self._fd.fileno(), length - len(data), self._offset + offset + len(data))
            except OSError as error:
                raise self._failed(offset, length, error) from error
            if not part:
                raise DmaError(self.address + offset, length, "the client's file has been truncated")
            data = data + part if data else part
        return data

    def store(self, offset: int, data: Buffer) -> None:
        place = self._offset + offset
        rest = memoryview(data)
        if self.dirty is not None and rest:
            self.dirty.mark(offset, len(rest))
        try:
            # A write past the end would make the file grow: memory that nobody reads.
            if os.fstat(self._fd.fileno()).st_size < place + len(rest):
                raise DmaError(self.address + offset, len(rest), "the client's file has been truncated")
            while rest:
                written = os.pwrite(self._fd.fileno(), rest, place)
                rest, place = rest[written:], place + written
        except OSError as error:
            raise self._failed(offset, len(data), error) from error

    def _failed(self, offset: int, length: int, error: OSError) -> DmaError:
        return DmaError(self.address + offset, length, f"the client's file: {error.strerror}")

    def close(self) -> None:
        super().close()
        self._fd.close()


def open_region(spec: RegionSpec, fd: OwnedFd | None, *, trusted: bool, room: int) -> DmaRegion:
    """The region in the best way that its descriptor allows; takes ownership of `fd` in any case.

    RemoteProtocolError (EINVAL, EACCES, EBADF) for a descriptor that cannot be the memory of the region,
    DeviceError with the kernel's errno when mapping fails, and with ENOMEM for more than `room` bytes of it.
    """
    if fd is None:
        return DmaRegion(spec)
    try:
        region = _open(spec, fd, trusted, room)
    except BaseException:
        fd.close()
        raise
    if not isinstance(region, FileRegion):
        fd.close()
    return region


def _open(spec: RegionSpec, fd: OwnedFd, trusted: bool, room: int) -> DmaRegion:
    number = fd.fileno()
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    _check_mode(spec, flags)
    regular = _check_file(spec, number, trusted)
    if trusted or _cannot_shrink(number):
        if spec.size > room:
            raise DeviceError(f"{spec.size:#x} bytes more would be too much mapped memory", errno.ENOMEM)
        return _mapped(spec, number)
    assert regular
    if spec.writable and not _takes_pwrite(number, flags):
        logger.warning("guest memory %#x: its file takes no pwrite, DMA goes by message", spec.address)
        return DmaRegion(spec)
    return FileRegion(spec, fd)


def _check_mode(spec: RegionSpec, flags: int) -> None:
    """Access rights as mmap(2) demands them: reading always, writing where the region is writable."""
    if flags & os.O_PATH:
        raise RemoteProtocolError("the file descriptor of a DMA region was opened with O_PATH", errno.EBADF)
    mode = flags & os.O_ACCMODE
    if mode == os.O_WRONLY or (spec.writable and mode != os.O_RDWR):
        raise RemoteProtocolError("the file descriptor does not allow what the DMA region does", errno.EACCES)


def _check_file(spec: RegionSpec, fd: int, trusted: bool) -> bool:
    """Whether it is a regular file that holds the region; others have no size that could be relied on."""
    if spec.offset + spec.size > _MAX_FILE_OFFSET:
        raise RemoteProtocolError(f"offset {spec.offset:#x} and size {spec.size:#x} exceed any file")
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        if status.st_size < spec.offset + spec.size:
            raise RemoteProtocolError(
                f"the file of the DMA region has {status.st_size} bytes, "
                f"the region ends at {spec.offset + spec.size}"
            )
        return True
    if not trusted:
        raise RemoteProtocolError("the file descriptor of a DMA region is not a regular file or memfd")
    return False


def _cannot_shrink(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # not a memfd
        return False


def _mapped(spec: RegionSpec, fd: int) -> MappedRegion:
    try:
        return MappedRegion(spec, fd)
    except OSError as error:
        raise DeviceError(f"mapping the DMA region failed: {error.strerror}", error.errno) from error
    except (ValueError, OverflowError) as error:  # the file has shrunk meanwhile, or a size past ssize_t
        raise RemoteProtocolError(f"mapping the DMA region failed: {error}") from error


def _takes_pwrite(fd: int, flags: int) -> bool:
    """Whether `pwrite` goes where it should: never on hugetlbfs, and elsewhere with O_APPEND."""
    if flags & os.O_APPEND:
        return False
    try:
        os.pwrite(fd, b"", 0)
    except OSError:
        return False
    return True
