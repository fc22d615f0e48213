# SPDX-License-Identifier: BSD-3-Clause
"""Python functions as callbacks: whatever they raise, C gets the failure of its callback and an errno."""

import ctypes
import errno

import pytest

from vfio_user.protocol.errors import DeviceError
from vfio_user.server.engines import libvfio_user_abi as abi
from vfio_user.server.engines.libvfio_user_guard import Guard


def call(guard: Guard, error: BaseException, failure: int | None = -1) -> tuple[int, int]:
    """A callback that raises, called as C does: its result and its errno."""

    def fails(_context: object) -> int:
        raise error

    ctypes.set_errno(0)
    result: int = guard.callback(abi.PENDING if failure == 0 else abi.QUIESCE, fails, failure)(None)
    return result, ctypes.get_errno()


def test_what_is_returned_is_returned() -> None:
    guard = Guard()
    assert guard.callback(abi.QUIESCE, lambda context: 5)(None) == 5
    guard.reraise()


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError(errno.ENOENT, "not the client's"), SystemError()]
)
def test_a_failure_is_eio_with_a_traceback(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    assert call(guard, error) == (-1, errno.EIO)
    assert "the device failed in fails" in caplog.text
    assert "Traceback" in caplog.text
    guard.reraise()


def test_a_refusal_has_its_errno_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    assert call(guard, DeviceError("not so", errno.EPERM)) == (-1, errno.EPERM)
    assert "Traceback" not in caplog.text
    guard.reraise()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_an_interruption_waits_until_c_has_returned_and_is_raised_once(error: BaseException) -> None:
    guard = Guard()
    assert call(guard, error) == (-1, errno.EINTR)
    with pytest.raises(type(error)) as raised:
        guard.reraise()
    assert raised.value is error
    guard.reraise()


def test_the_failure_is_the_callbacks_own() -> None:
    assert call(Guard(), ValueError(), 0) == (0, errno.EIO)
