# SPDX-License-Identifier: BSD-3-Clause
"""What the libvfio-user engine cannot do, with the reasons: they lie in the library, not in our devices.

One row for each; docs/compliance.md shows them. For each row the conformance tests that fail are known
(`tests/conformance/limits.py`), and are expected to fail strictly: a library that can more is noticed.
"""

from dataclasses import dataclass

from vfio_user.server.engines.libvfio_user_abi import EVERY, V2_ONLY, Abi

V1_ONLY = EVERY - V2_ONLY


@dataclass(frozen=True, slots=True)
class Limit:
    """`effect`: what a client sees; `reason`: why it is so; `abis`: which revisions have it."""

    name: str
    effect: str
    reason: str
    abis: frozenset[Abi] = EVERY


LIMITS: tuple[Limit, ...] = (
    Limit(
        "framing",
        "a header, and a body, each have to arrive in one piece; a client that connects and says nothing, or "
        "stops between header and body, holds up the server until a signal comes (SIGUSR1 of `--stats` too), "
        "which costs it the connection; one that stops within them gets EINVAL or is dropped",
        "each is read with one receive call, that of VERSION and every body without a time limit; a shorter "
        "one is an error",
    ),
    Limit(
        "refused header",
        "after a header that is refused, what follows is not understood: the connection should be given up",
        "the body that belongs to it is not read, and is taken for the next header; the connection stays",
    ),
    Limit(
        "error replies",
        "an error reply to a region access, and some others, has the body of a good one",
        "the body that was prepared is sent with the error",
    ),
    Limit(
        "replies unasked for",
        "a reply that nobody waits for is answered with an error",
        "its header is refused like that of a bad command",
    ),
    Limit(
        "descriptors",
        "descriptors that a command does not take are closed without an error, and those that come with a "
        "body are lost",
        "descriptors are looked for with the header only; one that is cut short leaks those that came along",
    ),
    Limit(
        "version",
        "a proposal that cannot be used ends the connection; wrong types and values outside of what makes "
        "sense are taken; the reply may be longer than the proposal",
        "negotiation is one try within accept; the JSON is looked at for a few keys only",
    ),
    Limit(
        "unread replies",
        "a client that does not read its replies holds up the server",
        "replies are sent on a blocking socket",
    ),
    Limit(
        "client limits",
        "max_data_xfer_size, max_dma_maps and max_msg_fds of the client are not kept in every reply",
        "they are read and not compared, or the request is refused as a whole",
    ),
    Limit(
        "write multi",
        "REGION_WRITE_MULTI is refused with EINVAL",
        "the command is not implemented, nor offered",
    ),
    Limit(
        "large argsz",
        "GET_REGION_IO_FDS with an argsz above 1 MiB is refused",
        "argsz is compared with the largest message",
    ),
    Limit(
        "mapping a region",
        "the descriptor of a region that can be mapped comes only when argsz has room for the areas; a "
        "client that takes fewer descriptors than there are areas gets ENOSPC; a reply may end in the middle "
        "of an area",
        "the descriptor is sent with the capability, once for each area",
    ),
    Limit(
        "doorbells",
        "the eventfds of doorbells are the same for all clients, and ring for one that has left",
        "they are set up once for the context",
    ),
    Limit(
        "sub-region size",
        "an entry of GET_REGION_IO_FDS has 48 bytes, not 40",
        "the shadow ioeventfd's offset was added to the structure",
        V2_ONLY,
    ),
    Limit(
        "DMA map checks",
        "DMA_MAP takes ranges that are empty, not aligned, wrap around or allow no access (that the device "
        "cannot use them, only the log says), and files that are too short; overlaps are EINVAL, not EEXIST; "
        "a region that is mapped again as it is succeeds, and the server keeps that descriptor open (until "
        "March 2026)",
        "only overlap, size and flags are checked; the callback for a region cannot refuse it",
    ),
    Limit(
        "number of DMA regions",
        "a client may map 16 regions (v1), 64 (v2), or `--max-dma-maps` (from March 2026 on); one more is "
        "EINVAL, not ENOSPC",
        "the table has a fixed size",
    ),
    Limit(
        "DMA unmap",
        "DMA_UNMAP takes exactly one region as it was mapped; everything else is ENOENT",
        "regions are compared by address and size",
    ),
    Limit(
        "untrusted memory",
        "a client that truncates the file of its memory ends the server (SIGBUS), and any file is mapped",
        "seals are not looked at, and there is no access by file unless a client asks for it",
    ),
    Limit(
        "DMA by message",
        "while the device reads or writes memory without a descriptor, the client must send nothing but the "
        "reply, at once, in one piece and with a body; nobody else is served meanwhile",
        "the next message is taken for the reply, in a receive call that waits; with another one the stream "
        "is lost",
    ),
    Limit(
        "DMA by message in v1",
        "memory without a descriptor can only be accessed from the start of a region",
        "the message's address lacked the offset in the region until July 2023; so we refuse what has one",
        V1_ONLY,
    ),
    Limit(
        "shared eventfds",
        "INTx, MSI and MSI-X have one set of eventfds: those of one replace and disable the others'",
        "there is one array, by vector",
    ),
    Limit(
        "disabling vectors",
        "taking the eventfd of a vector other than the first away has no effect; to trigger one that has "
        "none is no error",
        "the loop ends at the count, not at start and count",
    ),
    Limit(
        "what SET_IRQS brings",
        "a client that gives eventfds but never writes the configuration space gets no MSI or MSI-X; "
        "a boolean counts only as 1; a descriptor that is no eventfd is taken; an eventfd that is full holds "
        "up the server; flags that do not exist are taken",
        "the library does not tell the device of eventfds, and does not look at what they are",
    ),
    Limit(
        "INTx automatic mask",
        "INTx is announced without automatic mask, and fires each time that its level rises",
        "the flags are fixed; a client that trusts them never unmasks",
    ),
    Limit(
        "mask and resample eventfds",
        "an eventfd to mask or unmask (KVM's resample) masks or unmasks at once, and is closed",
        "only the action is looked at, not the data",
    ),
    Limit(
        "SET_IRQS count",
        "a start and count that wrap around are taken",
        "their sum is compared in 32 bits",
        V1_ONLY,
    ),
    Limit(
        "reconnect with state",
        "when a client leaves while the device is saving, resuming or stopped by it, those that wait are cut "
        "off, and have to connect again",
        "the library takes the state of a migration over to the next client, and has no function that ends "
        "it; so the next client gets a new context, at the same path",
    ),
    Limit(
        "v1 states",
        "while the device is stopped, or in stop-and-copy, only the migration region and DIRTY_PAGES are "
        "served: no other region, no DMA_UNMAP, no RESET; pre-copy cannot be given up; a restore that failed "
        "shows as resuming; a client that leaves while dirty pages are logged leaves that to the next one; "
        "a value far above 7 may end the server",
        "commands and changes of state are looked up in tables of the library's own, without a bound",
        V1_ONLY,
    ),
    Limit(
        "v1 registers",
        "the data area has 64 KiB and cannot be mapped; a register is refused wherever it has no use, and "
        "the reserved field always; after each change of state an iteration begins with pending_bytes, which "
        "is 0 where the device fails to tell it",
        "the area is as large as a message that surely comes in one piece, and has no memory to be lent; "
        "the library keeps a state of its own for the registers; the callback for pending_bytes cannot fail",
        V1_ONLY,
    ),
    Limit(
        "v1 dirty pages",
        "a report, and the bitmap of DMA_UNMAP, are of exactly one mapped region, in pages of 4 KiB, with at "
        "most 1 MiB of bitmap in whole 8 bytes; of a device that cannot tell what it wrote, only the report "
        "after it was stopped has everything",
        "the library keeps the log, and tells neither of the question nor what was asked",
        V1_ONLY,
    ),
    Limit(
        "P2P",
        "the states without peer-to-peer DMA are neither offered nor known: to ask for one is EINVAL",
        "in the table of states they lead nowhere",
        V2_ONLY,
    ),
    Limit(
        "v2 features",
        "a GET with too little argsz is EINVAL, and does not tell what is needed; a feature that does not "
        "exist is EINVAL, not ENOTTY; the reply to SET and PROBE has the argsz of the request; data_fd is "
        "0, not -1; a SET of the state may be cut short",
        "the request is copied for the reply; what the feature needs is not compared with what came",
        V2_ONLY,
    ),
    Limit(
        "v2 states",
        "there is no ERROR: where data is refused, or incomplete, the device goes on resuming; while it is "
        "stopped, or in stop-and-copy, only features, the stream and (stopped) its regions are served, no "
        "RESET and no DMA_UNMAP; RESET does not end a migration (from May 2026 on); when a client has left "
        "a device stopped, the next one is told that it runs",
        "commands and changes of state are looked up in tables of the library's own",
        V2_ONLY,
    ),
    Limit(
        "v2 data",
        "a reply with less data than was asked for is as long as one with all, zeros at its end; "
        "MIG_DATA_WRITE needs an argsz that has room for its data, and data past its size is ignored",
        "the reply is made before the data is there; lengths are compared in one direction only",
        V2_ONLY,
    ),
    Limit(
        "v2 dirty pages",
        "a report is of exactly one region that is mapped now, with a descriptor, and no shorter than a "
        "page; what a region that went had is lost; of a device that cannot tell what it wrote, only the "
        "report after it was stopped has everything; the page size is taken as it comes; ranges to log are "
        "not looked at; a second START is no error, and the next client finds the log on; a report of 256 "
        "pages or more, of another size than those that are logged, is wrong or never ends",
        "each region has its log, and the library tells neither of the question nor what was asked; "
        "between two page sizes it counts pages in 8 bits",
        V2_ONLY,
    ),
    Limit(
        "empty accesses",
        "the reply to an access of no bytes has no body",
        "nothing is done for it",
    ),
    Limit(
        "editions",
        "a library speaks one edition of migration: v1 the region and DIRTY_PAGES, v2 the features",
        "v2 replaced v1 in September 2023",
    ),
    Limit(
        "inherited socket",
        "`--fd` is refused",
        "the library makes its socket itself, from a path",
    ),
)
