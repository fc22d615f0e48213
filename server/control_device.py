# SPDX-License-Identifier: BSD-3-Clause
"""What a controller does with the device: stop, resume, save, load, reset.

While a controller has the device stopped, saves or restores it, it has claimed the migration engine: the
client's own requests of migration are refused, and ours are while the client migrates the device itself.
A client's reset, and its end, end the claim.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.json_rpc import FAILED, REFUSED, RpcError
from vfio_user.server.control_jobs import MILLISECOND, Later, Steps
from vfio_user.server.control_streams import Sink, Source
from vfio_user.server.engines.engine import Engine

logger = logging.getLogger(__name__)

_S = MigrationState
LOOK_AGAIN = 2 * MILLISECOND
"""Between two looks for what has changed, while a save is held."""
SMALL = 1 << 20
"""Bytes that are left to a short stop."""
MAX_ROUNDS = 4
"""Times the device's memory that are streamed before it is stopped, although much is left."""


@dataclass(slots=True)
class Transfer:
    """A save or a load, under way or over."""

    method: str
    bytes: int = 0
    error: str | None = None

    def progress(self) -> dict[str, str | int]:
        """For `state`."""
        return {"method": self.method, "bytes": self.bytes}


class DeviceControl:
    """One for the server: the controllers have the device together."""

    def __init__(self, engine: Engine[Any], cut: Callable[[], None]) -> None:
        """`cut` ends the job of a transfer."""
        assert engine.device is not None
        self._cut = cut
        self.engine = engine
        self.device = engine.device
        self.host = engine.host
        self.migration = engine.host.migration
        self.transfer: Transfer | None = None
        self.last_transfer: Transfer | None = None
        self._stop_wanted = False
        """A `stop` came while a state was saved or loaded."""

    @property
    def claimed(self) -> bool:
        """Whether a controller has the device stopped, saves or restores it."""
        return self.migration.claim is self

    def _require_free(self) -> None:
        """It is not the client who migrates the device at the moment."""
        state = self.migration.state
        if not self.claimed and state is not _S.RUNNING:
            raise RpcError(REFUSED, f"the client moves the device itself, which is in {state.name}")
        if self.transfer is not None and not self.claimed:
            raise RpcError(REFUSED, f"a {self.transfer.method} that a reset has spoilt has not ended yet")

    def _begin(self, method: str) -> None:
        self._require_free()
        if not self.migration.available:
            raise RpcError(REFUSED, f"a device of the model {self.device.model} cannot be saved and restored")
        if self.transfer is not None:
            raise RpcError(REFUSED, f"a {self.transfer.method} is under way: wait, or cancel it")

    # Stop and resume

    def stop(self, wait_ms: int, tell: Callable[[], dict[str, Any]]) -> Steps:
        """Stop the device, and add what `tell` gives; when that fails, nothing has been stopped.

        What the client has sent before is served first, and replies that it owes are waited for: as long as
        `wait_ms`.
        """
        self._require_free()
        try:
            if self.host.running:
                yield from self._drain(time.monotonic_ns() + wait_ms * MILLISECOND)
            self._require_free()
            before = self.host.running, self.claimed, self._stop_wanted
            self.migration.claim = self
            self._stop_wanted = self.transfer is not None
            wanted = _S.STOP_COPY if self.migration.saving else _S.STOP
            if not self.migration.resuming and self.migration.state is not wanted:
                self._go(wanted)
            told = self._tell(tell, *before)
        finally:
            if self.host.running:  # it was cut, or refused
                self.host.gate.open()
        return {"running": self.host.running, "unanswered_dma": self.engine.outstanding, **told}

    def _drain(self, deadline: int) -> Steps:
        """The engine's loop serves what is unread: a posted write that was sent before is in the state.

        The gate stays closed: the last look at the replies, before the stop, would let tasks send more.
        """
        self.host.gate.close()
        self.host.dma.take_no_short_way()
        before = 0
        while ((unread := self.engine.unread) or self.engine.outstanding) and time.monotonic_ns() < deadline:
            yield Later(0 if unread != before else MILLISECOND // 4)  # no haste where nothing moves
            before = unread

    def _tell(
        self, tell: Callable[[], dict[str, Any]], ran: bool, claimed: bool, stop_wanted: bool
    ) -> dict[str, Any]:
        try:
            return tell()
        except Exception as error:
            self._undo_stop(ran, claimed, stop_wanted)
            if isinstance(error, RpcError):
                raise
            logger.exception("a stopped device could not be described")
            raise RpcError(FAILED, f"{type(error).__name__}: {error}") from error

    def _undo_stop(self, ran: bool, claimed: bool, stop_wanted: bool) -> None:
        self._stop_wanted = stop_wanted
        if self.transfer is not None:
            if ran:
                self._cut()  # no way leads back to where its memory is written while it runs
        elif ran:
            self.resume()
        elif not claimed:
            self.migration.abandon(self, _S.RUNNING)
            self.migration.claim = None

    def resume(self) -> Any:
        """Let a device that a controller has stopped go on; harmless when it runs."""
        if self.transfer is not None:
            raise RpcError(REFUSED, f"a {self.transfer.method} is under way: wait, or cancel it")
        self._require_free()
        if self.claimed:
            self._go(_S.RUNNING)
            self.migration.claim = None
            self._stand_still_without_client()
        return {"running": self.host.running}

    def blank(self, on: bool) -> Any:
        """Whether the client's accesses to BARs are kept from the model, as long as it stands still."""
        if on and (self.host.running or not self.claimed):
            raise RpcError(REFUSED, "no controller has stopped the device: stop it first")
        self.host.set_blank(on)
        return {"on": on}

    def reset(self) -> Any:
        """As the client's DEVICE_RESET."""
        self.host.reset()
        self.device.reset()
        self.migration.reset()
        self._stand_still_without_client()
        return {"running": self.host.running}

    def _stand_still_without_client(self) -> None:
        if not self.engine.attached:
            self.host.stop()  # the next client starts it

    def _go(self, wanted: MigrationState) -> None:
        try:
            self.migration.set_state(wanted, self)
        except DeviceError as error:
            raise RpcError(FAILED, error.reason) from error

    # Save

    @contextmanager
    def _transferring(self, method: str) -> Iterator[Transfer]:
        """`state` shows it, and afterwards what has become of it."""
        self.transfer = transfer = Transfer(method)
        try:
            yield transfer
        except RpcError as error:
            transfer.error = error.message
            raise
        except BaseException as error:
            cut = isinstance(error, GeneratorExit)
            transfer.error = "the controller has left, or it was cancelled" if cut else repr(error)
            raise
        finally:
            self.transfer, self.last_transfer = None, transfer

    def save(self, sink: Sink, hold: bool) -> Steps:
        """Write the state to `sink`, which is ours now. A running device runs on while its memory is
        written; at the end it is stopped for a moment, or with `hold` awaits a `stop` and stays stopped."""
        try:
            self._begin("save")
            origin, self.migration.claim = (self.migration.state, self.host.running), self
            with self._transferring("save") as transfer:
                try:
                    yield from self._write_all(sink, transfer, hold and origin[1])
                finally:
                    self._end_save(*origin)
        finally:
            sink.close()
        return {"bytes": transfer.bytes, "running": self.host.running}

    def _write_all(self, sink: Sink, transfer: Transfer, hold: bool) -> Steps:
        migration, most = self.migration, MAX_ROUNDS * self._memory_size()
        self._go(_S.PRE_COPY if self.host.running else _S.STOP_COPY)
        session = migration.session
        while True:
            self._require_session(session)
            data = self._next_record()
            transfer.bytes += len(data)
            yield from sink.write(data)
            self._require_session(session)
            copying = migration.state is _S.PRE_COPY
            if not data and not copying:
                return
            if copying and not hold and (migration.pending_bytes <= SMALL or transfer.bytes > most):
                self._go(_S.STOP_COPY)
            yield Later(LOOK_AGAIN if hold and not data else 0)

    def _memory_size(self) -> int:
        return sum(memory.size for memory in self.device.memories().values())

    def _next_record(self) -> bytes:
        try:
            record: bytes = self.migration.read_record(self)
            return record
        except DeviceError as error:
            raise RpcError(FAILED, error.reason) from error

    def _require_session(self, session: int) -> None:
        if not self.claimed or self.migration.session != session:
            raise RpcError(FAILED, "the client has reset the device, or left, while it was saved")

    def _end_save(self, origin: MigrationState, was_running: bool) -> None:
        """As it was before; but a `stop` that was asked for meanwhile stays in force."""
        if not self.claimed:
            return
        stopped = self._stays_stopped(origin)
        if was_running and not stopped:
            self._go(_S.RUNNING)
        else:
            self.migration.abandon(self, _S.STOP if stopped else _S.RUNNING)
        if not stopped:
            self.migration.claim = None

    def _stays_stopped(self, origin: MigrationState) -> bool:
        wanted, self._stop_wanted = self._stop_wanted, False
        return wanted or origin is _S.STOP

    # Load

    def load(self, source: Source) -> Steps:
        """Read a state from `source`, which is ours now, to its end, and put it into the stopped device."""
        try:
            self._begin("load")
            if self.host.running:
                raise RpcError(REFUSED, "the device runs: stop it first")
            origin, self.migration.claim = self.migration.state, self
            with self._transferring("load") as transfer:
                try:
                    yield from self._read_all(source, transfer)
                except DeviceError as error:
                    raise RpcError(FAILED, error.reason) from error
                finally:
                    self._end_load(origin)
        finally:
            source.close()
        return {"bytes": transfer.bytes, "running": self.host.running}

    def _read_all(self, source: Source, transfer: Transfer) -> Steps:
        self.migration.set_state(_S.RESUMING, self)
        while data := (yield from source.read()):
            if not self.claimed:
                raise RpcError(FAILED, "the client has reset the device, or left, while it was loaded")
            self.migration.write(data, self)
            transfer.bytes += len(data)
            yield Later()
        if not self.claimed:
            raise RpcError(FAILED, "the client has reset the device, or left, while it was loaded")
        self.migration.set_state(_S.STOP, self)

    def _end_load(self, origin: MigrationState) -> None:
        """Loaded or not, it stands as before: stopped by a controller, or waiting for a client to use it."""
        if not self.claimed:
            return
        stopped = self._stays_stopped(origin)
        self.migration.abandon(self, _S.STOP if stopped else _S.RUNNING)
        if not stopped:
            self.migration.claim = None
