# SPDX-License-Identifier: BSD-3-Clause
"""The device that fails on demand, in every step of being saved and restored."""

import pytest

from vfio_user.device_models.catalog import parse_options
from vfio_user.device_models.device import OptionError
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.fake_migration import restore_device, save_device
from vfio_user.device_models.faulty import DMA_WRITE, ENDLESS, RAISE, Fault, Faulty
from vfio_user.device_models.state import StateError


def make(fail: str = "nowhere", memory: int = 4096) -> tuple[FakeHost, Faulty]:
    host = FakeHost()
    device = Faulty(host, fail=fail, memory=memory)
    device.config.write(4, b"\x06\x00")
    return host, device


def write(device: Faulty, name: str, value: int) -> None:
    device.regions[0].write(device.registers.cell(name).offset, value.to_bytes(4, "little"))


def read(device: Faulty, name: str) -> int:
    return int.from_bytes(device.regions[0].read(device.registers.cell(name).offset, 4), "little")


def test_it_moves_where_it_is_not_asked_to_fail() -> None:
    host, device = make()
    write(device, "WORD", 77)
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    assert read(device, "WORD") == 77


def test_saving_fails() -> None:
    with pytest.raises(Fault):
        save_device(*make("save"))


def test_a_state_that_is_refused() -> None:
    saved = save_device(*make("state"))
    with pytest.raises(StateError) as found:
        restore_device(*make(), saved)
    assert (found.value.section, found.value.field) == ("faulty", "surprise")


def test_loading_fails_before_anything_has_changed() -> None:
    host, device = make("load-once")
    write(device, "WORD", 1)
    with pytest.raises(StateError, match="section faulty: it cannot be loaded"):
        restore_device(host, device, save_device(*make()))
    assert read(device, "WORD") == 1
    restore_device(host, device, save_device(*make()))


@pytest.mark.parametrize("place", ["apply", "restored", "adopt"])
def test_applying_fails_once_or_always(place: str) -> None:
    saved = save_device(*make())
    for fail, times in ((f"{place}-once", 1), (place, 3)):
        host, device = make(fail)
        for _ in range(times):
            with pytest.raises(Fault):
                restore_device(host, device, saved)
        if times == 1:
            restore_device(host, device, saved)


@pytest.mark.parametrize("place", ["log", "take"])
def test_streaming_of_its_memory_fails(place: str) -> None:
    memory = make(place)[1].memories()["bar2"]
    if place == "take":
        memory.start_log()
    with pytest.raises(Fault):
        memory.start_log() if place == "log" else memory.take(4096)


def test_what_it_was_doing_goes_on_elsewhere() -> None:
    host, device = make()
    write(device, "START", ENDLESS)
    for _ in range(5):
        host.tasks.run_ready()
    turns = read(device, "TURNS")
    assert (turns, read(device, "START")) == (5, ENDLESS)
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    host.resume()
    host.tasks.run_ready()
    assert read(device, "TURNS") == turns + 1
    write(device, "STOP", 1)
    assert not host.tasks.ready
    assert read(device, "START") == 0


@pytest.mark.parametrize("task", [RAISE, DMA_WRITE])
def test_what_it_has_done_is_not_done_again(task: int) -> None:
    host, device = make()
    write(device, "START", task)
    host.run()
    assert read(device, "START") == 0
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    assert host.tasks.idle


def test_a_task_that_does_not_exist_is_no_task() -> None:
    host, device = make()
    device.registers.cell("START").value = 0xFFFF
    saved = save_device(host, device)
    host, device = make()
    restore_device(host, device, saved)
    host.resume()
    host.run()
    assert (host.tasks.idle, read(device, "START")) == (True, 0)


def test_it_may_not_know_what_it_writes() -> None:
    for text, known in (("exact", True), ("unknown", False)):
        assert Faulty(FakeHost(), **parse_options(Faulty, [f"dirty={text}"])).precise_dirty == known
    for wrong in ("dirty=perhaps", "fail=save-twice", "fail=-once"):
        with pytest.raises(OptionError):
            parse_options(Faulty, [wrong])
