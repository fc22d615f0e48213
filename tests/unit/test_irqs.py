# SPDX-License-Identifier: BSD-3-Clause
"""SET_IRQS with real eventfds and a real poller: masks, the automatic mask, resample, and no leak."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence

import pytest

from vfio_user.device_models.device import IrqIndex
from vfio_user.protocol.constants import IrqInfoFlags, IrqSetFlags
from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.irqs import Irqs
from vfio_user.transport.fds import OwnedFd
from vfio_user.transport.poller import Poller

INTX, MSI, MSIX, ERR, REQ = IrqIndex
NONE, BOOL, EVENTFD = IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD
MASK, UNMASK, TRIGGER = IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, IrqSetFlags.ACTION_TRIGGER


class Client:
    """The client's end: its eventfds, and the requests it sends."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.unmasked: list[tuple[IrqIndex, int]] = []
        counts = {INTX: 1, MSI: 4, MSIX: 8, REQ: 1}
        self.irqs = Irqs(self.poller, counts, lambda index, vector: self.unmasked.append((index, vector)))
        self.fds: list[int] = []

    def eventfd(self, initial: int = 0, flags: int = os.EFD_NONBLOCK) -> int:
        self.fds.append(os.eventfd(initial, flags | os.EFD_CLOEXEC))
        return self.fds[-1]

    def send(
        self,
        flags: int,
        index: int,
        start: int,
        count: int,
        *,
        data: Sequence[bool] = (),
        fds: Sequence[int] = (),
    ) -> None:
        """The request as it arrives: descriptors are the server's own duplicates."""
        self.irqs.set_irqs(flags, index, start, count, data, [OwnedFd(os.dup(fd)) for fd in fds])

    def give(self, index: int, start: int = 0, count: int = 1, action: int = TRIGGER) -> list[int]:
        """Send new eventfds for a range of vectors."""
        fds = [self.eventfd() for _ in range(count)]
        self.send(EVENTFD | action, index, start, count, fds=fds)
        return fds

    def close(self) -> None:
        self.irqs.release()
        self.poller.close()
        for fd in self.fds:
            os.close(fd)


def fired(fd: int) -> int:
    """How often the eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@pytest.fixture
def client() -> Iterator[Client]:
    before = len(os.listdir("/proc/self/fd"))
    client = Client()
    yield client
    client.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def server_fds(client: Client) -> int:
    """Eventfds that the server holds."""
    names = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    held = sum(os.path.lexists(name) and os.readlink(name) == "anon_inode:[eventfd]" for name in names)
    return held - len(client.fds)


# INTx


def test_intx_masks_itself_and_fires_again_on_unmask(client: Client) -> None:
    (fd,) = client.give(INTX)
    assert fired(fd) == 0
    client.irqs.set_level(True)
    assert fired(fd) == 1
    client.irqs.set_level(False)
    client.irqs.set_level(True)
    assert fired(fd) == 0, "masked by its own firing"
    client.send(NONE | UNMASK, INTX, 0, 1)
    assert fired(fd) == 1, "the level is still high"
    client.irqs.set_level(False)
    client.send(NONE | UNMASK, INTX, 0, 1)
    assert fired(fd) == 0
    client.irqs.set_level(True)
    assert fired(fd) == 1
    assert client.irqs.fired[INTX] == 3
    assert client.unmasked == []


def test_intx_masked_by_the_client(client: Client) -> None:
    (fd,) = client.give(INTX)
    client.send(NONE | MASK, INTX, 0, 1)
    client.irqs.set_level(True)
    assert fired(fd) == 0
    client.send(BOOL | UNMASK, INTX, 0, 1, data=[False])
    assert fired(fd) == 0
    client.send(BOOL | UNMASK, INTX, 0, 1, data=[True])
    assert fired(fd) == 1


def test_intx_unmask_eventfd_is_the_resample_fd(client: Client) -> None:
    (fd,) = client.give(INTX)
    (resample,) = client.give(INTX, action=UNMASK)
    client.irqs.set_level(True)
    assert fired(fd) == 1
    os.eventfd_write(resample, 1)
    assert client.poller.poll()
    assert fired(fd) == 1, "the level is still high"
    assert not client.poller.poll(), "the eventfd has been read"
    client.irqs.set_level(False)
    os.eventfd_write(resample, 3)
    client.poller.poll()
    assert fired(fd) == 0
    client.irqs.set_level(True)
    assert fired(fd) == 1


def test_a_mask_eventfd_masks(client: Client) -> None:
    (fd,) = client.give(INTX)
    (mask,) = client.give(INTX, action=MASK)
    os.eventfd_write(mask, 1)
    client.poller.poll()
    client.irqs.set_level(True)
    assert fired(fd) == 0


def test_a_resample_fd_that_somebody_else_has_read(client: Client) -> None:
    """The server must not wait for a count in a blocking eventfd that is gone again."""
    resample = client.eventfd(flags=0)
    client.give(INTX)
    client.send(EVENTFD | UNMASK, INTX, 0, 1, fds=[resample])
    client.irqs.set_level(True)
    vector = client.irqs._vectors[INTX][0]
    vector._signalled(UNMASK)  # as if the poller had seen a count that has been taken since
    assert vector.masked


def test_a_new_eventfd_fires_at_once_when_the_level_is_high(client: Client) -> None:
    client.irqs.set_level(True)
    (fd,) = client.give(INTX)
    assert fired(fd) == 1


def test_the_level_outlives_the_client_and_its_masks_do_not(client: Client) -> None:
    (old,) = client.give(INTX)
    client.give(INTX, action=UNMASK)
    client.irqs.set_level(True)
    assert fired(old) == 1
    client.irqs.release()
    assert server_fds(client) == 0
    assert not client.irqs.enabled(INTX)
    (new,) = client.give(INTX)
    assert (fired(new), fired(old)) == (1, 0)


def test_disable_forgets_the_masks_and_the_eventfds(client: Client) -> None:
    client.give(INTX)
    client.give(INTX, action=UNMASK)
    client.give(INTX, action=MASK)
    client.irqs.set_level(True)
    client.send(NONE | TRIGGER, INTX, 0, 0)
    assert server_fds(client) == 0
    assert not client.irqs.enabled(INTX)
    (fd,) = client.give(INTX)
    assert fired(fd) == 1


def test_an_exchanged_eventfd_keeps_the_mask(client: Client) -> None:
    client.give(INTX)
    client.irqs.set_level(True)
    (second,) = client.give(INTX)
    assert fired(second) == 0
    client.send(NONE | UNMASK, INTX, 0, 1)
    assert fired(second) == 1


# Message interrupts


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_messages_fire_their_vector(client: Client, index: IrqIndex) -> None:
    fds = client.give(index, 0, 4)
    assert client.unmasked == [(index, vector) for vector in range(4)]
    assert client.irqs.trigger(index, 2)
    assert client.irqs.trigger(index, 2)
    assert [fired(fd) for fd in fds] == [0, 0, 2, 0]


def test_msi_and_msix_are_kept_apart(client: Client) -> None:
    msi, msix = client.give(MSI)[0], client.give(MSIX)[0]
    client.send(NONE | MASK, MSI, 0, 1)
    assert not client.irqs.trigger(MSI, 0)
    assert client.irqs.trigger(MSIX, 0)
    assert (fired(msi), fired(msix)) == (0, 1)
    client.send(NONE | TRIGGER, MSIX, 0, 0)
    assert (client.irqs.enabled(MSI), client.irqs.enabled(MSIX)) == (True, False)


def test_without_an_eventfd_nothing_fires(client: Client) -> None:
    client.give(MSIX, 1, 2)
    assert [client.irqs.trigger(MSIX, vector) for vector in (0, 1, 2, 3, 100, -1)] == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]
    assert not client.irqs.trigger(ERR, 0)


def test_disabling_one_vector_disables_that_one(client: Client) -> None:
    fds = client.give(MSIX, 0, 4)
    client.send(EVENTFD | TRIGGER, MSIX, 2, 1)
    assert [client.irqs.trigger(MSIX, vector) for vector in range(4)] == [True, True, False, True]
    assert [fired(fd) for fd in fds] == [1, 1, 0, 1]
    assert server_fds(client) == 3
    client.send(EVENTFD | TRIGGER, MSIX, 0, 8)
    assert not client.irqs.enabled(MSIX)
    assert server_fds(client) == 0


def test_a_replaced_eventfd_is_closed(client: Client) -> None:
    old = client.give(MSIX, 0, 2)
    new = client.give(MSIX, 1, 2)
    assert server_fds(client) == 3
    for vector in range(3):
        client.irqs.trigger(MSIX, vector)
    assert [fired(fd) for fd in old + new] == [1, 0, 1, 1]


def test_unmasking_tells_the_device(client: Client) -> None:
    (fd,) = client.give(MSIX, 3)
    client.unmasked.clear()
    client.send(BOOL | MASK, MSIX, 2, 3, data=[True, True, False])
    assert not client.irqs.trigger(MSIX, 3)
    client.send(NONE | UNMASK, MSIX, 2, 3)
    assert client.unmasked == [(MSIX, 3)], "the only one with an eventfd"
    assert client.irqs.trigger(MSIX, 3)
    assert fired(fd) == 1


def test_a_masked_vector_with_a_new_eventfd_is_not_deliverable(client: Client) -> None:
    client.send(NONE | MASK, MSIX, 0, 1)
    client.give(MSIX)
    assert client.unmasked == []
    assert client.irqs.enabled(MSIX)


def test_loop_back(client: Client) -> None:
    fds = client.give(MSIX, 0, 3)
    client.send(BOOL | TRIGGER, MSIX, 0, 4, data=[True, False, True, True])
    client.send(NONE | TRIGGER, MSIX, 2, 1)
    assert [fired(fd) for fd in fds] == [1, 0, 2]
    (intx,) = client.give(INTX)
    client.send(NONE | TRIGGER, INTX, 0, 1)
    assert fired(intx) == 1
    (request,) = client.give(REQ)
    client.send(NONE | TRIGGER, REQ, 0, 1)
    assert fired(request) == 1


def test_a_model_that_fails_on_unmask_does_not_fail_the_request(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_index: IrqIndex, _vector: int) -> None:
        raise RuntimeError("a broken model")

    poller = Poller()
    irqs = Irqs(poller, {MSIX: 2}, fail)
    irqs.set_irqs(EVENTFD | TRIGGER, MSIX, 0, 2, (), [OwnedFd(os.eventfd(0)) for _ in range(2)])
    assert irqs.enabled(MSIX)
    assert "MSIX vector 1" in caplog.text
    irqs.release()
    poller.close()


# Stopped


def test_a_stopped_device_fires_nothing_until_it_runs_again(client: Client) -> None:
    intx, msix = client.give(INTX)[0], client.give(MSIX)[0]
    client.irqs.stop()
    client.irqs.set_level(True)
    assert not client.irqs.trigger(MSIX, 0)
    client.send(NONE | UNMASK, INTX, 0, 1)
    assert (fired(intx), fired(msix)) == (0, 0)
    client.unmasked.clear()
    client.irqs.resume()
    assert fired(intx) == 1
    assert client.unmasked == [(MSIX, 0)], "so that the device fires what is pending"


def test_a_level_that_falls_while_stopped(client: Client) -> None:
    (fd,) = client.give(INTX)
    client.irqs.stop()
    client.irqs.set_level(True)
    client.irqs.set_level(False)
    client.irqs.resume()
    assert fired(fd) == 0


# Bad requests


@pytest.mark.parametrize(
    ("flags", "index", "start", "count", "fds"),
    [
        (NONE | UNMASK, 5, 0, 1, 0),
        (NONE | UNMASK, 2**32 - 1, 0, 1, 0),
        (NONE | UNMASK, MSIX, 0, 9, 0),
        (NONE | UNMASK, MSIX, 8, 1, 0),
        (NONE | UNMASK, MSIX, 2**32 - 1, 2, 0),
        (NONE | UNMASK, MSIX, 1, 2**32 - 1, 0),
        (NONE | UNMASK, ERR, 0, 1, 0),
        (NONE | TRIGGER, MSIX, 3, 0, 0),
        (NONE | MASK, MSIX, 0, 0, 0),
        (EVENTFD | TRIGGER, MSIX, 0, 0, 0),
        (BOOL | UNMASK, MSIX, 0, 2, 0),
        (NONE | TRIGGER, MSIX, 0, 1, 0),
        (EVENTFD | TRIGGER, MSIX, 0, 2, 1),
        (EVENTFD | TRIGGER, MSIX, 0, 2, 3),
        (NONE | UNMASK, MSIX, 0, 1, 1),
        (NONE | EVENTFD | TRIGGER, MSIX, 0, 1, 1),
        (EVENTFD | TRIGGER | MASK, MSIX, 0, 1, 1),
        (EVENTFD, MSIX, 0, 1, 1),
        (TRIGGER, MSIX, 0, 1, 1),
        (EVENTFD | TRIGGER | 0x40, MSIX, 0, 1, 1),
    ],
)
def test_bad_requests(client: Client, flags: int, index: int, start: int, count: int, fds: int) -> None:
    descriptors = [client.eventfd() for _ in range(fds)]
    with pytest.raises(VfioUserError) as caught:
        client.send(flags, index, start, count, fds=descriptors)
    assert caught.value.errno == errno.EINVAL
    assert server_fds(client) == 0


def test_descriptors_that_are_no_eventfds(client: Client) -> None:
    old = client.give(MSIX, 0, 2)
    pipe = os.pipe()
    pair = socket.socketpair()
    others = [*pipe, *(sock.fileno() for sock in pair), os.open("/dev/null", os.O_RDWR), os.memfd_create("x")]
    for other in others:
        with pytest.raises(VfioUserError) as caught:
            client.send(EVENTFD | TRIGGER, MSIX, 0, 2, fds=[client.eventfd(), other])
        assert caught.value.errno == errno.EINVAL
    assert server_fds(client) == 2
    client.irqs.trigger(MSIX, 0)
    assert [fired(fd) for fd in old] == [1, 0], "nothing has changed"
    for sock in pair:
        sock.close()
    for other in (*pipe, *others[-2:]):
        os.close(other)


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_a_full_counter_is_harmless(client: Client, flags: int) -> None:
    full = client.eventfd(flags=flags)
    os.eventfd_write(full, 2**64 - 2)
    client.send(EVENTFD | TRIGGER, MSIX, 0, 1, fds=[full])
    assert client.irqs.trigger(MSIX, 0)
    assert os.eventfd_read(full) == 2**64 - 2


def test_the_clients_blocking_mode_is_left_alone(client: Client) -> None:
    fd = client.eventfd(flags=0)
    client.send(EVENTFD | TRIGGER, MSIX, 0, 1, fds=[fd])
    client.irqs.trigger(MSIX, 0)
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    assert os.eventfd_read(fd) == 1


# Information


def test_info(client: Client) -> None:
    flags = IrqInfoFlags
    assert client.irqs.info(INTX) == (flags.EVENTFD | flags.MASKABLE | flags.AUTOMASKED, 1)
    assert client.irqs.info(MSI) == (flags.EVENTFD | flags.MASKABLE | flags.NORESIZE, 4)
    assert client.irqs.info(MSIX) == (flags.EVENTFD | flags.MASKABLE, 8)
    assert client.irqs.info(ERR) == (flags.EVENTFD | flags.NORESIZE, 0)
    with pytest.raises(VfioUserError):
        client.irqs.info(5)


def test_disabling_an_index_without_vectors_is_harmless(client: Client) -> None:
    client.send(NONE | TRIGGER, ERR, 0, 0)
