# SPDX-License-Identifier: BSD-3-Clause
"""Interrupt causes, their mask and their moderation (Software Developer's Manual, 3.2.7 and 13.4.17 to 21).

Two mechanisms delay an interrupt. The delay timers (RDTR and RADV, TIDV and TADV) hold a cause back, the
throttle (ITR) holds the pin back: it rises at most once in the interval. Under INTx every interrupt costs
a VMM several synchronous register reads, so the throttle decides the throughput. Floors of the server's own
may make the interval longer than the guest asked for, after much was moved, and unless the receive ring runs
out of descriptors.
"""

from collections.abc import Callable

from vfio_user.device_models.device import Host
from vfio_user.device_models.e1000.bits import Cause
from vfio_user.device_models.e1000.options import LONGEST_INTERVAL
from vfio_user.device_models.interrupts import Interrupts
from vfio_user.device_models.registers import Cell, RegisterFile
from vfio_user.device_models.state import U16, U64, Apply, Fields, Reader, Section, counted, time_left
from vfio_user.device_models.timers import Timer

ITR_UNIT = 256  # ns (13.4.18)
DELAY_UNIT = 1024  # ns (13.4.30, 13.4.44)
BULK = 10_000
"""Bytes of frames between two interrupts from which on a floor counts: it holds no round trips up."""
ANSWERS = 1 / 8
"""Of the bytes that were moved, sent ones up to this share are the answers of one that receives."""
LONGEST_WAIT = max(U16 * ITR_UNIT, LONGEST_INTERVAL * 1000)


class Causes:
    """ICR and IMS, and the pin that they drive."""

    def __init__(
        self, host: Host, pin: Interrupts, file: RegisterFile, floor: int, receive_floor: int = 0
    ) -> None:
        """`floor` is the least interval between two interrupts in nanoseconds, whatever ITR says, and
        `receive_floor` that of a guest which does nothing but receive, if it is longer: it waits for nothing
        but room in its ring, whereas one that sends waits to hear what was sent."""
        self._host = host
        self._pin = pin
        self._icr, self._ims, self._itr = file.cell("ICR"), file.cell("IMS"), file.cell("ITR")
        self._timer: Timer | None = None
        self._floor, self._receive_floor = floor, max(floor, receive_floor)
        self.ring_runs_out: Callable[[], bool] = lambda: False
        """Whether few receive descriptors are left at the moment. Then no floor of ours holds the guest up,
        which gives them back when it is interrupted: frames would have to wait."""
        self.not_before = 0
        """Device time at which the pin may rise next."""
        self._guests_not_before = 0
        """The same without the floor."""
        self._floor_in_force = 0
        self.received = self.sent = 0
        """Bytes of frames since the pin has risen."""
        self.fired = 0
        """How often the pin has risen."""

    def set(self, causes: int) -> None:
        """Causes have come up."""
        self._icr.value |= causes
        self.update()

    def read_icr(self, _index: int) -> int:
        value, self._icr.value = self._icr.value, 0
        if value:
            self.update()
        return value

    def read_ics(self, _index: int) -> int:
        return self._icr.value

    def write_icr(self, _index: int, value: int) -> None:
        """A written 1 acknowledges a cause."""
        self._icr.value &= ~value
        self.update()

    def write_ics(self, _index: int, value: int) -> None:
        self.set(value & Cause.ALL)

    def write_ims(self, _index: int, value: int) -> None:
        self._ims.value |= value & Cause.ALL
        self.update()

    def write_imc(self, _index: int, value: int) -> None:
        self._ims.value &= ~value
        if self._pin.level:
            self.update()

    def write_itr(self, _index: int, value: int) -> None:
        """A shorter interval holds at once, for the guest must not wait for the end of a long one."""
        self._itr.store(value)
        now, guests = self._host.clock(), self._itr.value * ITR_UNIT
        self._guests_not_before = min(self._guests_not_before, now + guests)
        self.not_before = min(self.not_before, now + max(guests, self._floor_in_force))
        self._stop_timer()
        self.update()

    def update(self) -> None:
        """Bring the pin to what ICR and IMS say: down at once, up when the throttle allows."""
        pending = self._icr.value & self._ims.value
        if not pending:
            if self._pin.level:
                self._pin.set_level(False)
        elif not self._pin.level:
            hurries = bool(pending & Cause.RXDMT0) and self.ring_runs_out()
            if self._timer is None or hurries:
                self._raise_when_due(hurries)

    def _raise_when_due(self, hurries: bool) -> None:
        self._stop_timer()
        now, due = self._host.clock(), self._guests_not_before if hurries else self.not_before
        if now >= due:
            self._raise(now)
        else:
            self._timer = self._host.call_at(due, self._throttle_over)

    def _raise(self, now: int) -> None:
        guests = self._itr.value * ITR_UNIT
        self._guests_not_before = now + guests
        self._floor_in_force = self._choose_floor()
        self.not_before = now + max(guests, self._floor_in_force)
        self.received = self.sent = 0
        self.fired += 1
        self._pin.set_level(True)

    def _choose_floor(self) -> int:
        """For the interval that begins, by what was moved in the last one."""
        moved = self.received + self.sent
        if moved < BULK:
            return 0
        return self._receive_floor if self.sent <= moved * ANSWERS else self._floor

    def _throttle_over(self) -> None:
        self._timer = None
        self.update()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reset(self) -> None:
        """After the registers have been reset."""
        self._stop_timer()
        self.not_before = self._guests_not_before = self._floor_in_force = 0
        self.received = self.sent = 0
        self.update()

    def section(self) -> Section:
        """What ICR and IMS do not hold."""
        return Section("moderation", 1, self._save, self._load)

    def _save(self) -> Fields:
        return {"wait": time_left(self.not_before, self._host.clock()), "fired": counted(self.fired)}

    def _load(self, reader: Reader) -> Apply:
        wait, fired = reader.integer("wait", LONGEST_WAIT), reader.integer("fired", U64)

        def apply() -> None:
            self._stop_timer()
            self.not_before = self._guests_not_before = self._host.clock() + wait
            self.fired, self.received, self.sent, self._floor_in_force = fired, 0, 0, 0

        return apply

    def restored(self) -> None:
        """Wait for what was left of the interval; the pin's level has been restored."""
        self._stop_timer()
        if not self._icr.value & self._ims.value:
            self._pin.set_level(False)
        elif not self._pin.level:
            self._timer = self._host.call_at(self.not_before, self._throttle_over)


class DelayedCause:
    """A cause with a packet timer, begun anew by each event, and an absolute one, begun by the first."""

    def __init__(self, host: Host, causes: Causes, bit: int, packet: Cell, absolute: Cell) -> None:
        self._host = host
        self._causes = causes
        self._bit = bit
        self._packet, self._absolute = packet, absolute
        self._timer: Timer | None = None
        self.waiting = False
        """Whether the guest has not been told yet of an event."""
        self.deadline = 0
        """When the packet timer ends; of no meaning while no event waits."""
        self.limit = 0
        """When the absolute timer ends."""

    def event(self) -> None:
        """Something happened that the guest is to learn of after the delay."""
        delay = self._packet.value
        if delay == 0:
            self._causes.set(self._bit)
            return
        now = self._host.clock()
        self.deadline = now + delay * DELAY_UNIT
        if not self.waiting:
            self.waiting = True
            self.limit = now + self._absolute.value * DELAY_UNIT if self._absolute.value else self.deadline
            self._arm()

    def flush(self) -> None:
        """End the delay now: for the flush bits, and before a cause that overtakes."""
        if self.waiting:
            self.reset()
            self._causes.set(self._bit)

    def reset(self) -> None:
        self.waiting = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def save(self) -> Fields | None:
        """The time left of both timers, if they run: for a section of the device's state."""
        now = self._host.clock()
        left = {"packet": time_left(self.deadline, now), "absolute": time_left(self.limit, now)}
        return {**left} if self.waiting else None

    def load(self, reader: Reader | None) -> Apply:
        """See `state.Section.load`."""
        longest = U16 * DELAY_UNIT
        left = reader and (reader.integer("packet", longest), reader.integer("absolute", longest))

        def apply() -> None:
            now = self._host.clock()
            self.reset()
            if left:
                self.waiting, self.deadline, self.limit = True, now + left[0], now + left[1]

        return apply

    def restored(self) -> None:
        """Let the timers run."""
        if self.waiting:
            self._arm()

    def _arm(self) -> None:
        self._timer = self._host.call_at(min(self.deadline, self.limit), self._expired)

    def _expired(self) -> None:
        self._timer = None
        if min(self.deadline, self.limit) > self._host.clock():
            self._arm()
        else:
            self.waiting = False
            self._causes.set(self._bit)
