# SPDX-License-Identifier: BSD-3-Clause
"""Starts a QEMU with the lab's guest and talks to its shell.

    async with open_machine(lab, MachineOptions(devices=[VfioUserDevice(path)])) as guest:
        await guest.wait_boot()
        status, output = await guest.run("ip link")

The process is QEMU itself (nothing between us and it), dies with us, and is gone when the block is left.
"""

import contextlib
import math
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trio

from vfio_user.client.background import background
from vfio_user.client.qemu import newc
from vfio_user.client.qemu.agent import KILLED, READY, Answer, AnswerParser, command_line
from vfio_user.client.qemu.command import MachineOptions, MachinePaths, qemu_words
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.process import Child, running
from vfio_user.client.qemu.shell import LabError

# How much longer than the guest's own limit we wait: a TCG guest's clock and ours agree only roughly.
_GRACE = 10.0
_TAIL = 1500


class MachineError(Exception):
    """QEMU or the guest ended or did not answer; the text carries the end of their logs."""


class CommandError(MachineError):
    """A command in the guest failed or ran out of time."""


class Result(NamedTuple):
    """Exit status and output (standard output and error, in order) of a command in the guest."""

    status: int
    output: str


@dataclass(slots=True)
class _Pending:
    answered: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None


@dataclass(slots=True, eq=False)
class Machine:
    """A running QEMU and the shell of its guest. Commands may run side by side."""

    options: MachineOptions
    folder: Path
    qmp_path: Path
    child: Child
    _serial: trio.SocketStream
    boots: int = 0
    _booted: trio.Condition = field(default_factory=trio.Condition)
    _pending: dict[str, _Pending] = field(default_factory=dict)
    _numbers: int = 0
    _sending: trio.Lock = field(default_factory=trio.Lock)
    _parser: AnswerParser = field(default_factory=AnswerParser)
    _may_listen: trio.Event = field(default_factory=trio.Event)
    _listener: trio.CancelScope = field(default_factory=trio.CancelScope)
    _silent: trio.Event = field(default_factory=trio.Event)
    _ended: bool = False

    @property
    def pid(self) -> int:
        """QEMU's own process."""
        return self.child.pid

    async def wait_boot(self, timeout: float = 120.0, boots: int = 1) -> None:
        """Waits until the guest has booted (`boots` times). Raises MachineError when it does not."""
        with trio.move_on_after(timeout):
            async with self._booted:
                while self.boots < boots and not self._ended:
                    await self._booted.wait()
        if self.boots < boots:
            raise self._error("QEMU ended" if self._ended else f"no boot within {timeout:g} s")

    async def run(self, command: str, timeout: float = 30.0) -> Result:
        """Runs a shell command in the guest. Raises CommandError when its time is up.

        Raises MachineError when the guest restarts or ends before the command does.
        """
        answer = await self._ask(command, timeout)
        output = answer.output.decode(errors="replace")
        if answer.status == KILLED:
            raise CommandError(f"killed after {timeout:g} s: {command}\n{output[-_TAIL:]}")
        return Result(answer.status, output)

    async def check(self, command: str, timeout: float = 30.0) -> str:
        """The output of a command that must succeed. Raises CommandError when its status is not 0."""
        status, output = await self.run(command, timeout)
        if status:
            raise CommandError(f"status {status}: {command}\n{output[-_TAIL:]}")
        return output

    async def read_file(self, path: str, timeout: float = 30.0) -> bytes:
        """The contents of a file in the guest."""
        answer = await self._ask(f"cat {path}", timeout)
        if answer.status:
            raise CommandError(f"status {answer.status}: cat {path}")
        return answer.output

    async def kernel_log(self) -> str:
        """All that the guest's kernel has said since it booted."""
        return await self.check("dmesg")

    async def reboot(self, timeout: float = 120.0) -> None:
        """Restarts the guest and waits until it has booted again."""
        boots = self.boots
        await self._send(0, timeout, "sync; reboot -f")
        await self.wait_boot(timeout, boots + 1)

    async def power_off(self, timeout: float = 120.0) -> int:
        """Switches the guest off and returns QEMU's exit status. Raises MachineError when it stays."""
        await self._send(0, timeout, "sync; poweroff -f")
        return await self.wait_end(timeout)

    async def kill(self) -> None:
        """SIGKILL to QEMU; returns when it is gone."""
        self.child.signal(signal.SIGKILL)
        await self.child.wait()

    async def take_over(self, source: "Machine") -> None:
        """The guest of `source` has been moved to this machine, which was started with `incoming`.

        Commands that were asked for there are answered here. Not to be called before `source` has stopped
        its guest for good, and no command may have been sent there after that.
        """
        source._listener.cancel()
        await source._silent.wait()
        for answer in source._parser.feed(_rest(source._serial)):
            await source._take(answer)
        self.boots, self._numbers, self._parser = source.boots, source._numbers, source._parser
        self._pending, source._pending = source._pending, {}
        self._may_listen.set()

    async def wait_end(self, timeout: float = math.inf) -> int:
        """QEMU's exit status, negative for a signal. Raises MachineError when it goes on running."""
        with trio.move_on_after(timeout):
            return await self.child.wait()
        raise self._error(f"QEMU still runs after {timeout:g} s")

    def console(self) -> str:
        """What the guest wrote on its first serial port: kernel messages (fewer with `quiet`) and a shell."""
        path = self.folder / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def qemu_log(self) -> str:
        """What QEMU itself wrote."""
        return self.child.log_text()

    async def _ask(self, command: str, timeout: float) -> Answer:
        self._numbers += 1
        pending = self._pending[str(self._numbers)] = _Pending()
        try:
            with trio.move_on_after(timeout + _GRACE):
                await self._send(self._numbers, timeout, command)
                await pending.answered.wait()
        finally:
            self._pending = {tag: other for tag, other in self._pending.items() if other is not pending}
        if pending.answer is None:
            raise self._error(f"{self._reason(pending, timeout)}: {command}")
        return pending.answer

    def _reason(self, unanswered: _Pending, timeout: float) -> str:
        if self._ended:
            return "QEMU ended during the command"
        restarted = unanswered.answered.is_set()
        return "the guest restarted during the command" if restarted else f"no answer within {timeout:g} s"

    async def _send(self, number: int, timeout: float, command: str) -> None:
        if not self.boots or self._ended:
            raise self._error("QEMU has ended" if self._ended else "the guest has not booted")
        async with self._sending:
            try:
                await self._serial.send_all(command_line(number, timeout, command))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._error("QEMU has ended") from error

    async def _listen(self) -> None:
        with self._listener:
            await self._may_listen.wait()
            with contextlib.suppress(trio.BrokenResourceError):
                async for data in self._serial:
                    for answer in self._parser.feed(bytes(data)):
                        await self._take(answer)
        self._ended = True
        if not self._listener.cancelled_caught:
            await self._forget()
        self._silent.set()

    async def _take(self, answer: Answer) -> None:
        if answer.tag == READY:
            self.boots += 1
            await self._forget()
        elif (pending := self._pending.get(answer.tag)) is not None:
            pending.answer = answer
            pending.answered.set()

    async def _forget(self) -> None:
        """The guest has restarted or ended: no command from before will be answered."""
        for pending in self._pending.values():
            pending.answered.set()
        async with self._booted:
            self._booted.notify_all()

    def _error(self, what: str) -> MachineError:
        logs = f"QEMU: {self.qemu_log()[-_TAIL:].strip()}\nconsole: {self.console()[-_TAIL:].strip()}"
        return MachineError(f"{what}\n{logs}")


def _rest(serial: trio.SocketStream) -> bytes:
    """What QEMU has written and nobody has read; it writes no more."""
    data = bytearray()
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while piece := os.read(serial.socket.fileno(), 65536):
            data += piece
    return bytes(data)


Command = Callable[[MachineOptions, MachinePaths, int], Sequence[str]]
"""Options, files and the descriptor of the agent's serial port, the second one; gives QEMU's command."""


@contextlib.asynccontextmanager
async def open_machine(
    lab: Lab, options: MachineOptions, command: Command = qemu_words
) -> AsyncIterator[Machine]:
    """Starts a machine; QEMU is dead and its files are gone when the block is left."""
    with run_folder() as folder, _serial_pair() as (ours, theirs):
        initrd, console = _initrd(lab, options, folder), folder / "console.log"
        paths = MachinePaths(lab.qemu.program, lab.kernel, initrd, console, folder / "qmp")
        words = command(options, paths, theirs.fileno())
        async with running(words, folder / "qemu.log", [theirs.fileno()], options.netns) as child:
            theirs.close()
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            machine = Machine(options, folder, paths.qmp, child, stream)
            if not options.incoming:
                machine._may_listen.set()
            async with _listening(machine):
                yield machine


@contextlib.asynccontextmanager
async def _listening(machine: Machine) -> AsyncIterator[None]:
    """The machine's listener is at work; an exception of the block comes out as it is, in no group."""
    async with background() as nursery:
        nursery.start_soon(machine._listen)
        yield


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for the sockets and files of one run, gone with the block."""
    # In /tmp whatever TMPDIR says: a UNIX socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="vfio-user-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _serial_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def _initrd(lab: Lab, options: MachineOptions, folder: Path) -> Path:
    """The lab's initramfs, with the options' files in an archive behind it."""
    if not options.files:
        return lab.initrd
    entries = [_entry(path, data) for path, data in options.files.items()]
    joined = folder / "initrd.cpio"
    joined.write_bytes(lab.initrd.read_bytes() + newc.archive(entries))
    return joined


def _entry(path: str, data: bytes | Path) -> newc.Entry:
    try:
        return newc.from_disk(path, data) if isinstance(data, Path) else newc.regular(path, data, 0o755)
    except OSError as error:
        raise LabError(f"cannot take {data!s} into the guest: {error.strerror}") from error
