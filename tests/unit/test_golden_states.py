# SPDX-License-Identifier: BSD-3-Clause
"""States saved by earlier versions still load, and today's version still saves what it did."""

import shutil
from pathlib import Path

import pytest

from golden import digests, scenes
from vfio_user.device_models.catalog import MODELS
from vfio_user.device_models.e1000.bench import BUFFER, RX_DATA, RX_RING, Bench
from vfio_user.device_models.e1000.descriptors import DD, PIF, RECEIVE, SIZE
from vfio_user.device_models.fake_migration import restore_device, save_device

FILES = [(model, path) for model in scenes.SCENES for path in scenes.files(model)]
NEWEST = [(model, scenes.files(model)[-1]) for model in scenes.SCENES]


@pytest.mark.parametrize(("model", "path"), FILES, ids=[path.stem for _, path in FILES])
def test_a_state_of_any_time_loads_and_is_kept_for_ever(model: str, path: Path) -> None:
    saved = scenes.read(path)
    host, device = scenes.SCENES[model][1]()
    restore_device(host, device, saved)
    again = save_device(host, device)
    assert again.memories == saved.memories
    old, new = saved.sections, again.sections
    unchanged = [name for name in new if name in old and new[name][0] == old[name][0]]
    assert unchanged
    assert {name: new[name] for name in unchanged} == {name: old[name] for name in unchanged}
    host.resume()
    for _ in range(50):
        host.tasks.run_ready()


@pytest.mark.parametrize(("model", "path"), NEWEST, ids=[path.stem for _, path in NEWEST])
def test_todays_state_is_in_the_newest_file(model: str, path: Path) -> None:
    assert scenes.text(scenes.SCENES[model][0]()) == path.read_text(), "cd tests && python -m golden.scenes"


def test_frames_of_version_1_reach_the_guest_marked_as_not_exactly_filtered() -> None:
    saved = scenes.read(scenes.FOLDER / "e1000-1.json")
    assert (saved.sections["receive"][0], "verdicts" in saved.sections["receive"][1]) == (1, False)
    bench = Bench()
    restore_device(bench.host, bench.device, saved)
    assert len(bench.device.mac.buffer.frames) == 6
    bench.host.resume()
    ring = RX_RING + 5 * SIZE  # two descriptors are left
    for index in range(2):
        RECEIVE.pack_into(bench.memory, ring + index * SIZE, RX_DATA + index * BUFFER, 0, 0, 0, 0, 0)
    bench.run()
    for index in range(2):
        address, length, _, status, _, _ = RECEIVE.unpack_from(bench.memory, ring + index * SIZE)
        assert (length, status & (DD | PIF)) == (104, DD | PIF)
        assert bench.memory[address : address + 14] == scenes.MAC + scenes.PARTNER + b"\x08\x00"


def test_no_file_has_changed_since_it_was_published() -> None:
    assert digests.problems() == []


def test_a_file_that_changed_went_or_has_no_line_is_named(tmp_path: Path) -> None:
    for path in (*digests.golden_files(), digests.TABLE):
        shutil.copy(path, tmp_path)
    assert digests.problems(tmp_path) == []
    changed, gone = tmp_path / "e1000-1.json", tmp_path / "scratch-1.stream"
    changed.write_bytes(changed.read_bytes() + b"\n")
    gone.unlink()
    (tmp_path / "e1000-9.json").write_text("{}")
    wanted = [
        "e1000-1.json is not what was published: bring it back, and let the version grow",
        "e1000-9.json has no line: cd tests && python -m golden.scenes",
        "scratch-1.stream is gone: bring it back",
    ]
    assert digests.problems(tmp_path) == wanted
    digests.renew(tmp_path)
    assert digests.problems(tmp_path) == [wanted[0], wanted[2]], "only what is new gets a line"


def test_every_model_has_a_file() -> None:
    assert scenes.SCENES.keys() == MODELS.keys()
    assert all(scenes.files(model) for model in MODELS)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for make, _ in scenes.SCENES.values():
        saved = make()
        (tmp_path / "state.json").write_text(scenes.text(saved))
        assert scenes.read(tmp_path / "state.json") == saved
