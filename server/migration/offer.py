# SPDX-License-Identifier: BSD-3-Clause
"""v1: data that is offered in an iteration of saving, and what of it the client has read.

(linux/vfio.h of 5.8 to 5.17: "Read pending_bytes, which indicates that the data from the previous iteration
has been read." A client that turns to another state in the middle of an iteration has perhaps not read it.)
"""


class Offer:
    """Of `size` bytes, what was read by messages; what is read through a mapping nobody sees."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._unread = bytearray(b"\1") * size

    def read(self, offset: int, count: int) -> None:
        """These bytes have been read."""
        self._unread[offset : offset + count] = bytes(count)

    @property
    def whole(self) -> bool:
        """Every byte has been read."""
        return self._unread.find(1) < 0

    @property
    def broken_off(self) -> bool:
        """Some of it has been read, and not its end."""
        return self.size > 0 and self._unread[-1] == 1 and self._unread.find(0) >= 0
