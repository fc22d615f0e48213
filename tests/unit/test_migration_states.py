# SPDX-License-Identifier: BSD-3-Clause
"""The table of migration states: arcs, shortest paths, and v1's bits mapped on them."""

import errno
from itertools import pairwise, product

import pytest

from vfio_user.protocol.constants import MigrationState, MigrationV1State
from vfio_user.protocol.errors import DeviceError
from vfio_user.protocol.migration import PATHS, STATES, V1_ARCS, V1_STATES, path, v1_path
from vfio_user.server.migration.engine import ACTIONS

S = MigrationState
NAMES = {
    "R": S.RUNNING,
    "P": S.RUNNING_P2P,
    "S": S.STOP,
    "C": S.STOP_COPY,
    "L": S.RESUMING,
    "p": S.PRE_COPY,
    "q": S.PRE_COPY_P2P,
}

# linux/vfio_main.c names the combinations that vfio_mig_get_next_state() steps through, with every optional
# feature there. R running, P running P2P, S stop, C stop copy, L resuming (load), p pre-copy, q pre-copy P2P.
COMBINATIONS = [
    "pqC",
    "pRP",
    "pRPS",
    "pRPSL",
    "qPR",
    "qPS",
    "qPSL",
    "LSP",
    "LSPq",
    "LSPR",
    "LSPRp",
    "LSC",
    "RPq",
    "RPS",
    "RPSL",
    "RPSC",
    "PRp",
    "PSL",
    "PSC",
    "SPq",
    "SPR",
    "SPRp",
    "CSL",
    "CSP",
    "CSPR",
]
ARCS = ["LS", "SL", "SC", "CS", "RP", "PR", "PS", "SP", "pR", "pq", "qp", "qP", "qC", "Rp", "Pq"]
BLOCKED = ["Cp", "Cq"]


# linux/vfio.h, enum vfio_device_mig_state: "The FSM takes actions on the arcs between FSM states"


def test_the_arcs_are_those_of_the_kernel() -> None:
    assert {(NAMES[arc[0]], NAMES[arc[1]]) for arc in ARCS} == {
        (state, following) for state, row in STATES.items() for following in row.arcs
    }


def test_every_arc_has_its_action_and_no_other_has_one() -> None:
    assert set(ACTIONS) == {(state, following) for state, row in STATES.items() for following in row.arcs}


# Specification: "Complex State Transitions"


@pytest.mark.parametrize("walk", [*ARCS, *COMBINATIONS])
def test_a_request_walks_the_path_of_the_kernel(walk: str) -> None:
    states = [NAMES[letter] for letter in walk]
    assert path(states[0], states[-1]) == tuple(states[1:])


def test_every_pair_is_a_path_of_the_kernel_or_is_blocked() -> None:
    known = {(walk[0], walk[-1]) for walk in [*ARCS, *COMBINATIONS, *BLOCKED]}
    assert known == {(a, b) for a, b in product(NAMES, NAMES) if a != b}


def test_no_session_of_saving_lies_inside_a_path() -> None:
    for (now, wanted), steps in PATHS.items():
        inside = [STATES[state].saves for state in (steps or ())[:-1]]
        assert not any(inside) or (all(inside) and STATES[now].saves and STATES[wanted].saves)


def test_every_step_of_a_path_is_an_arc() -> None:
    for (now, _), steps in PATHS.items():
        for state, following in pairwise((now, *(steps or ()))):
            assert following in STATES[state].arcs


@pytest.mark.parametrize("state", S)
def test_the_state_that_is_there_is_reached_without_a_step(state: MigrationState) -> None:
    if state is not S.ERROR:
        assert path(state, state) == ()


# Specification: "Direct State Transitions"


@pytest.mark.parametrize("walk", BLOCKED)
def test_stop_copy_to_pre_copy_is_not_allowed(walk: str) -> None:
    with pytest.raises(DeviceError, match="STOP_COPY to PRE_COPY") as caught:
        path(NAMES[walk[0]], NAMES[walk[1]])
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("state", S)
def test_error_cannot_be_asked_for_and_only_a_reset_leads_out_of_it(state: MigrationState) -> None:
    with pytest.raises(DeviceError):
        path(state, S.ERROR)
    with pytest.raises(DeviceError):
        path(S.ERROR, state)


@pytest.mark.parametrize("number", [8, 9, 255, 0xFFFFFFFF])
def test_a_number_that_is_no_state_is_refused(number: int) -> None:
    with pytest.raises(DeviceError, match="no migration state"):
        path(S.RUNNING, number)


# v1: linux/vfio.h of 5.8 to 5.17, "device_state consists of 3 bits"

STOP, RUNNING, SAVING, PRE_COPY, RESUMING, ERROR = 0b000, 0b001, 0b010, 0b011, 0b100, 0b110
LEGAL = {
    (STOP, RUNNING): "SPR",
    (RUNNING, STOP): "RPS",
    (RUNNING, SAVING): "RPSC",
    (RUNNING, PRE_COPY): "Rp",
    (RUNNING, RESUMING): "RPSL",
    (SAVING, STOP): "CS",
    (SAVING, RUNNING): "CSPR",
    (PRE_COPY, SAVING): "pqC",
    (PRE_COPY, RUNNING): "pR",
    (RESUMING, RUNNING): "LSPR",
}


def test_bits_mean_states() -> None:
    assert V1_STATES == {
        STOP: S.STOP,
        RUNNING: S.RUNNING,
        SAVING: S.STOP_COPY,
        PRE_COPY: S.PRE_COPY,
        RESUMING: S.RESUMING,
        ERROR: S.ERROR,
    }


@pytest.mark.parametrize(("now", "value"), [*product(V1_STATES, range(16))])
def test_each_change_of_device_state(now: int, value: int) -> None:
    """The specification's table of valid transitions, and every combination that is not in it."""
    state = V1_STATES[now]
    if (now, value) in LEGAL:
        walk = LEGAL[now, value]
        assert v1_path(state, value) == tuple(NAMES[letter] for letter in walk[1:])
        assert state is NAMES[walk[0]]
    elif value == now and now != ERROR:
        assert v1_path(state, value) == ()
    else:
        with pytest.raises(DeviceError) as caught:
            v1_path(state, value)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("value", [1 << 3, 1 << 31, RUNNING | 1 << 3, 0xFFFFFFFF])
def test_reserved_bits_must_be_zero(value: int) -> None:
    with pytest.raises(DeviceError, match="is no state"):
        v1_path(S.RUNNING, value)


def test_p2p_states_show_as_what_v1_has() -> None:
    assert STATES[S.RUNNING_P2P].v1 == MigrationV1State.RUNNING
    assert STATES[S.PRE_COPY_P2P].v1 == MigrationV1State.RUNNING | MigrationV1State.SAVING


def test_from_a_p2p_state_v1_goes_on() -> None:
    assert v1_path(S.RUNNING_P2P, RUNNING) == (S.RUNNING,)
    assert v1_path(S.RUNNING_P2P, STOP) == (S.STOP,)
    assert v1_path(S.PRE_COPY_P2P, SAVING) == (S.STOP_COPY,)


def test_both_tables_know_every_state() -> None:
    assert set(STATES) == set(MigrationState)
    assert {int(value) for value in V1_ARCS} == set(V1_STATES)
