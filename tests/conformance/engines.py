# SPDX-License-Identifier: BSD-3-Clause
"""The engines that the conformance tests run against: one row each.

A row knows how to serve a device model at a path. What a test does with it is bytes on a socket, /proc and
the counters, so an engine may as well run in a process of its own.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import trio

from vfio_user.device_models.backends import NoneBackend
from vfio_user.device_models.catalog import make_device, parse_options
from vfio_user.device_models.device import Device
from vfio_user.server.engines.native import NativeServer, Settings
from vfio_user.transport.listener import Listener


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a test wants to have served, and where."""

    model: type[Device]
    path: Path
    assignments: tuple[str, ...] = ()
    """Options of the model, NAME=VALUE."""
    max_dma_maps: int = 65535
    trust_client_memory: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """A server at work: `pid` is the process whose descriptors and mappings are its own."""

    path: Path
    pid: int
    counters: Callable[[], Mapping[str, int]]
    device: Device | None
    """The device itself, where it lives in this process."""

    def counted(self, name: str) -> int:
        return self.counters()[name]


Serve = Callable[..., Served]
"""The fixture `serve`: a model, its options as NAME=VALUE, and fields of `Wanted`."""

Start = Callable[[Wanted, trio.Nursery, ExitStack], Served]


@dataclass(frozen=True, slots=True)
class Engine:
    """`start` returns when a client can connect. The nursery is cancelled and the stack unwound after."""

    name: str
    start: Start


def _start_native(wanted: Wanted, nursery: trio.Nursery, stack: ExitStack) -> Served:
    settings = Settings(
        spin_us=0, max_dma_maps=wanted.max_dma_maps, trust_client_memory=wanted.trust_client_memory
    )
    server = stack.enter_context(NativeServer(settings))
    options = parse_options(wanted.model, wanted.assignments)
    server.install(lambda host: make_device(wanted.model, host, NoneBackend(), options))
    server.listen(stack.enter_context(closing(Listener.bind(wanted.path))))
    nursery.start_soon(server.run)
    return Served(wanted.path, os.getpid(), server.counters, server.device)


ENGINES = (Engine("native", _start_native),)
