# SPDX-License-Identifier: BSD-3-Clause
"""The methods of the control socket: one row for each. Dispatch, checks, docs and tests read this table."""

from collections.abc import Callable, Mapping
from typing import Any

from vfio_user.protocol.json_rpc import METHOD_NOT_FOUND, REFUSED, RpcError
from vfio_user.server.control_configuration import describe
from vfio_user.server.control_device import DeviceControl
from vfio_user.server.control_dirty import DirtyControl
from vfio_user.server.control_guest import MAX_ACCESS, GuestControl
from vfio_user.server.control_jobs import Steps
from vfio_user.server.control_leases import Leases
from vfio_user.server.control_method import Method, Param
from vfio_user.server.control_network import announce, link_up, plug
from vfio_user.server.control_pending import MESSAGES, MOST_VECTORS, pend
from vfio_user.server.dma_region import Access
from vfio_user.server.engines.engine import Engine

SHUTDOWN_AFTER = 20_000_000  # ns, in which the answer goes out


class Control:
    """What the methods work on. `shutdown` ends the server; `cut` ends the jobs of a transfer."""

    def __init__(
        self, engine: Engine[Any], engine_name: str, shutdown: Callable[[], None], cut: Callable[[], None]
    ) -> None:
        self.engine = engine
        self.engine_name = engine_name
        self.device = DeviceControl(engine, cut)
        self.dirty = DirtyControl(engine)
        self.guest = GuestControl(engine)
        self.leases = Leases()
        self.shutdown = shutdown
        self.cut = cut


def _state(control: Control) -> Any:
    engine, device, migration = control.engine, control.device.device, control.device.migration
    transfer, last = control.device.transfer, control.device.last_transfer
    return {
        "model": device.model,
        "state_version": device.state_version,
        "engine": control.engine_name,
        "client": {
            "attached": engine.attached,
            "served": engine.clients_served,
            "migrates_by": migration.edition,
        },
        "running": engine.host.running,
        "migration": {
            "available": migration.available,
            "state": migration.state.name,
            "owner": "controller" if control.device.claimed else "client",
            "reason": migration.reason,
        },
        "blank": engine.host.blank,
        "link": link_up(engine),
        "transfer": None if transfer is None else transfer.progress(),
        "last_transfer": None if last is None else {**last.progress(), "error": last.error},
        "bus_master": engine.host.dma.enabled,
        "unanswered_dma": engine.outstanding,
        "memory": _memory(engine),
        "dirty_log": control.dirty.figures(),
        "write_through": engine.host.dma.write_through,
        "counters": dict(engine.counters()),
    }


def _stop(control: Control, wait: int, describe_too: bool) -> Steps:
    def tell() -> dict[str, Any]:
        return {"dirty_log": control.dirty.figures(), "configuration": _describe(control)}

    return control.device.stop(wait, tell if describe_too else dict)


def _describe(control: Control) -> Any:
    return describe(control.device.device, control.engine.host.irqs)


def _memory(engine: Engine[Any]) -> Any:
    """Bytes of guest memory by the way to reach it."""
    sizes = dict.fromkeys((access.value for access in Access), 0)
    for region in engine.host.table:
        sizes[region.access.value] += region.size
    return sizes


def _cancel(control: Control) -> Any:
    if control.device.transfer is None:
        raise RpcError(REFUSED, "no save or load is under way")
    control.cut()
    return {}


def _shutdown(control: Control) -> Any:
    control.engine.call_later(SHUTDOWN_AFTER, control.shutdown)
    return {}


_WAIT = Param(
    "wait", int, 100, "milliseconds to serve what the client has sent, and await replies it owes", most=60_000
)
_DESCRIBE = Param("describe", bool, False, "then tell `dirty_log`, as `state`, and `configuration`, too")
_HOLD = Param("hold", bool, False, "go on writing what changes until a `stop`, and stay stopped")
_INLINE = Param("inline", bool, False, "over this connection, without a descriptor")
_PAGE = Param("page_size", int, 4096, "bytes, a power of two", least=4096, power_of_two=True)
_CLEAR = Param("clear", bool, False, "forget what is reported")
_WHOLE = Param("whole", bool, False, "rewrite whole pages instead of one byte in each")
_ON = Param("on", bool, None, "true or false")
_UP = Param("up", bool, None, "true or false")
_LEASE = Param("lease", bool, False, "end it when this connection ends")
_ADDRESS = Param("address", int, None, "in the guest's memory, as the device sees it", most=(1 << 64) - 1)
_LENGTH = Param("length", int, None, f"bytes, at most {MAX_ACCESS}", least=1, most=MAX_ACCESS)
_DATA = Param("data", bytes, None, f"at most {MAX_ACCESS} bytes, hexadecimal", least=1, most=MAX_ACCESS)
_REPLY = Param("wait", int, 1000, "milliseconds to wait for the client's reply", most=60_000)
_INDEX = Param("index", int, 2, "1 for MSI, 2 for MSI-X", least=min(MESSAGES), most=max(MESSAGES))
_VECTORS = Param(
    "vectors", bytes, None, "a mask, the first byte for vectors 0 to 7", least=1, most=MOST_VECTORS // 8
)
_CLIENT = "a client is there; native engine"
_LOG = "a controller has started the log; native engine"

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "state",
            lambda c, a, stream: _state(c),
            "what device, client, migration and dirty log are at",
            "always",
        ),
        Method(
            "configuration",
            lambda c, a, stream: _describe(c),
            "the configuration space as the guest reads it, its BARs, MSI-X, MSI and INTx",
            "always",
        ),
        Method(
            "stop",
            lambda c, a, stream: _stop(c, a["wait"], a["describe"]),
            "stop the device: it answers, but starts and sends nothing, and remembers what it is asked",
            "unless the client migrates it itself",
            (_WAIT, _DESCRIBE),
        ),
        Method(
            "resume",
            lambda c, a, stream: c.device.resume(),
            "let it go on, and fire the interrupts that are due; without a client it waits for one",
            "no save or load is under way, and the client does not migrate it itself",
        ),
        Method(
            "blank",
            lambda c, a, stream: c.device.blank(a["on"]),
            "answer the client's reads of BARs with zeros and drop its writes: nothing of them reaches the "
            "model; ends with `resume`, a reset, and the client",
            "a controller has stopped the device",
            (_ON, _LEASE),
            end=lambda c: c.device.blank(False),
        ),
        Method(
            "pend",
            lambda c, a, stream: pend(c.device, a["index"], a["vectors"]),
            "let the model owe messages that its last VMM had not delivered: each fires, once, when the "
            "device runs and its vector has an eventfd; until then they are part of its state",
            "a controller has stopped the device, and no save or load is under way",
            (_INDEX, _VECTORS),
        ),
        Method(
            "save",
            lambda c, a, stream: c.device.save(stream, a["hold"]),
            "write its state to the descriptor: memory while it runs, the rest in a short stop",
            "the model can be saved, no save or load is under way, and the client does not migrate it itself",
            (_HOLD, _INLINE),
            stream="written",
        ),
        Method(
            "load",
            lambda c, a, stream: c.device.load(stream),
            "read a state from the descriptor to its end, check it, and put it into the device",
            "as `save`, and the device is stopped, or no client uses it yet",
            (_INLINE,),
            stream="read",
        ),
        Method(
            "cancel",
            lambda c, a, stream: _cancel(c),
            "end the save or load under way; the device is as it was before",
            "a save or load is under way",
        ),
        Method(
            "log-start",
            lambda c, a, stream: c.dirty.start(a["page_size"]),
            "log the pages of guest memory that the device writes without the client's seeing it",
            "the client has not started it itself, and none with another page size runs; native engine",
            (_PAGE, _LEASE),
            end=lambda c: c.dirty.end(),
        ),
        Method(
            "log-stop",
            lambda c, a, stream: c.dirty.stop(),
            "forget the log",
            "it is not the client's; native engine",
        ),
        Method(
            "log-report",
            lambda c, a, stream: c.dirty.report(a["clear"]),
            "the dirty pages, as ranges",
            _LOG,
            (_CLEAR,),
        ),
        Method(
            "log-hand-over",
            lambda c, a, stream: c.dirty.hand_over(a["whole"]),
            "let the client write what is in the dirty pages already, so that it knows of them; **the "
            "guest's CPUs must be stopped**",
            _LOG + "; the device is stopped",
            (_WHOLE,),
        ),
        Method(
            "write-through",
            lambda c, a, stream: c.dirty.write_through(a["on"]),
            "write to mapped memory by message, so that the client knows of each write; ends with the client",
            _CLIENT,
            (_ON, _LEASE),
            end=lambda c: c.dirty.write_through(False),
        ),
        Method(
            "guest-read",
            lambda c, a, stream: c.guest.read(a["address"], a["length"], a["wait"]),
            "read a guest address by DMA message, also where no memory is",
            _CLIENT,
            (_ADDRESS, _LENGTH, _REPLY),
        ),
        Method(
            "guest-write",
            lambda c, a, stream: c.guest.write(a["address"], a["data"], a["wait"]),
            "write a guest address by DMA message, never through a mapping, so that the client knows",
            _CLIENT,
            (_ADDRESS, _DATA, _REPLY),
        ),
        Method(
            "link",
            lambda c, a, stream: plug(c.engine, a["up"]),
            "plug the network's cable in, or pull it out; `link` is then whether it has a far end too",
            "the model is a network card",
            (_UP,),
        ),
        Method(
            "announce",
            lambda c, a, stream: announce(c.engine),
            "tell the network where the card is now: five reverse ARP requests within 0.8 s",
            "the model is a network card, and runs",
        ),
        Method(
            "reset",
            lambda c, a, stream: c.device.reset(),
            "reset the device, as the client's DEVICE_RESET",
            "always",
        ),
        Method("shutdown", lambda c, a, stream: _shutdown(c), "end the server, as SIGTERM", "always"),
    )
}


def find_method(name: str) -> Method:
    """The row of a method. RpcError."""
    method = METHODS.get(name)
    if method is None:
        raise RpcError(METHOD_NOT_FOUND, f"there is no method {name[:40]!r}; there are {', '.join(METHODS)}")
    return method
