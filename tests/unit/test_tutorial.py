# SPDX-License-Identifier: BSD-3-Clause
"""The tutorial, done step by step in an empty folder as a reader does it; its guest is in tests/qemu."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Step = tuple[str, str, str]
KINDS = {"run", "fails", "serve", "output", "qemu", "guest"}


def environment() -> dict[str, str]:
    """That of the activated virtual environment, with output for a file rather than for a terminal."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "COLUMNS": "120"}


class Reader:
    """Does the steps; a server runs until the next one is served."""

    def __init__(self, folder: Path, write: Callable[[Path, Step], None]) -> None:
        self.folder = folder
        self.write = write
        self.output = ""
        self.server: subprocess.Popen[str] | None = None
        self.served = 0

    def do(self, step: Step) -> None:
        _, kind, text = step
        if "=" in kind:
            self.write(self.folder, step)
        elif kind == "output":
            for line in text.splitlines():
                assert line in self.output
        elif kind == "serve":
            self._serve(text)
        elif kind in ("run", "fails"):
            done = self._start(text)
            self.output = done.communicate(timeout=30)[0]
            assert done.returncode == {"run": 0, "fails": 2}[kind], self.output

    def _start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _serve(self, command: str) -> None:
        self.stop()
        self.server = self._start(command)
        assert self.server.stdout is not None
        self.output = self.server.stdout.readline()
        assert self.output.startswith("listening on "), self.output + self.server.stdout.read()
        self.served += 1

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            assert (self.server.communicate(timeout=10)[0], self.server.returncode) == ("", 0)
            self.server = None


@contextmanager
def reading(folder: Path, write: Callable[[Path, Step], None]) -> Iterator[Reader]:
    reader = Reader(folder, write)
    try:
        yield reader
    finally:
        reader.stop()


def test_every_step_of_the_tutorial_works(
    tutorial: list[Step], write_step: Callable[[Path, Step], None], tmp_path: Path
) -> None:
    with reading(tmp_path, write_step) as reader:
        for step in tutorial:
            reader.do(step)
        assert reader.served == 2
    assert not (tmp_path / "my.sock").exists()


def test_every_block_has_a_kind_that_is_done(tutorial: list[Step]) -> None:
    kinds = [kind for _, kind, _ in tutorial]
    assert not [kind for kind in kinds if "=" not in kind and kind not in KINDS]
    assert kinds.count("guest") == kinds.count("qemu") == 1
    # A fence without a kind would be a block that nobody runs.
    text = (Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text()
    assert text.count("```") == 2 * len(tutorial)


def test_the_code_of_the_tutorial_is_in_order(
    tutorial: list[Step], write_step: Callable[[Path, Step], None], tmp_path: Path
) -> None:
    for step in tutorial:
        if "=" in step[1]:
            write_step(tmp_path, step)
    settings = Path(__file__).resolve().parents[2] / "pyproject.toml"
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(settings)]
    command += ["--ignore", "I001", str(tmp_path)]  # the reader's own module is not one of ours
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
