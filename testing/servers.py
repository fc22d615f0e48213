# SPDX-License-Identifier: BSD-3-Clause
"""Servers for tests: each has a new device and serves one client, here or in a process of its own."""

import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vfio_user.client.background import background
from vfio_user.client.server_process import serving
from vfio_user.device_models.catalog import MODELS, load_model, make_device, parse_options
from vfio_user.device_models.device import Device, OptionError
from vfio_user.device_models.net import NetBackend, NetDevice
from vfio_user.server.engines.native import NativeServer, Settings
from vfio_user.server.net.factory import open_backend

AnyModel = str | type[Device]
"""A class, a name of `vfio-user list`, or module:Class."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is served: a class, and its options as texts, as on the command line."""

    made_by: type[Device]
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def assignments(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.options.items()]

    @property
    def has_port(self) -> bool:
        """It is a network device."""
        return issubclass(self.made_by, NetDevice)

    @property
    def place(self) -> str:
        """module:Class, for a process that has to find it. OptionError when it cannot."""
        name = f"{self.made_by.__module__}:{self.made_by.__qualname__}"
        known = {path: short for short, path in MODELS.items()}
        if "<locals>" in name:
            raise OptionError(f"{name} is made within a function: another process cannot import it")
        return known.get(name, name)


def find_model(model: AnyModel, options: Mapping[str, str]) -> Model:
    """OptionError when there is no such model, when it cannot be moved, or when an option is wrong."""
    __tracebackhide__ = True
    if not (isinstance(model, str) or (isinstance(model, type) and issubclass(model, Device))):
        raise OptionError(f"{model!r} is no model: give a class, a name of `vfio-user list`, or module:Class")
    if not isinstance(options, Mapping):
        raise OptionError(f"options={options!r}: write options={{name: text, ...}}")
    found = Model(load_model(model) if isinstance(model, str) else model, options)
    parse_options(found.made_by, found.assignments)
    version: object = found.made_by.state_version  # a model of somebody's own may have anything there
    if not isinstance(version, int) or version < 1:
        raise OptionError(f"{found.made_by.__name__} cannot be moved: its `state_version` is {version}")
    return found


@dataclass(frozen=True, slots=True)
class Served:
    """A server at work. `target` is for `attach`, `device` is None in a process of its own."""

    target: Path | socket.socket
    counters: Callable[[], Awaitable[Mapping[str, int]]]
    device: Device | None = None


Serving = Callable[[Model, Path, Path | None], AbstractAsyncContextManager[Served]]
"""Serves a model, at this path if one is needed; the other is that of a stream socket, which stands for the
network of a network device."""


@asynccontextmanager
async def serving_here(model: Model, _path: Path, wire: Path | None) -> AsyncIterator[Served]:
    """In this process: a debugger and coverage see the model."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ExitStack() as stack:
        stack.callback(ours.close)
        stack.callback(theirs.close)
        server = stack.enter_context(NativeServer(Settings(spin_us=0)))
        port: NetBackend | None = None
        if wire is not None:
            port = open_backend(f"stream:{wire}", server.poller, server.call_later)
            stack.callback(port.close)
        options = parse_options(model.made_by, model.assignments)
        server.install(lambda host: make_device(model.made_by, host, port, options))
        server.adopt(theirs)

        async def counters() -> Mapping[str, int]:
            return server.counters()

        async with background() as nursery:
            nursery.start_soon(server.run)
            yield Served(ours, counters, server.device)


@asynccontextmanager
async def serving_apart(model: Model, path: Path, wire: Path | None) -> AsyncIterator[Served]:
    """`vfio-user serve` as a user runs it, with the path of imports that this process has."""
    words = [word for text in model.assignments for word in ("--set", text)]
    if wire is not None:
        words += ["--net", f"stream:{wire}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    async with serving(model.place, path, words, environment=environment) as server:
        yield Served(path, server.ask_counters)
        await server.stop()
