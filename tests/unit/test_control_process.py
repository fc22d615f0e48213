# SPDX-License-Identifier: BSD-3-Clause
"""`serve --control` as a process of its own, and `vfio-user ctl`."""

import json
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import trio

from vfio_user.cli.ctl import lines
from vfio_user.cli.main import main
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.client.server_process import ServerProcess, serving

PROGRAM = (sys.executable, "-c", "from vfio_user.cli.main import main; main()")
SMALL_RAM = VmmOptions(((0, 1 << 20),))


@dataclass(frozen=True)
class Done:
    """What a run of `vfio-user ctl` has left."""

    status: object
    output: str
    errors: str


def run_ctl(words: tuple[str | Path, ...]) -> Done:
    output, errors = StringIO(), StringIO()
    with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main.main(["ctl", *map(str, words)], prog_name="vfio-user")
    return Done(ended.value.code or 0, output.getvalue(), errors.getvalue())


async def ctl(*words: str | Path) -> Done:
    """In a thread, for it has an event loop of its own; a process would take a second to start."""
    return await trio.to_thread.run_sync(run_ctl, words)


async def result(*words: str | Path) -> Any:
    done = await ctl(*words, "--json")
    assert (done.status, done.errors) == (0, "")
    return json.loads(done.output)


async def complaint(*words: str | Path) -> str:
    """What it says when it cannot: one line, exit status 2."""
    done = await ctl(*words)
    assert (done.status, done.output, done.errors.count("\n")) == (2, "", 1), done
    return done.errors


async def test_a_device_is_saved_in_one_process_and_restored_in_another(tmp_path: Path) -> None:
    file, here, there = tmp_path / "state", tmp_path / "a.control", tmp_path / "b.control"
    words = ["--set", "memory=64K", "--control"]
    async with serving("scratch", tmp_path / "a", [*words, str(here)]) as source:
        async with open_vmm(source.path, SMALL_RAM) as vmm:
            await vmm.write(0, 0, 0xCAFE)
            await vmm.write(2, 0x4000, 0xBEEF)
            assert (await ctl(here, "save", "--to", file)).output.split()[-2:] == ["running", "yes"]
        await stopped(source, here)
    async with serving("scratch", tmp_path / "b", [*words, str(there)]) as target:
        assert await result(there, "load", "--from", file) == {"bytes": file.stat().st_size, "running": False}
        async with open_vmm(target.path, SMALL_RAM, start=False) as vmm:
            assert await vmm.client.region_read(0, 0, 4) == b"\xfe\xca\0\0"
            assert await vmm.client.region_read(2, 0x4000, 4) == b"\xef\xbe\0\0"
        await stopped(target, there)


async def stopped(server: ServerProcess, control: Path) -> None:
    """By `ctl shutdown`, as by SIGTERM: status 0, and no file stays."""
    assert (await ctl(control, "shutdown")).output == "done\n"
    with trio.fail_after(10):
        await server.counters("the end", 10)
        assert await trio.to_thread.run_sync(server.popen.wait) == 0
    assert not control.exists()  # noqa: ASYNC240
    assert not server.path.exists()


async def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    control, file = tmp_path / "c", tmp_path / "f"
    async with serving("scratch", tmp_path / "s", ["--control", str(control)]) as server:
        assert "there is no method 'fly'" in await complaint(control, "fly")
        assert "'speed'" in await complaint(control, "stop", "speed=1")
        assert "NAME=VALUE" in await complaint(control, "stop", "speed")
        assert "wait: a number from 0" in await complaint(control, "stop", "wait=soon")
        assert "save takes --to FILE" in await complaint(control, "save")
        assert "neither --to nor --from" in await complaint(control, "stop", "--to", file)
        assert "load takes --from FILE" in await complaint(control, "load", "--to", file)
        assert "No such file or directory: give a file" in await complaint(control, "load", "--from", file)
        missing = tmp_path / "no" / "f"
        for words in ((), ("inline=true",)):
            told = await complaint(control, "save", "--to", missing, *words)
            assert f"{missing} cannot be written: No such file or directory: make its folder first" in told
        assert "power of two from 4096" in await complaint(control, "log-start", "page_size=100")
        assert "No space left" in await complaint(control, "save", "--to", "/dev/full")
        assert "ends after 0 bytes" in await complaint(control, "load", "--from", "/dev/null")
        assert "no network card" in await complaint(control, "announce")
        assert "no network card" in await complaint(control, "link", "up=false")
        assert "up: true or false" in await complaint(control, "link", "up=maybe")
        assert "cannot be connected to" in await complaint(tmp_path / "nobody", "state")
        assert not file.exists()
        again = await trio.run_process(
            [*PROGRAM, "serve", "scratch", "--socket-path", str(tmp_path / "t"), "--control", str(control)],
            check=False,
            capture_stderr=True,
        )
        assert (again.returncode, again.stderr.count(b"\n")) == (2, 1)
        assert b"is served by another process" in again.stderr
        assert not (tmp_path / "t").exists()
        await server.stop()
    assert not control.exists()


async def test_a_file_that_was_not_written_to_its_end_does_not_stay(tmp_path: Path) -> None:
    control, file = tmp_path / "c", tmp_path / "f"
    words = ["--set", "fail=save", "--control", str(control)]
    async with serving("faulty", tmp_path / "s", words) as server:
        assert "save" in await complaint(control, "save", "--to", file)
        assert not file.exists()
        assert (await result(control, "state"))["migration"]["state"] == "RUNNING"
        await server.stop()


async def test_a_state_goes_over_the_connection(tmp_path: Path) -> None:
    """As where the socket is reached over SSH. Through a pipe as standard input and output, too."""
    control, file = tmp_path / "c", tmp_path / "f"
    async with serving(
        "scratch", tmp_path / "s", ["--set", "memory=64K", "--control", str(control)]
    ) as server:
        async with open_vmm(server.path, SMALL_RAM) as vmm:
            await vmm.write(2, 0x4000, 0xBEEF)
            saved = await result(control, "save", "--to", file, "inline=true")
            assert saved == {"bytes": file.stat().st_size, "running": True}
            await vmm.write(2, 0x4000, 1)
            await result(control, "stop")
            loaded = await result(control, "load", "--from", file, "inline=true")
            assert loaded == {"bytes": saved["bytes"], "running": False}
            assert await vmm.read(2, 0x4000) == 0xBEEF
            words = (*PROGRAM, "ctl", str(control), "save", "--to", "-", "--json")
            done = await trio.run_process(words, capture_stdout=True, capture_stderr=True)
            assert json.loads(done.stderr) == {"bytes": len(done.stdout), "running": False}
            await vmm.write(2, 0x4000, 2)
            words = (*PROGRAM, "ctl", str(control), "load", "--from", "-", "--json")
            done = await trio.run_process(words, stdin=done.stdout, capture_stdout=True)
            assert not json.loads(done.stdout)["running"]
            assert await vmm.read(2, 0x4000) == 0xBEEF
            file.write_bytes(file.read_bytes()[:-1])
            assert "ends after" in await complaint(control, "load", "--from", file, "inline=true")
            await result(control, "resume")
            assert "No space left" in await complaint(control, "save", "--to", "/dev/full", "inline=true")
        await server.stop()


@pytest.mark.parametrize("method", ["state", "configuration"])
async def test_a_socket_that_never_answers(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the device's own, which QEMU has already."""
    monkeypatch.setattr("vfio_user.cli.ctl.ANSWER", 0.05)
    with socket.socket(socket.AF_UNIX) as silent, trio.fail_after(5):
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        told = await complaint(tmp_path / "silent", method)
    assert "does not answer within 0.05 s: is it the control socket?" in told


async def test_numbers_and_bytes_of_ctl(tmp_path: Path) -> None:
    control = tmp_path / "c"
    async with serving("scratch", tmp_path / "s", ["--control", str(control)]) as server:
        async with open_vmm(server.path, SMALL_RAM) as vmm:
            assert await result(control, "guest-write", "address=0x1000", "data=11223344") == {"bytes": 4}
            assert vmm.ram.read(0x1000, 4) == bytes.fromhex("11223344")
            shown = (await ctl(control, "guest-read", "address=4096", "length=0x4")).output
            assert shown == "data 11223344\n"
            told = (await ctl(control, "configuration")).output.splitlines()
            assert told[0].startswith("space 34127a5c")
            assert "bars.0.index 0" in told
            assert "intx.unanswered no" in told
        await server.stop()


async def test_the_e1000_with_its_wire(tmp_path: Path) -> None:
    control, file = tmp_path / "c", tmp_path / "f"
    async with serving("e1000", tmp_path / "s", ["--control", str(control)]) as server:
        async with open_vmm(server.path, SMALL_RAM):
            shown = (await ctl(control, "state")).output
            assert "model e1000\n" in shown
            assert "client.attached yes\n" in shown
            await result(control, "stop")
            await result(control, "save", "--to", file)
            await result(control, "load", "--from", file)
            assert await result(control, "resume") == {"running": True}
            assert await result(control, "announce") == {"frames": 5}
            assert (await ctl(control, "link", "up=false")).output == "link no\n"
            assert await result(control, "link", "up=true") == {"link": True}
        await server.stop()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({}, ["done"]),
        ({"a": True, "b": None, "c": {"d": 1, "e": ""}}, ["a yes", "b -", "c.d 1", "c.e "]),
        ({"bars": [{"index": 1, "io": False}]}, ["bars.0.index 1", "bars.0.io no"]),
        ({"ranges": [[4096, 8192]]}, ["ranges.0 0x1000 0x2000"]),
    ],
)
def test_results_for_people(value: object, shown: list[str]) -> None:
    assert list(lines(value)) == shown
