# SPDX-License-Identifier: BSD-3-Clause
"""The body of every message, as a value.

One frozen class per command and direction, named after the command: `DEVICE_GET_INFO` has
`DeviceGetInfoRequest` and `DeviceGetInfoReply`. Values are checked when they are built: a field that does
not fit its width raises `LocalProtocolError` (`layouts.parse` turns that into `RemoteProtocolError`).

`argsz` of a reply is the size in bytes that the *whole* reply body needs (specification: "Message sizes").
Left at 0 it is filled in. When the request's argsz is smaller, send `fit(reply, request.argsz)`: the fixed
part with the needed argsz, without what does not fit.

Bulk payloads are `bytes` or read-only `memoryview`; both compare equal by content.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

from vfio_user.protocol import constants as c
from vfio_user.protocol.access_messages import (
    DmaReadReply,
    DmaReadRequest,
    DmaWriteReply,
    DmaWriteRequest,
    RegionReadReply,
    RegionReadRequest,
    RegionWriteMultiReply,
    RegionWriteMultiRequest,
    RegionWriteReply,
    RegionWriteRequest,
)
from vfio_user.protocol.device_messages import (
    DeviceGetInfoReply,
    DeviceGetInfoRequest,
    DeviceGetIrqInfoReply,
    DeviceGetIrqInfoRequest,
    DeviceGetRegionInfoReply,
    DeviceGetRegionInfoRequest,
    DeviceGetRegionIoFdsReply,
    DeviceGetRegionIoFdsRequest,
    DeviceResetReply,
    DeviceResetRequest,
    DeviceSetIrqsReply,
    DeviceSetIrqsRequest,
    DmaMapReply,
    DmaMapRequest,
    DmaUnmapReply,
    DmaUnmapRequest,
    VersionReply,
    VersionRequest,
)
from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.protocol.migration_messages import (
    DeviceFeatureReply,
    DeviceFeatureRequest,
    DirtyPagesReply,
    DirtyPagesRequest,
    MigDataReadReply,
    MigDataReadRequest,
    MigDataWriteReply,
    MigDataWriteRequest,
)
from vfio_user.protocol.values import (
    Bitmap,
    BitmapRange,
    DmaLoggingControl,
    DmaLoggingRange,
    DmaLoggingReport,
    FeatureMigration,
    FeatureMigState,
    Header,
    Ioeventfd,
    IoeventfdShadow,
    Ioregionfd,
    Message,
    OtherCapability,
    Payload,
    RegionCapability,
    RegionWrite,
    SparseMmapArea,
    SparseMmapCapability,
    Structure,
    SubRegion,
    TypeCapability,
)

__all__ = [
    "Bitmap",
    "BitmapRange",
    "DeviceFeatureReply",
    "DeviceFeatureRequest",
    "DeviceGetInfoReply",
    "DeviceGetInfoRequest",
    "DeviceGetIrqInfoReply",
    "DeviceGetIrqInfoRequest",
    "DeviceGetRegionInfoReply",
    "DeviceGetRegionInfoRequest",
    "DeviceGetRegionIoFdsReply",
    "DeviceGetRegionIoFdsRequest",
    "DeviceResetReply",
    "DeviceResetRequest",
    "DeviceSetIrqsReply",
    "DeviceSetIrqsRequest",
    "DirtyPagesReply",
    "DirtyPagesRequest",
    "DmaLoggingControl",
    "DmaLoggingRange",
    "DmaLoggingReport",
    "DmaMapReply",
    "DmaMapRequest",
    "DmaReadReply",
    "DmaReadRequest",
    "DmaUnmapReply",
    "DmaUnmapRequest",
    "DmaWriteReply",
    "DmaWriteRequest",
    "FeatureMigState",
    "FeatureMigration",
    "Header",
    "Ioeventfd",
    "IoeventfdShadow",
    "Ioregionfd",
    "Message",
    "MigDataReadReply",
    "MigDataReadRequest",
    "MigDataWriteReply",
    "MigDataWriteRequest",
    "OtherCapability",
    "Payload",
    "RegionCapability",
    "RegionReadReply",
    "RegionReadRequest",
    "RegionWrite",
    "RegionWriteMultiReply",
    "RegionWriteMultiRequest",
    "RegionWriteReply",
    "RegionWriteRequest",
    "SparseMmapArea",
    "SparseMmapCapability",
    "Structure",
    "SubRegion",
    "TypeCapability",
    "VersionReply",
    "VersionRequest",
    "fit",
]

ReplyT = TypeVar("ReplyT", bound=Message)

_FIXED_SIZE: dict[type[Message], int] = {
    DmaUnmapReply: c.DMA_UNMAP_SIZE,
    DeviceGetInfoReply: c.DEVICE_INFO_SIZE,
    DeviceGetRegionInfoReply: c.REGION_INFO_SIZE,
    DeviceGetRegionIoFdsReply: c.REGION_IO_FDS_SIZE,
    DeviceGetIrqInfoReply: c.IRQ_INFO_SIZE,
    DirtyPagesReply: c.DIRTY_PAGES_SIZE,
    DeviceFeatureReply: c.DEVICE_FEATURE_SIZE,
    MigDataReadReply: c.MIG_DATA_SIZE,
}

# What goes when a reply is too long; the replies that are not here cannot be shortened without loss.
_OPTIONAL: dict[type[Message], dict[str, Any]] = {
    DeviceGetRegionInfoReply: {"capabilities": ()},
    DeviceGetRegionIoFdsReply: {"sub_regions": ()},
    DirtyPagesReply: {"range": None, "data": b""},
    DeviceFeatureReply: {"data": b"", "more": ()},
}


def fit(reply: ReplyT, argsz: int) -> ReplyT:
    """The reply that may be sent to a request with this argsz: itself, or its fixed part with the needed
    argsz (specification: "Message sizes").

    RemoteProtocolError (EINVAL) when argsz is below the fixed part, or when the reply cannot be shortened
    because its data would be lost: DMA_UNMAP with its bitmap and MIG_DATA_READ; check those first.
    """
    kind, needed = type(reply), getattr(reply, "argsz", 0)
    if argsz >= needed:
        return reply
    if argsz < _FIXED_SIZE[kind] or kind not in _OPTIONAL:
        raise RemoteProtocolError(f"{kind.__name__}: argsz {argsz} is below the {needed} needed")
    changes = dict(_OPTIONAL[kind])
    if isinstance(reply, DeviceGetRegionInfoReply):
        changes["flags"] = reply.flags & ~int(c.RegionInfoFlags.CAPS)
    return cast(ReplyT, dataclasses.replace(cast(Any, reply), **changes))
