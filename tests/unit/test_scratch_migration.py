# SPDX-License-Identifier: BSD-3-Clause
"""The scratch device moved at any moment: a copy goes on where it was, nothing of it is done twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.device_models.catalog import parse_options
from vfio_user.device_models.device import OptionError
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.fake_migration import restore_device, save_device
from vfio_user.device_models.scratch import BUSY, DONE, FAILED, Scratch
from vfio_user.device_models.state import StateError

SOURCE, TARGET, LENGTH = 0x1000, 0x8_0000, 300_000
PATTERN = bytes(number * 7 % 251 for number in range(LENGTH))


def make(mapped: bool = True, memory: int = 0) -> tuple[FakeHost, Scratch]:
    host = FakeHost(mapped=mapped)
    return host, Scratch(host, memory=memory)


def start_copy(device: Scratch, length: int = LENGTH) -> None:
    device.config.write(4, b"\x06\x00")
    bar = device.regions[0]
    bar.write(0xFE0, SOURCE.to_bytes(8, "little") + TARGET.to_bytes(8, "little"))
    bar.write(0xFF0, length.to_bytes(4, "little"))
    bar.write(0xFF8, bytes(4))


def status(device: Scratch) -> int:
    return int.from_bytes(device.regions[0].read(0xFFC, 4), "little")


def move(host: FakeHost, device: Scratch, mapped: bool, memory: int = 0) -> tuple[FakeHost, Scratch]:
    """The guest's memory goes along; its dirty pages are not the model's business."""
    new_host, new = make(mapped, memory)
    saved = save_device(host, device)
    restore_device(new_host, new, saved)
    assert save_device(new_host, new) == saved
    new_host.dma.memory[:] = host.dma.memory
    new_host.resume()
    return new_host, new


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=6))
def test_a_copy_is_done_once_over_any_number_of_moves(mapped: bool, moves: list[tuple[int, bool]]) -> None:
    host, device = make(mapped)
    host.dma.memory[SOURCE : SOURCE + LENGTH] = PATTERN
    start_copy(device)
    written = 0
    for answers, mapped_there in moves:
        if host.dma.mapped:
            for _ in range(answers):
                host.tasks.run_ready()
        else:
            host.answer(answers)
        written, (host, device) = written + _write_count(host, device), move(host, device, mapped_there)
        assert status(device) in (BUSY, DONE)
        assert host.irq_level == (status(device) == DONE)
    host.answer()
    assert (status(device), host.irq_level) == (DONE, True)
    assert host.dma.memory[TARGET : TARGET + LENGTH] == PATTERN
    assert written + host.dma.bytes_written == LENGTH


def _write_count(host: FakeHost, device: Scratch) -> int:
    """Bytes written at this host, whose VMM does what it was still asked for."""
    save_device(host, device)
    return host.dma.bytes_written


def test_a_copy_that_fails_at_the_destination_says_so() -> None:
    host, device = make(mapped=False)
    start_copy(device)
    host.answer(3)
    host, device = move(host, device, mapped=True)
    host.dma.enabled = False
    host.run()
    assert status(device) == FAILED


def test_a_doorbell_that_rings_while_stopped_is_remembered_over_a_move() -> None:
    host, device = make()
    host.dma.memory[SOURCE : SOURCE + 4] = b"data"
    host.stop()
    start_copy(device, 4)
    host.run()
    assert (status(device), host.dma.bytes_written) == (BUSY, 0)
    host, device = move(host, device, mapped=True)
    host.run()
    assert (status(device), bytes(host.dma.memory[TARGET : TARGET + 4])) == (DONE, b"data")


def test_a_doorbell_while_a_copy_is_under_way_does_not_begin_it_anew() -> None:
    host, device = make(mapped=False)
    start_copy(device)
    host.answer(3)
    device.regions[0].write(0xFF8, bytes(4))
    host.answer()
    assert (status(device), host.dma.bytes_written) == (DONE, LENGTH)
    assert device.regions[0].read(0xFF4, 4) == LENGTH.to_bytes(4, "little")


def test_words_and_memory_go_along() -> None:
    host, device = make(memory=1 << 20)
    device.regions[0].write(0x123, b"words")
    device.regions[2].write(0xF_FFFB, b"words")
    _, device = move(host, device, mapped=True, memory=1 << 20)
    assert device.regions[0].read(0x123, 5) == device.regions[2].read(0xF_FFFB, 5) == b"words"
    device.reset()
    assert device.regions[0].read(0x123, 5) == device.regions[2].read(0xF_FFFB, 5) == bytes(5)


def test_memory_of_another_size_is_refused() -> None:
    saved = save_device(*make(memory=1 << 20))
    for memory in (0, 1 << 19, 1 << 21):
        with pytest.raises(StateError):
            restore_device(*make(memory=memory), saved)


def test_large_memory_is_streamed_by_what_was_written() -> None:
    """Not all of it: what no guest has ever written is zero on the other side too."""
    _, device = make(memory=64 << 20)
    device.regions[2].write(0x3FF_FFF0, b"end")
    memory = device.memories()["bar2"]
    memory.start_log()
    assert memory.pending == 4096
    assert (memory.take(1 << 20), memory.take(1 << 20)) == ((0x3FF_F000, 4096), None)
    assert device.config.read(0x18, 4) == b"\x0c\0\0\0"  # 64 bits, prefetchable


def test_the_size_is_an_option() -> None:
    assert parse_options(Scratch, ["memory=64K"]) == {"memory": 65536}
    with pytest.raises(OptionError, match="from 4K to 1G"):
        parse_options(Scratch, ["memory=2G"])
