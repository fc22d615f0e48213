# SPDX-License-Identifier: BSD-3-Clause
"""Device memory that a client may map: a sealed memfd."""

import fcntl
import mmap
import os

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MemfdMemory:
    """`SharedMemory` of `size` bytes; `fd` is lent to clients and stays ours."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("vfio-user-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)  # a client that shrank it would kill us by SIGBUS
            self._mapping = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._mapping)

    def close(self) -> None:
        """For the end of the host; the device must not touch the memory afterwards."""
        self.view.release()
        self._mapping.close()
        os.close(self.fd)
