# SPDX-License-Identifier: BSD-3-Clause
"""One migration engine for both editions: it walks the states of `protocol.migration` and owns the stream.

Every change of state is complete when it returns, and waits for nobody: what the device has under way
stands still, and goes on or is begun anew where the device goes on.

When a step fails:

- A state that cannot be saved leaves the device where the request found it: running, if it ran.
- A state that cannot be restored leaves the device as it was before, and the engine in ERROR: it must not
  be taken for the device that was to come. A reset leads out, as does the next client.
"""

import errno
import logging
from collections.abc import Callable, Mapping

from vfio_user.device_models.device import Device
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.state import StateError
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.migration import STATES, Path, path, v1_path
from vfio_user.server.migration.reader import StreamReader
from vfio_user.server.migration.restore import NotUndone, Stoppable, restore
from vfio_user.server.migration.stream import Shape
from vfio_user.server.migration.writer import StreamWriter

logger = logging.getLogger(__name__)

_S = MigrationState
_RESTORE = (_S.RESUMING, _S.STOP)
_HANDED_OVER = (_S.STOP, _S.STOP_COPY)


class MigrationEngine:
    """The migration of one device, whoever is its client. Every method may raise DeviceError."""

    def __init__(self, device: Device, host: Stoppable) -> None:
        self._device = device
        self._host = host
        self._writer: StreamWriter | None = None
        self._reader: StreamReader | None = None
        self._broken = False
        """A restore has failed, and so has the way back: only a reset helps."""
        self.session = 0
        """Another number when a session of saving begins or ends; pre-copy and stop-and-copy are one."""
        self.state = MigrationState.RUNNING
        self.reason = ""
        """Why the state is ERROR."""
        self.edition: str | None = None
        """The edition of the protocol ("v1", "v2") in which the client has asked for migration: it can move
        its device itself. None: it has not."""
        self.claim: object | None = None
        """Who else than the client has the device stopped, saves or restores it (`server/control_device.py`).
        Requests of anybody else are refused then, but for a reset, which ends it, as does a client's end."""

    @property
    def available(self) -> bool:
        """Whether the model can be saved and restored at all."""
        return self._device.state_version > 0

    @property
    def may_run(self) -> bool:
        """Whether the device works in this state, once its client uses it."""
        return STATES[self.state].runs

    @property
    def saving(self) -> bool:
        return self._writer is not None

    @property
    def resuming(self) -> bool:
        return self._reader is not None

    # Changes of state

    def set_state(self, wanted: int, by: object | None = None) -> None:
        """Go to a MigrationState over single steps. EINVAL: no such state, or no way; EIO: a step failed.

        `by`: see `claim`; here and elsewhere EBUSY when somebody else has claimed the device.
        """
        self._check_claim(by)
        self._walk(path(self.state, wanted))

    def set_v1_state(self, value: int) -> None:
        """Go where the bits of v1's device_state say. Errors as of `set_state`."""
        self._check_claim(None)
        self._walk(v1_path(self.state, value))

    def reset(self) -> None:
        """The device has been reset: it is running, and no session is left."""
        self._forget()
        self.claim = None
        self._broken = False
        self.state = MigrationState.RUNNING
        self._resume()

    def client_left(self) -> None:
        """What was half done belonged to the client. The device keeps its state, stopped for the next.

        A device that stood still by a client's wish may run elsewhere by now. It stands still until the next
        client resets it or says that it shall run: its old work is not to be done on that client's memory.
        """
        self._forget()
        self.claim = self.edition = None
        if not self._broken:
            self.state = _S.STOP if self.state in _HANDED_OVER else _S.RUNNING

    def abandon(self, by: object, state: MigrationState) -> None:
        """End a session of the claimer's: the device stands still, and is said to be in `state` again.

        Nothing of a state that was being written is applied; a failed restore that was undone is forgotten.
        """
        self._check_claim(by)
        broken = self.reason if self._broken else ""
        self._forget()
        if self._broken:
            self.reason = broken
        else:
            self.state = state

    def _check_claim(self, by: object | None) -> None:
        if self.claim is not by:
            raise DeviceError(
                "another controller has the device: it is stopped, saved or restored", errno.EBUSY
            )

    def _forget(self) -> None:
        self._end_saving()
        self._end_resuming()
        self.reason = ""

    def _walk(self, steps: Path) -> None:
        origin, was_running = self.state, self._host.running
        for step in steps:
            arc = self.state, step
            try:
                ACTIONS[arc](self)
            except Exception as error:
                if arc == _RESTORE:
                    self._fail(error)
                elif origin not in (_S.RESUMING, _S.STOP_COPY):
                    self._go_back(origin, was_running)
                raise _as_device_error(f"{arc[0].name} to {step.name}", error) from error
            self.state = step
        if not steps and self.state is _S.RUNNING:
            self._resume()  # said in so many words: the client is ready for the device to work

    def _fail(self, error: Exception) -> None:
        self._forget()
        self.state = MigrationState.ERROR
        self.reason = str(error) or repr(error)
        logger.error("%s: the state cannot be restored: %s", self._device.model, self.reason)

    def _go_back(self, origin: MigrationState, was_running: bool) -> None:
        """Saving has failed, which changes nothing: the device goes on where it was."""
        if not STATES[origin].saves:
            self._end_saving()
        self.state = origin
        if was_running:
            self._resume()

    # The stream

    @property
    def pending_bytes(self) -> int:
        """Bytes that can be read now, roughly; 0 exactly when there are none."""
        return self._session().pending

    def read_record(self, by: object) -> bytes:
        """The claimer's way to read: as `read`, about a megabyte at a time, and the device may go on."""
        self._check_claim(by)
        writer = self._session()
        try:
            return writer.take_record()
        except Exception as error:
            raise _as_device_error("saving", error) from error

    def read(self, size: int) -> list[Buffer]:
        """At most `size` bytes of state; fewer: the end, or in PRE_COPY nothing more now. EINVAL: no saving.

        They are to be sent before the device can go on: see `StreamWriter.take`.
        """
        self._check_claim(None)
        writer = self._session()
        try:
            return writer.take(size)
        except Exception as error:
            raise _as_device_error("saving", error) from error

    def prepare(self) -> None:
        """There is nothing to do, as while the client takes what it has read: make ready the next block."""
        if self._writer is not None and self.state is _S.STOP_COPY:
            self._writer.prepare()

    def _session(self) -> StreamWriter:
        if self._writer is None:
            raise DeviceError(f"there is nothing to read in {self.state.name}")
        return self._writer

    def write(self, data: Buffer, by: object | None = None) -> None:
        """The next bytes of a state. EINVAL: not resuming; or the stream is bad, and the state is ERROR."""
        self._check_claim(by)
        if self._reader is None:
            raise DeviceError(f"nothing can be written in {self.state.name}")
        try:
            self._reader.feed(data)
        except StateError as error:
            self._fail(error)
            raise _as_device_error("restoring", error) from error

    # What the arcs do

    def _nothing(self) -> None:
        """The device stands still before and after."""

    def _quiesce(self) -> None:
        self._host.settle()
        self._host.stop()

    def _resume(self) -> None:
        if not self._host.running:
            self._host.resume()

    def _begin_saving(self) -> None:
        self._writer = StreamWriter(self._device, self._host.settle)
        self.session += 1

    def _complete_saving(self) -> None:
        self._session().finish()

    def _save_stopped(self) -> None:
        self._begin_saving()
        try:
            self._complete_saving()
        except Exception:
            self._end_saving()
            raise

    def _end_saving(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            self.session += 1
            try:
                writer.close()
            except Exception:
                logger.exception("%s failed to stop watching its memory", self._device.model)

    def _begin_resuming(self) -> None:
        self._reader = StreamReader(Shape.of(self._device))

    def _restore(self) -> None:
        """Swap the new state in. If anything raises, the device has the state of before, or is broken."""
        assert self._reader is not None
        try:
            restore(self._device, self._host, self._reader.finish())
        except NotUndone as error:
            self._broken = True
            raise error.take_reason() from None
        self._end_resuming()

    def _end_resuming(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


ACTIONS: Mapping[tuple[MigrationState, MigrationState], Callable[[MigrationEngine], None]] = {
    (_S.RUNNING, _S.RUNNING_P2P): MigrationEngine._quiesce,
    (_S.RUNNING, _S.PRE_COPY): MigrationEngine._begin_saving,
    (_S.RUNNING_P2P, _S.RUNNING): MigrationEngine._resume,
    (_S.RUNNING_P2P, _S.STOP): MigrationEngine._nothing,
    (_S.RUNNING_P2P, _S.PRE_COPY_P2P): MigrationEngine._begin_saving,
    (_S.STOP, _S.RUNNING_P2P): MigrationEngine._nothing,
    (_S.STOP, _S.STOP_COPY): MigrationEngine._save_stopped,
    (_S.STOP, _S.RESUMING): MigrationEngine._begin_resuming,
    (_S.STOP_COPY, _S.STOP): MigrationEngine._end_saving,
    (_S.RESUMING, _S.STOP): MigrationEngine._restore,
    (_S.PRE_COPY, _S.RUNNING): MigrationEngine._end_saving,
    (_S.PRE_COPY, _S.PRE_COPY_P2P): MigrationEngine._quiesce,
    (_S.PRE_COPY_P2P, _S.PRE_COPY): MigrationEngine._resume,
    (_S.PRE_COPY_P2P, _S.RUNNING_P2P): MigrationEngine._end_saving,
    (_S.PRE_COPY_P2P, _S.STOP_COPY): MigrationEngine._complete_saving,
}
"""What is done on each arc of `protocol.migration.STATES`; a test compares the two."""


def _as_device_error(doing: str, error: Exception) -> DeviceError:
    """A bad stream is the client's (EINVAL), anything else the model's (EIO)."""
    if isinstance(error, DeviceError):
        return error
    if not isinstance(error, StateError):
        logger.error("the device failed in %s", doing, exc_info=error)
    return DeviceError(f"{doing}: {error}", errno.EINVAL if isinstance(error, StateError) else errno.EIO)
