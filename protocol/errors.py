# SPDX-License-Identifier: BSD-3-Clause
"""What can go wrong, each with the errno that answers it.

`VfioUserError` is the root of everything this project raises on purpose. `errno` is the value of the
`error` field of the reply header (specification: "Header"); a handler lets the exception pass and the
session turns it into an error reply.
"""

from __future__ import annotations

import errno as _errno


class VfioUserError(Exception):
    """Root of the hierarchy. `errno` is a positive `errno` value, `str()` is the reason."""

    default_errno = _errno.EINVAL

    def __init__(self, reason: str, errno: int | None = None) -> None:
        super().__init__(reason)
        self.errno: int = self.default_errno if errno is None else errno

    @property
    def reason(self) -> str:
        return str(self.args[0])


class ProtocolError(VfioUserError):
    """Something does not follow the vfio-user specification."""


class LocalProtocolError(ProtocolError):
    """This side was about to send something wrong: a bug in the caller, nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something wrong. The stream is still in step: answer with `errno` and go on."""


class StreamLost(RemoteProtocolError):
    """The peer's bytes can no longer be divided into messages: the connection has to be closed."""

    default_errno = _errno.EPROTO


class DeviceError(VfioUserError):
    """The request was well formed, and the device or the server cannot do what it asks."""
