# SPDX-License-Identifier: BSD-3-Clause
"""Runs the programs that build the lab: output to a log, its end in the error, transient failure retried."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds before the second, third, fourth attempt of something that asks a mirror.
RETRY_PAUSES = (2.0, 5.0, 15.0)
_TAIL_LINES = 12


class LabError(Exception):
    """A part of the lab cannot be built or is missing; the text says what and what to do."""


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs programs with a fixed locale and environment; `say` prints one line of progress."""

    log: Path
    say: Callable[[str], None]
    environment: Mapping[str, str]

    def run(self, *command: str | Path, cwd: Path | None = None, stdin: bytes = b"") -> str:
        """The program's standard output. Raises LabError with the last lines when it fails."""
        try:
            done = subprocess.run(
                command, cwd=cwd, input=stdin, capture_output=True, check=False, env=self._variables()
            )
        except OSError as error:
            raise LabError(f"cannot run {command[0]}: {error.strerror}") from error
        output, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        self._note(command, done.returncode, output + errors)
        if done.returncode:
            tail = "\n    ".join((output + errors).strip().splitlines()[-_TAIL_LINES:])
            name = Path(str(command[0])).name
            raise LabError(f"{name} ended with status {done.returncode} (log: {self.log})\n    {tail}")
        return output

    def run_retrying(self, *command: str | Path, cwd: Path | None = None) -> str:
        """`run` for what asks a mirror: tried again after a pause, the last failure is raised."""
        for pause in RETRY_PAUSES:
            try:
                return self.run(*command, cwd=cwd)
            except LabError as error:
                self.say(f"{str(error).splitlines()[0]}; trying again in {pause:g} s")
                time.sleep(pause)
        return self.run(*command, cwd=cwd)

    def _variables(self) -> dict[str, str]:
        fixed = {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        return {**os.environ, **fixed, **self.environment}

    def _note(self, command: Sequence[str | Path], status: int, output: str) -> None:
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n{output}[status {status}]\n")
