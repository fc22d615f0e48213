# SPDX-License-Identifier: BSD-3-Clause
"""`vfio-user serve`: a device model on a socket, until SIGTERM or SIGINT."""

import logging
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import trio

from vfio_user.cli.engines import ENGINES
from vfio_user.cli.log_limit import LogLimit
from vfio_user.cli.main import fail
from vfio_user.device_models.catalog import load_model, make_device, parse_options
from vfio_user.device_models.device import Device, Host, OptionError
from vfio_user.device_models.net import NetBackend, NetDevice
from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.control import ControlServer
from vfio_user.server.engines.engine import Engine, Settings
from vfio_user.server.engines.libvfio_user_library import LibraryError
from vfio_user.server.net.errors import BackendError
from vfio_user.server.net.factory import open_backend

DEFAULTS = Settings()
DEFAULT_NET = "echo"
OTHER_FILES = 4096  # open files that DMA regions leave for eventfds and all else
END = (signal.SIGTERM, signal.SIGINT)
LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class SocketPath(click.Path):
    """A path that is not empty: as a `Path` that would be the folder we are in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("it is empty: give the path of the socket to make", param, ctx)
        return super().convert(value, param, ctx)


@click.command("serve")
@click.argument("model")
@click.option("--socket-path", type=SocketPath(path_type=Path), help="UNIX socket to listen on.")
@click.option(
    "--control", type=click.Path(path_type=Path), help="UNIX socket for `vfio-user ctl` (docs/control.md)."
)
@click.option("--fd", type=click.IntRange(0), help="Inherited UNIX socket, listening or connected.")
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="native",
    show_default=True,
    help="Who speaks the protocol. libvfio-user is a library in C, for clients that are trusted.",
)
@click.option(
    "--net",
    "net",
    metavar="BACKEND",
    help="echo (the default), tap:NAME, stream:PATH or none; with ,pcap=FILE and faults as ,drop=0.01.",
)
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Option of the model (list).")
@click.option(
    "--spin",
    type=click.IntRange(0, 100_000),
    default=DEFAULTS.spin_us,
    show_default=True,
    metavar="MICROSECONDS",
    help="Look for work so long before sleeping: less latency, more CPU.",
)
@click.option(
    "--cpu-latency",
    type=click.IntRange(0, 10_000),
    metavar="MICROSECONDS",
    help="While there is work, let idle CPUs wake within this time (0: they poll). All CPUs of the machine, "
    "more power, less latency; needs root.",
)
@click.option(
    "--trust-client-memory",
    is_flag=True,
    help="Map guest memory that is not sealed against shrinking too. A client that truncates it "
    "then kills this process; without this flag such memory is accessed by read and write calls.",
)
@click.option(
    "--max-dma-maps",
    type=click.IntRange(1, 65535),
    default=DEFAULTS.max_dma_maps,
    show_default=True,
    help="DMA regions that a client may map at a time; fewer where the limit of open files is lower.",
)
@click.option(
    "--stats", is_flag=True, help="Print the counters when a client leaves, at SIGUSR1, and at the end."
)
@click.option("-v", "--verbose", count=True, help="Log what happens; twice: every refused request.")
def command(
    model: str,
    socket_path: Path | None,
    control: Path | None,
    fd: int | None,
    engine: str,
    net: str | None,
    assignments: tuple[str, ...],
    spin: int,
    cpu_latency: int | None,
    trust_client_memory: bool,
    max_dma_maps: int,
    stats: bool,
    verbose: int,
) -> None:
    """Serve the device MODEL (a name of `vfio-user list`, or package.module:Class of your own).

    Prints "listening on PATH" when a client can connect. Clients may come and go; the device keeps its
    state. SIGTERM and SIGINT end it with exit status 0, and the socket file is removed.
    """
    _start_log(verbose)
    for number in END:
        signal.signal(number, _end_early)
    settings = Settings(
        spin_us=spin,
        cpu_latency_us=cpu_latency,
        trust_client_memory=trust_client_memory,
        max_dma_maps=_most_dma_maps(max_dma_maps),
    )
    if (socket_path is None) == (fd is None):
        fail("give either --socket-path PATH or --fd N")
    if control is not None and socket_path is not None and control.absolute() == socket_path.absolute():
        fail(f"--control {control}: that is the device's own socket; give it another path")
    order = _Order(model, net, assignments, engine, socket_path, fd, control)
    shut_down = _ShutDown()
    with ExitStack() as stack:
        try:
            server = _open(order, settings, shut_down, stack)
        except (OptionError, BackendError, LibraryError, VfioUserError, OSError) as error:
            fail(str(error))
        trio.run(_serve, server, socket_path or f"descriptor {fd}", stats, shut_down)


@dataclass(frozen=True, slots=True)
class _Order:
    """What to serve, and where: the words of the command line."""

    model: str
    net: str | None
    assignments: tuple[str, ...]
    engine: str
    socket_path: Path | None
    fd: int | None
    control: Path | None


def _open(order: _Order, settings: Settings, shut_down: "_ShutDown", stack: ExitStack) -> Engine[Any]:
    """A server that listens, with its device; everything that was made is on the stack."""
    server = stack.enter_context(ENGINES[order.engine](settings))
    server.install(_maker(server, order, stack))
    with _signals_wait():
        if order.socket_path is not None:
            server.listen_at(order.socket_path)
        elif order.fd is not None:
            server.adopt_fd(order.fd)
        if order.control is not None:
            stack.callback(ControlServer(server, order.engine, order.control, shut_down).close)
    return server


@contextmanager
def _signals_wait() -> Iterator[None]:
    """A signal that comes inside the block ends us behind it: a file that is being made has an owner then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_log(verbose: int) -> None:
    """A log of our own, unless the process has one: that is none of our business."""
    handler = logging.StreamHandler()
    handler.addFilter(LogLimit())
    logging.basicConfig(
        level=LEVELS[min(verbose, 2)],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[handler],
    )


def _end_early(_number: int, _frame: object) -> None:
    """A signal that comes before the server runs (trio sees to the later ones): what was made goes."""
    sys.exit(0)


def _allow_many_files() -> int:
    """Up to the hard limit, which is given: each vector has an eventfd, each DMA region a descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def _most_dma_maps(wanted: int) -> int:
    """As many as are wanted, or as the limit of open files leaves."""
    files = _allow_many_files()
    return min(wanted, files - min(OTHER_FILES, files // 2))


def _maker(server: Engine[Any], order: _Order, stack: ExitStack) -> Callable[[Host], Device]:
    if ":" in order.model:
        sys.path.append(str(Path.cwd()))  # for the user's own module: a console script does not look there
    model = load_model(order.model)
    options = parse_options(model, order.assignments)
    backend: NetBackend | None = None
    if issubclass(model, NetDevice):
        opened = open_backend(order.net or DEFAULT_NET, server.poller, server.call_later)
        stack.callback(opened.close)
        backend = opened
    elif order.net is not None:
        raise OptionError(f"{order.model} is no network device: leave --net away")
    return lambda host: make_device(model, host, backend, options)


class _ShutDown:
    """Ends the server, as SIGTERM does, once it runs: a controller asks for it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()

    def __call__(self) -> None:
        self.scope.cancel()


async def _serve(server: Engine[Any], where: Path | str, stats: bool, shut_down: _ShutDown) -> None:
    show = print_counters if stats else _print_nothing
    server.client_left = lambda: show(server, f"client {server.clients_served} has left")
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            shut_down.scope = nursery.cancel_scope
            nursery.start_soon(_run, server, nursery.cancel_scope)
            print(f"listening on {where}", flush=True)
            async for number in signals:
                if number != signal.SIGUSR1:
                    nursery.cancel_scope.cancel()
                    break
                show(server, "SIGUSR1")
    server.client_left = None
    show(server, "the end")


async def _run(server: Engine[Any], scope: trio.CancelScope) -> None:
    await server.run()
    scope.cancel()  # an adopted connection has ended: there is nobody else to wait for


def print_counters(server: Engine[Any], occasion: str) -> None:
    """A title, one `name value` a line (the device's, its network's, the DMA's), and an empty line."""
    lines = [f"# counters: {occasion}", *(f"{name} {value}" for name, value in server.counters().items()), ""]
    print("\n".join(lines), flush=True)


def _print_nothing(_server: Engine[Any], _occasion: str) -> None:
    """Without --stats."""
