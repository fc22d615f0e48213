# SPDX-License-Identifier: BSD-3-Clause
"""The states of a migrating device as one table: what each means, and the steps between them. Pure.

v2 (specification: "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE", linux/vfio.h `enum vfio_device_mig_state`): a
client names a state, and the device goes there over single steps, the *arcs*. `path` finds them.

v1 (specification of libvfio-user: "VFIO Device Migration Info", linux/vfio.h 5.8 to 5.17): three bits,
each legal combination of which is one of the same states. `v1_path` knows which changes v1 allows; what is
one change there may be several arcs here.

docs/migration.md draws its diagrams from these tables.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from vfio_user.protocol.constants import MigrationState, MigrationV1State
from vfio_user.protocol.errors import DeviceError

_S, _V1 = MigrationState, MigrationV1State
_PRE_COPY_V1 = _V1.RUNNING | _V1.SAVING


@dataclass(frozen=True, slots=True)
class StateRow:
    """`v1` is what device_state shows in this state. `runs`: the device works. `saves`: a stream of its
    state can be read ("saving group"). `arcs` are the states that one step leads to."""

    v1: MigrationV1State
    text: str
    runs: bool = False
    saves: bool = False
    arcs: tuple[MigrationState, ...] = ()


STATES: Mapping[MigrationState, StateRow] = {
    _S.RUNNING: StateRow(_V1.RUNNING, "the device works", runs=True, arcs=(_S.RUNNING_P2P, _S.PRE_COPY)),
    _S.RUNNING_P2P: StateRow(
        _V1.RUNNING,
        "starts nothing, so that no other device is touched; takes and remembers what it is asked",
        arcs=(_S.RUNNING, _S.STOP, _S.PRE_COPY_P2P),
    ),
    _S.STOP: StateRow(
        _V1.STOP, "stands still, inside and outside", arcs=(_S.RUNNING_P2P, _S.STOP_COPY, _S.RESUMING)
    ),
    _S.STOP_COPY: StateRow(_V1.SAVING, "stands still; its state is read", saves=True, arcs=(_S.STOP,)),
    _S.RESUMING: StateRow(_V1.RESUMING, "stands still; a state is written", arcs=(_S.STOP,)),
    _S.PRE_COPY: StateRow(
        _PRE_COPY_V1,
        "the device works; its state is read already",
        runs=True,
        saves=True,
        arcs=(_S.RUNNING, _S.PRE_COPY_P2P),
    ),
    _S.PRE_COPY_P2P: StateRow(
        _PRE_COPY_V1,
        "as RUNNING_P2P; its state is read already",
        saves=True,
        arcs=(_S.PRE_COPY, _S.RUNNING_P2P, _S.STOP_COPY),
    ),
    _S.ERROR: StateRow(_V1.ERROR, "a restore has failed; a reset leads out"),
}
"""Specification: "Direct State Transitions", with the P2P states of linux/vfio.h in between."""

V1_ARCS: Mapping[MigrationV1State, tuple[MigrationV1State, ...]] = {
    _V1.STOP: (_V1.RUNNING,),
    _V1.RUNNING: (_V1.STOP, _V1.SAVING, _PRE_COPY_V1, _V1.RESUMING),
    _V1.SAVING: (_V1.STOP, _V1.RUNNING),
    # The table of the specification has no way from pre-copy back to running. QEMU 5.2 to 7.2 cancels a
    # migration so, and without it the device of a cancelled migration would be left in pre-copy.
    _PRE_COPY_V1: (_V1.SAVING, _V1.RUNNING),
    _V1.RESUMING: (_V1.RUNNING,),
    _V1.ERROR: (),
}
"""v1 specification: "VFIO Device Migration Info", the table of valid transitions."""

V1_STATES: Mapping[int, MigrationState] = {
    int(STATES[state].v1): state
    for state in (_S.STOP, _S.RUNNING, _S.STOP_COPY, _S.PRE_COPY, _S.RESUMING, _S.ERROR)
}
"""What a value of device_state stands for. v1 has no P2P states; 101 and 111 stand for nothing."""

Path = tuple[MigrationState, ...]
"""The states that are entered, in order; empty when nothing is to be done."""


def _search(now: MigrationState, wanted: MigrationState) -> Path | None:
    """The shortest path. No session of saving is begun or ended on the way (specification: "Complex State
    Transitions"): states of the saving group are passed only where the whole path stays in one session."""
    session = STATES[now].saves and STATES[wanted].saves
    reached: dict[MigrationState, Path] = {now: ()}
    queue = deque([now])
    while queue:
        state = queue.popleft()
        for following in STATES[state].arcs:
            if following in reached or (following is not wanted and STATES[following].saves is not session):
                continue
            reached[following] = (*reached[state], following)
            queue.append(following)
    return reached.get(wanted)


PATHS: Mapping[tuple[MigrationState, MigrationState], Path | None] = {
    (now, wanted): _search(now, wanted) for now in STATES for wanted in STATES
}
"""By the state now and the one wanted; None where there is no way."""


def path(now: MigrationState, wanted: int) -> Path:
    """The arcs from `now` to `wanted`, as vfio_mig_get_next_state() of Linux walks them.

    DeviceError (EINVAL): no such state, ERROR, or no way there.
    """
    try:
        found = PATHS[now, MigrationState(wanted)]
    except ValueError:
        raise DeviceError(f"there is no migration state {wanted}") from None
    if found is None or wanted == MigrationState.ERROR:
        raise DeviceError(f"no way leads from {now.name} to {MigrationState(wanted).name}")
    return found


def v1_path(now: MigrationState, value: int) -> Path:
    """The arcs that writing `value` to device_state means; none where it says nothing new.

    DeviceError (EINVAL): not a legal combination of bits, or not a legal change.
    """
    before, wanted = STATES[now].v1, V1_STATES.get(value)
    if wanted is None:
        raise DeviceError(f"device_state {value:#x} is no state")
    if value != before and value not in V1_ARCS[before]:
        raise DeviceError(f"device_state may not change from {before:#05b} to {value:#05b}")
    return path(now, wanted)
