# SPDX-License-Identifier: BSD-3-Clause
"""The engines that the conformance tests run against: one row each.

A row knows how to serve a device model at a path. What a test does with it is bytes on a socket, /proc, the
counters and the log, so an engine may as well run in a process of its own.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import trio

from conformance.nursery import Order, Zygote
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
    pgsize: int = 4096

    @property
    def settings(self) -> Settings:
        return Settings(
            spin_us=0,
            max_dma_maps=self.max_dma_maps,
            trust_client_memory=self.trust_client_memory,
            pgsize=self.pgsize,
        )


@dataclass(frozen=True, slots=True)
class Served:
    """A server at work: `pid` is the process whose descriptors and mappings are its own."""

    path: Path
    pid: int
    counters: Callable[[], Mapping[str, int]]
    log: Callable[[], str]
    """What it has logged: `LEVEL logger: text`, and tracebacks."""

    def counted(self, name: str) -> int:
        return self.counters()[name]


Serve = Callable[..., Served]
"""The fixture `serve`: a model, its options as NAME=VALUE, and fields of `Wanted`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where servers live: cancelled, unwound, and ended after the test."""

    nursery: trio.Nursery
    stack: ExitStack
    zygote: Zygote


Start = Callable[[Wanted, Place], Served]


@dataclass(frozen=True, slots=True)
class Engine:
    """`start` returns when a client can connect."""

    name: str
    start: Start
    apart: bool = False
    """Whether it lives in a process of its own, and needs the library."""


class _Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def text(self) -> str:
        return "\n".join(self.lines)


def _start_here(wanted: Wanted, place: Place) -> Served:
    """The native engine, in this process."""
    log = _Log()
    logging.getLogger().addHandler(log)
    place.stack.callback(logging.getLogger().removeHandler, log)
    server = place.stack.enter_context(NativeServer(wanted.settings))
    options = parse_options(wanted.model, wanted.assignments)
    server.install(lambda host: make_device(wanted.model, host, NoneBackend(), options))
    server.listen(place.stack.enter_context(closing(Listener.bind(wanted.path))))
    place.nursery.start_soon(server.run)
    return Served(wanted.path, os.getpid(), server.counters, log.text)


def _start_apart(wanted: Wanted, place: Place) -> Served:
    """libvfio-user, in a process of its own: it may hang, or end by an assertion."""
    log = wanted.path.with_suffix(".log")
    order = Order("libvfio-user", wanted.model, wanted.path, log, wanted.assignments, wanted.settings)
    child = place.zygote.fork(order)
    place.stack.callback(child.close)
    return Served(wanted.path, child.pid, child.counters, log.read_text)


ENGINES = (Engine("native", _start_here), Engine("libvfio-user", _start_apart, apart=True))
