# SPDX-License-Identifier: BSD-3-Clause
"""When a part of the lab is rebuilt, and what a failed build leaves behind."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from vfio_user.client.qemu import shell as shell_module
from vfio_user.client.qemu.parts import STAMP, Part, builder_lock, ensure, problem_of, read_stamp, recipe_hash
from vfio_user.client.qemu.paths import lab_root
from vfio_user.client.qemu.shell import LabError, Shell


def _build(shell: Shell, folder: Path) -> Mapping[str, str]:
    shell.say("at work")
    (folder / "product").write_bytes(b"12345")
    return {"product": "1.0"}


def _check(folder: Path) -> str:
    return "" if (folder / "product").is_file() else "lacks product"


@pytest.fixture
def part(tmp_path: Path) -> Part:
    recipe = tmp_path / "recipe.py"
    recipe.write_text("one")
    return Part("thing", "a thing", (recipe,), _build, _check)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "lab"
    folder.mkdir()
    return folder


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "log", lambda line: None, {})


def test_built_once_then_ready(part: Part, root: Path, shell: Shell) -> None:
    assert problem_of(part, root) == "not built"
    first = ensure(part, root, shell)
    assert (first.state, first.problem) == ("built", "")
    assert first.stamp is not None
    assert (first.stamp.versions, first.stamp.size) == ({"product": "1.0"}, 5)
    again = ensure(part, root, shell)
    assert (again.state, again.stamp) == ("ready", first.stamp)
    assert [path.name for path in root.iterdir()] == ["thing"]


def test_another_recipe_and_damage_are_noticed(part: Part, root: Path, shell: Shell) -> None:
    ensure(part, root, shell)
    part.recipe[0].write_text("two")
    assert problem_of(part, root) == "built by another recipe"
    assert ensure(part, root, shell).state == "built"
    (root / "thing/product").unlink()
    assert problem_of(part, root) == "lacks product"
    assert ensure(part, root, shell).state == "built"
    (root / "thing" / STAMP).write_text('{"recipe": ')
    assert read_stamp(root / "thing") is None
    assert ensure(part, root, shell).state == "built"


@pytest.mark.parametrize("error", [LabError("no mirror"), OSError(28, "No space left on device")])
def test_a_failed_build_keeps_the_old_part(part: Part, root: Path, shell: Shell, error: Exception) -> None:
    ensure(part, root, shell)
    part.recipe[0].write_text("two")

    def fails(_shell: Shell, folder: Path) -> Mapping[str, str]:
        (folder / "half").touch()
        raise error

    outcome = ensure(replace(part, build=fails), root, shell)
    assert (outcome.state, outcome.problem) == ("failed", str(error))
    assert (root / "thing/product").is_file()
    # What was cut is removed by the next build.
    assert ensure(part, root, shell).state == "built"
    assert [path.name for path in root.iterdir()] == ["thing"]


def test_a_build_that_makes_nothing_useful_fails(part: Part, root: Path, shell: Shell) -> None:
    outcome = ensure(replace(part, build=lambda _shell, _folder: {}), root, shell)
    assert outcome.problem == "a thing was built, but lacks product"
    assert not (root / "thing").exists()


def test_the_recipe_hash_depends_on_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "a", tmp_path / "b"
    one.write_text("x")
    two.write_text("y")
    before = recipe_hash([one, two])
    assert recipe_hash([two, one]) == before
    one.write_text("y")
    two.write_text("x")
    assert recipe_hash([one, two]) != before


def test_a_second_builder_waits_and_says_for_whom(root: Path) -> None:
    said: list[str] = []
    waiting, entered = threading.Event(), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    def second() -> None:
        with builder_lock(root, say):
            entered.set()

    thread = threading.Thread(target=second)
    with builder_lock(root, said.append):
        thread.start()
        assert waiting.wait(5)
        assert not entered.is_set()
    thread.join(5)
    assert entered.is_set()
    assert len(said) == 1
    assert said[0].startswith("waiting for another build (process ")


def test_transient_failure_is_tried_again(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell_module, "RETRY_PAUSES", (0.0, 0.0))
    said: list[str] = []
    flaky = 'echo x >> "$0"; test $(wc -l < "$0") -ge 3 && echo done'
    assert replace(shell, say=said.append).run_retrying("sh", "-c", flaky, tmp_path / "count") == "done\n"
    assert len(said) == 2
    with pytest.raises(LabError, match=r"sh ended with status 3 .*\n    why"):
        shell.run_retrying("sh", "-c", "echo why; exit 3")
    with pytest.raises(LabError, match="cannot run /no/such: No such file"):
        shell.run("/no/such")


def test_where_the_lab_is() -> None:
    assert lab_root({"VFIO_USER_LAB": "/a/b", "XDG_CACHE_HOME": "/c"}) == Path("/a/b")
    assert lab_root({"XDG_CACHE_HOME": "/c"}) == Path("/c/vfio-user/lab")
    assert lab_root({}) == Path.home() / ".cache/vfio-user/lab"
