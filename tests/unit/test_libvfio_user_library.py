# SPDX-License-Identifier: BSD-3-Clause
"""Finding libvfio-user and telling its revisions apart, before anything of it is called."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import needs
from vfio_user.server.engines.libvfio_user_abi import FUNCTIONS, SONAME, Abi
from vfio_user.server.engines.libvfio_user_library import (
    VARIABLE,
    LibraryError,
    find_library,
    functions_of,
    identify,
    load,
)

Compile = Callable[..., Path]

_FIND = f"""
import sys
from pathlib import Path
from {find_library.__module__} import find_library
library = find_library({{}}, Path(sys.argv[1]))
print(library.abi.value, library.path)
"""


@pytest.fixture
def compile_stub(tmp_path: Path) -> Compile:
    """`compile_stub("-DNO_LIMIT")` gives a library."""

    def make(*flags: str) -> Path:
        return needs.compile_stub(tmp_path / f"stub{'-'.join(flags)}.so", *flags)

    return make


@pytest.mark.parametrize(("flags", "abi"), [((), Abi.V2_LIMIT), (("-DNO_LIMIT",), Abi.V2)])
def test_the_revisions_of_v2_are_told_apart(compile_stub: Compile, flags: tuple[str, ...], abi: Abi) -> None:
    path = compile_stub(*flags)
    library = load(str(path))
    assert (library.abi, library.path) == (abi, path)
    assert len(library.functions["vfu_setup_device_dma"].argtypes) == (4 if abi is Abi.V2_LIMIT else 3)  # type: ignore[attr-defined]
    assert set(library.functions) == {function.name for function in functions_of(abi)}


UNKNOWN = {
    ("-DLACKS_REGION",): "of v2 with a limit of DMA regions it lacks vfu_setup_region",
    ("-DHAS_V1_NAME",): "it exports vfu_get_migr_register_area_size of v1 and has v2's message",
    ("-DNO_TEXT",): "it has neither of the messages",
}


@pytest.mark.parametrize(("flags", "text"), UNKNOWN.items())
def test_one_that_is_not_known_is_refused_with_the_difference(
    compile_stub: Compile, flags: tuple[str, ...], text: str
) -> None:
    path = compile_stub(*flags)
    with pytest.raises(LibraryError) as refusal:
        load(str(path))
    assert text in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_v1_is_known_by_its_name_and_both_messages_are_not(tmp_path: Path) -> None:
    path = tmp_path / "library"
    path.write_bytes(b"hit max regions %d\0")
    assert identify(path, lambda name: True) is Abi.V1
    path.write_bytes(b"hit max regions %d\0hit max regions %zu\0")
    with pytest.raises(LibraryError, match="both"):
        identify(path, lambda name: True)


def test_a_library_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("no library")
    for name, text in ((str(path), "cannot be loaded"), ("libc.so.6", "does not export vfu_create_ctx")):
        with pytest.raises(LibraryError, match=text):
            load(name)


def test_the_variable_counts_before_everything_else(compile_stub: Compile, tmp_path: Path) -> None:
    stub, lab = compile_stub(), compile_stub("-DNO_LIMIT")
    assert find_library({VARIABLE: str(stub)}, lab).path == stub
    with pytest.raises(LibraryError, match="cannot be loaded"):
        find_library({VARIABLE: str(tmp_path / "none.so")}, lab)


def found_by_the_loader(folder: Path, lab: Path) -> "subprocess.CompletedProcess[str]":
    """What is found where `folder` has a libvfio-user.so.0: in a process of its own, for the loader looks at
    its path once, and keeps what it has loaded."""
    words = [sys.executable, "-c", _FIND, str(lab)]
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_the_loaders_comes_before_the_lab(compile_stub: Compile, tmp_path: Path) -> None:
    (tmp_path / "loader").mkdir()
    lab = compile_stub()
    stub = compile_stub("-DNO_LIMIT").rename(tmp_path / "loader" / SONAME)
    assert found_by_the_loader(stub.parent, lab).stdout == f"v2 {stub}\n"


def test_one_of_the_loaders_that_is_not_known_is_not_passed_over(
    compile_stub: Compile, tmp_path: Path
) -> None:
    (tmp_path / "loader").mkdir()
    lab = compile_stub()
    stub = compile_stub("-DNO_TEXT").rename(tmp_path / "loader" / SONAME)
    found = found_by_the_loader(stub.parent, lab)
    assert found.stdout == ""
    assert f"LibraryError: {stub} has an ABI that is not known here" in found.stderr


def test_the_lab_comes_last_and_without_it_the_advice(
    compile_stub: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfio_user.server.engines.libvfio_user_library.SONAME", "libvfio-user-none.so.0")
    lab = compile_stub()
    assert find_library({}, lab).path == lab
    for nothing in (None, tmp_path / "none.so"):
        with pytest.raises(LibraryError, match="make lab") as refusal:
            find_library({}, nothing)
        assert "\n" not in str(refusal.value)


def test_a_failure_is_an_oserror_with_the_librarys_errno(compile_stub: Compile, tmp_path: Path) -> None:
    create = load(str(compile_stub())).functions["vfu_create_ctx"]
    with pytest.raises(FileNotFoundError, match="vfu_create_ctx"):
        create(0, str(tmp_path / "no" / "folder").encode(), 1, None, 0)


def test_each_revision_has_a_function_once() -> None:
    for abi in Abi:
        names = [function.name for function in functions_of(abi)]
        assert len(set(names)) == len(names)
    assert {function.name for function in FUNCTIONS} - {
        function.name for function in functions_of(Abi.V2)
    } == {"vfu_get_migr_register_area_size"}
