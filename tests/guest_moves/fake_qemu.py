# SPDX-License-Identifier: BSD-3-Clause
"""A QEMU that has no guest: it speaks QMP on a real socket, and goes through the states of a migration.

Its device is a VMM's client of a real server. Whatever it is told is in `commands`; `hooks` run before a
command of their name is carried out, and may do anything to anybody.
"""

import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from vfio_user.client.background import background
from vfio_user.client.fake_vmm import FakeVmm

CAPABILITIES = ("events", "pause-before-switchover", "postcopy-ram", "multifd", "return-path", "x-colo")
Hook = Callable[["FakeQemu"], Awaitable[None]]


class Refusal(Exception):
    """The command's answer is an error with this text."""


class FakeQemu:
    def __init__(self, path: Path, vmms: dict[str, FakeVmm], status: str) -> None:
        self.path = path
        self.vmms = vmms
        self.status = status
        self.machine = "pc-q35-11.1-machine"
        self.migration = "none"
        self.capabilities = dict.fromkeys(CAPABILITIES, False)
        self._address = 0
        self.parameters = {"downtime-limit": 300, "max-bandwidth": 1 << 30, "mode": "normal"}
        self.peer: FakeQemu | None = None
        self.commands: list[str] = []
        self.hooks: dict[str, Hook] = {}
        self.may_switch = trio.Event()
        """Set: the copying comes to its end."""
        self.may_switch.set()
        self.ran: list[str] = []
        """Every time that its CPUs were started, and what for."""
        self._was_running = False
        self.yanked = trio.Event()
        self._sending = trio.Lock()
        self._streams: list[trio.SocketStream] = []
        self._nursery: trio.Nursery | None = None
        self._ended = trio.CancelScope()

    @property
    def running(self) -> bool:
        return self.status == "running"

    def end(self) -> None:
        """As SIGKILL: no monitor, and no client of the servers."""
        self.status = "gone"
        self._ended.cancel()
        for vmm in self.vmms.values():
            vmm.client.close()

    def leave_monitor(self) -> None:
        """Nobody can ask it any more; it lives."""
        self._ended.cancel()

    def cut(self) -> None:
        """The monitor's connection ends; QEMU lives."""
        for stream in self._streams:
            stream.socket.shutdown(trio.socket.SHUT_RDWR)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as sock, self._ended:
            await sock.bind(str(self.path))
            sock.listen(4)
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                while True:
                    peer, _ = await sock.accept()
                    self._nursery.start_soon(self._answer_all, trio.SocketStream(peer))

    async def _answer_all(self, stream: trio.SocketStream) -> None:
        self._streams.append(stream)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream, background() as nursery:  # a lost connection comes out as it is, in no group
                put, get = trio.open_memory_channel[dict[str, Any]](math.inf)
                nursery.start_soon(self._answer_in_turn, stream, get)
                await self._send(stream, {"QMP": {"version": _VERSION, "capabilities": ["oob"]}})
                rest, decoder = "", json.JSONDecoder()
                async for data in stream:  # the library sends no separator
                    rest += data.decode()
                    while rest:
                        request, end = decoder.raw_decode(rest)
                        rest = rest[end:].lstrip()
                        if "exec-oob" in request:
                            nursery.start_soon(self._answer, stream, request)
                        else:
                            put.send_nowait(request)
        self._streams.remove(stream)

    async def _answer_in_turn(
        self, stream: trio.SocketStream, requests: trio.MemoryReceiveChannel[dict[str, Any]]
    ) -> None:
        async for request in requests:
            await self._answer(stream, request)

    async def _answer(self, stream: trio.SocketStream, request: dict[str, Any]) -> None:
        name, args = request.get("execute") or request["exec-oob"], request.get("arguments", {})
        self.commands.append(args.get("command-line", name))
        try:
            if hook := self.hooks.pop(name, None):
                await hook(self)
            handler = getattr(self, "do_" + name.replace("-", "_"))
            result = await handler(**{key.replace("-", "_"): args[key] for key in args})
            answer = {"return": {} if result is None else result}
        except Refusal as error:
            answer = {"error": {"class": "GenericError", "desc": str(error)}}
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._send(stream, {**answer, "id": request.get("id")})

    async def _send(self, stream: trio.SocketStream, message: dict[str, Any]) -> None:
        async with self._sending:
            await stream.send_all(json.dumps(message).encode() + b"\n")

    async def tell(self, event: str, **data: Any) -> None:
        clock = {"seconds": 1, "microseconds": 2}
        for stream in list(self._streams):
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._send(stream, {"event": event, "data": data, "timestamp": clock})

    async def migrates(self, state: str) -> None:
        self.migration = state
        if self.capabilities["events"]:
            await self.tell("MIGRATION", status=state)

    async def start(self, why: str) -> None:
        assert self.peer is None or not self.peer.running, "two running copies"
        self.status = "running"
        self.ran.append(why)
        await self.tell("RESUME")

    # Questions

    async def do_qmp_capabilities(self, **_: Any) -> None:
        pass

    async def do_query_status(self) -> Any:
        return {"status": self.status, "running": self.running}

    async def do_query_migrate(self) -> Any:
        if self.migration == "none":
            return {}
        ram = {"total": 1 << 20, "remaining": 4096, "transferred": 5000, "normal": 7, "duplicate": 3}
        return {"status": self.migration, "ram": ram | {"dirty-sync-count": 2}, "downtime": 3}

    async def do_query_migrate_capabilities(self) -> Any:
        return [{"capability": name, "state": on} for name, on in self.capabilities.items()]

    async def do_query_migrate_parameters(self) -> Any:
        return self.parameters

    async def do_query_version(self) -> Any:
        return _VERSION

    async def do_query_memory_size_summary(self) -> Any:
        return {"base-memory": 1 << 20}

    async def do_query_pci(self) -> Any:
        devices = [
            {"bus": 0, "slot": slot, "function": 0, "qdev_id": id, "regions": []}
            for slot, id in enumerate(self.vmms, 4)
        ]
        return [{"bus": 0, "devices": devices}]

    async def do_qom_list(self, path: str) -> Any:
        ids = self.vmms if path == "/machine/peripheral" else ()
        return [{"name": id, "type": "child<vfio-user-pci>"} for id in ids]

    async def do_qom_get(self, path: str, property: str) -> Any:
        id = path.rpartition("/")[2]
        values = {"type": self.machine, "parent_bus": "/machine/q35/pcie.0"}
        return values.get(property) or (4 + list(self.vmms).index(id)) << 3

    async def do_human_monitor_command(self, command_line: str) -> Any:
        """A read of one word is one of a BAR, and says that the interrupt was served; one of more is of an
        MSI-X table, which QEMU has itself, and which is as after a reset."""
        word, _, place = command_line.partition(" ")
        if word.startswith("i/"):
            return f"portl[{place}] = 0x0\r\n"
        if word.startswith("o/"):
            await self._output(word[-1], *(int(number, 0) for number in place.split()))
        if not word.startswith("xp/"):
            return ""
        count = int(word[3:-2])
        for vmm in self.vmms.values() if count == 1 else ():
            await vmm.intx.acknowledge()
        words = " ".join(f"{int(number % 4 == 3):#010x}" for number in range(count))
        return f"{int(place, 16):016x}: {words}\r\n"

    async def _output(self, letter: str, port: int, value: int) -> None:
        """A write to configuration space by the ports 0xcf8 and 0xcfc goes to the device's server."""
        if port == 0xCF8:
            self._address = value
            return
        index, offset = (self._address >> 11 & 31) - 4, self._address & 0xFC | port & 3
        data = value.to_bytes({"b": 1, "h": 2, "w": 4}[letter], "little")
        await list(self.vmms.values())[index].client.region_write(_CONFIG, offset, data)

    # Migration

    async def do_migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> None:
        self.capabilities |= {row["capability"]: row["state"] for row in capabilities}

    async def do_migrate_set_parameters(self, **values: Any) -> None:
        self.parameters |= {name.replace("_", "-"): value for name, value in values.items()}

    async def do_migrate_incoming(self, uri: str) -> None:
        self.migration = "setup"

    async def do_migrate(self, uri: str) -> None:
        assert self._nursery is not None
        assert self.peer is not None
        await self.migrates("active")
        await self.peer.migrates("active")
        self._nursery.start_soon(self._copy)

    async def _copy(self) -> None:
        await self.may_switch.wait()
        if self.migration != "active":
            return
        self._was_running = self.running
        self.status = "finish-migrate"
        await self.tell("STOP")
        await self.migrates("pre-switchover")

    async def do_migrate_continue(self, state: str) -> None:
        assert self._nursery is not None
        if self.migration != state:
            raise Refusal(f"Migration not in expected state: {self.migration}")
        self._nursery.start_soon(self._finish)

    async def _finish(self) -> None:
        assert self.peer is not None
        await self.migrates("device")
        if hook := self.hooks.pop("finish", None):
            await hook(self)
        if self.migration != "device":
            return
        self.status = "postmigrate"
        await self.migrates("completed")
        if self.peer.status == "inmigrate":
            self.peer.status = "paused"
            await self.peer.migrates("completed")

    async def do_yank(self, instances: list[dict[str, Any]]) -> None:
        """The one command that goes out of band here."""
        if instances != [{"type": "migration"}]:
            raise Refusal(f"no such instances: {instances}")
        self.yanked.set()
        await self.fail("failed")

    async def do_migrate_cancel(self) -> None:
        await self.fail("cancelled")

    async def fail(self, state: str) -> None:
        """The migration ends in `state`: the source goes on, the destination ends itself."""
        assert self.peer is not None
        if self.migration in ("none", "completed", "failed", "cancelled"):
            return
        await self.migrates(state)
        if self.status == "finish-migrate" and self._was_running:
            await self.start("failed migration")
        self.peer.end()

    async def do_cont(self) -> None:
        if self.status not in ("paused", "postmigrate", "prelaunch"):
            raise Refusal(f"not now: {self.status}")
        await self.start("cont")

    async def do_stop(self) -> None:
        """While it waits for a guest, this means that it is not to start it by itself."""
        if self.status != "inmigrate":
            self.status = "paused"

    async def do_quit(self) -> None:
        self.end()


_CONFIG = 7
_BARS = range(0x10, 0x28, 4)
_VERSION = {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": "fake"}


@contextlib.asynccontextmanager
async def fake_pair(
    folder: Path, here: dict[str, FakeVmm], there: dict[str, FakeVmm]
) -> AsyncIterator[tuple[FakeQemu, FakeQemu]]:
    """A source with a running guest, and a destination that waits."""
    source = FakeQemu(folder / "source.qmp", here, "running")
    destination = FakeQemu(folder / "destination.qmp", there, "inmigrate")
    source.peer, destination.peer = destination, source
    for vmm in there.values():
        for offset in _BARS:  # no guest has placed them yet
            await vmm.client.region_write(_CONFIG, offset, bytes(4))
    async with background() as nursery:
        await nursery.start(source.serve)
        await nursery.start(destination.serve)
        yield source, destination
