# SPDX-License-Identifier: BSD-3-Clause
"""A server does not grow with the moves of its device: good ones, refused ones, those that nobody ends.

After the last of these the library gets a new context.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from conformance import moving, wire
from conformance.limits import edition_of_library, require_library
from conformance.moving import PIECE, V1_PRE_COPY, V1_RESUMING, V1_RUNNING, V1_SAVING, S
from conformance.nursery import Child, Order, Zygote
from conformance.raw import RawClient, connect, connect_next
from conformance.sizes import Size
from vfio_user.device_models.scratch import Scratch
from vfio_user.server.engines.engine import Settings

MOVES = 60
MEMORY = 64 << 10

pytestmark = pytest.mark.timeout(120)


Server = tuple[Path, Child]


@pytest.fixture
def serve(zygote: Zygote, tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts a server of an engine in a process of its own, whose device has a large memory."""
    with ExitStack() as stack:

        def start(engine: str) -> Server:
            path, options = tmp_path / "s", (f"memory={MEMORY}",)
            order = Order(engine, Scratch, path, tmp_path / "log", options, Settings(spin_us=0), life=110)
            return path, stack.enter_context(closing(zygote.fork(order)))

        yield start


async def fill(raw: RawClient) -> None:
    await moving.write_words(raw, b"\xa5" * MEMORY, 0, 2)


# Each is one client's visit; it may end with it in the middle of anything. The device is never reset by it,
# but where it says so, so that a restored one is what the next one saves.


async def save_v2(raw: RawClient) -> bytes:
    await moving.set_state(raw, S.STOP_COPY)
    return await moving.read_stream(raw)


async def good_v2(raw: RawClient) -> None:
    data = await save_v2(raw)
    assert (await moving.set_state(raw, S.RUNNING, S.RESUMING)).ok
    await moving.write_stream(raw, data)
    assert (await moving.set_state(raw, S.RUNNING)).ok


async def good_v1(raw: RawClient) -> None:
    await moving.set_v1(raw, V1_PRE_COPY)
    parts = [await first_part_v1(raw)]
    await moving.set_v1(raw, V1_SAVING)
    parts += await moving.iterate(raw)
    await moving.set_v1(raw, V1_RUNNING, V1_RESUMING)
    await moving.resume_v1(raw, parts)
    await moving.set_v1(raw, V1_RUNNING)


async def first_part_v1(raw: RawClient) -> bytes:
    """It is not said that it has been read: the next pending_bytes does that."""
    assert await moving.read_field(raw, moving.PENDING)
    assert await moving.read_field(raw, moving.OFFSET) == moving.DATA
    return await moving.read_data(raw, await moving.read_field(raw, moving.SIZE))


async def abandoned_save_v2(raw: RawClient) -> None:
    assert (await moving.set_state(raw, S.PRE_COPY)).ok
    assert (await moving.data_read(raw, PIECE)).ok
    await moving.write_words(raw, b"\x5a" * 4096, 0, 2)  # there is something new to say
    assert (await moving.set_state(raw, S.STOP_COPY)).ok
    assert (await moving.data_read(raw, PIECE)).ok


async def abandoned_save_v1(raw: RawClient) -> None:
    await moving.set_v1(raw, V1_PRE_COPY)
    await first_part_v1(raw)
    await moving.set_v1(raw, V1_SAVING)
    assert await moving.read_field(raw, moving.PENDING)


async def abandoned_save_mapped_v1(raw: RawClient) -> None:
    await moving.set_v1(raw, V1_PRE_COPY)
    view = await moving.map_data(raw)
    await first_part_v1(raw)
    view.close()
    await moving.set_v1(raw, V1_SAVING)
    assert await moving.read_field(raw, moving.PENDING)


async def abandoned_restore_v2(raw: RawClient) -> None:
    data = await save_v2(raw)
    assert (await moving.set_state(raw, S.RUNNING, S.RESUMING)).ok
    await moving.write_stream(raw, data[: -len(data) // 3])


async def abandoned_restore_v1(raw: RawClient) -> None:
    await moving.set_v1(raw, V1_SAVING)
    parts = await moving.iterate(raw)
    await moving.set_v1(raw, V1_RUNNING, V1_RESUMING)
    await moving.resume_v1(raw, [parts[0][: -len(parts[0]) // 3]])


async def refused_restore_v2(raw: RawClient) -> None:
    data = await save_v2(raw)
    assert (await moving.set_state(raw, S.RUNNING, S.RESUMING)).ok
    await moving.write_stream(raw, data[:-1])
    assert (await moving.set_state(raw, S.RUNNING)).error
    assert await moving.get_state(raw) is S.ERROR
    assert (await raw.call(wire.RESET)).ok == b""
    await fill(raw)


async def refused_restore_v1(raw: RawClient) -> None:
    await moving.set_v1(raw, V1_SAVING)
    parts = await moving.iterate(raw)
    await moving.set_v1(raw, V1_RUNNING, V1_RESUMING)
    await moving.resume_v1(raw, [part[:-1] for part in parts])
    assert (await moving.write_field(raw, moving.DEVICE_STATE, V1_RUNNING)).error
    assert await moving.read_field(raw, moving.DEVICE_STATE) == moving.V1_ERROR
    assert (await raw.call(wire.RESET)).ok == b""
    await fill(raw)


VISITS: Mapping[str, Callable[[RawClient], Awaitable[None]]] = {
    visit.__name__: visit
    for visit in (
        good_v2,
        good_v1,
        abandoned_save_v2,
        abandoned_save_v1,
        abandoned_save_mapped_v1,
        abandoned_restore_v2,
        abandoned_restore_v1,
        refused_restore_v2,
        refused_restore_v1,
    )
}


OF_THE_LIBRARY = ("good", "abandoned_save", "abandoned_restore")
"""It has no mapped data area, and does not say that a restore has failed."""
CASES = [
    *(("native", name) for name in VISITS),
    *(("libvfio-user", f"{visit}_{edition_of_library()}") for visit in OF_THE_LIBRARY),
]


async def let_it_run(raw: RawClient, name: str) -> None:
    """It may have been left in STOP."""
    if name.endswith("v1"):
        await moving.set_v1(raw, V1_RUNNING)
    else:
        assert (await moving.set_state(raw, S.RUNNING)).ok


@pytest.mark.parametrize(("engine", "name"), CASES)
async def test_moves_that_come_and_go(
    serve: Callable[[str], Server], engine: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "libvfio-user":
        require_library()
        monkeypatch.setattr(moving, "exact_replies", False)
    path, child = serve(engine)
    async with connect(path) as raw:
        await fill(raw)
    for number in range(MOVES // 3 + MOVES):
        if number == MOVES // 3:
            before = await Size.of_idle(child.pid)
        if number == MOVES // 3 + MOVES // 2:
            before.half()
        async with connect_next(path) as raw:
            await let_it_run(raw, name)
            await VISITS[name](raw)
    await before.expect_unchanged()
    async with connect_next(path) as raw:
        await let_it_run(raw, name)
        assert await moving.read_words(raw, 4096, MEMORY - 4096, 2) == b"\xa5" * 4096
