# SPDX-License-Identifier: BSD-3-Clause
"""MIG_DATA_READ without the session's general way, which costs a tenth of the reply to a megabyte.

A guest stands still while the state of its device is read. What is irregular in any way is left to the
session, which knows the reasons for an error.
"""

import logging
from collections.abc import Sequence

from vfio_user.device_models.regions import Buffer
from vfio_user.protocol.codec import MIG_DATA, pack_error, pack_mig_data_read_reply_head
from vfio_user.protocol.connection import Connection
from vfio_user.protocol.constants import MIG_DATA_SIZE, Command
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.migration.engine import MigrationEngine

logger = logging.getLogger(__name__)


def take_read(connection: Connection, engine: MigrationEngine, limit: int) -> Sequence[Buffer] | None:
    """If the next message is a MIG_DATA_READ of at most `limit` bytes, and in order: take it, and give the
    reply, in buffers that are to be sent before the device can go on. None: nothing was taken."""
    start = connection.start
    if connection.end - start < MIG_DATA.size or connection.queued_fds or engine.claim is not None:
        return None
    message_id, command, size, flags, _, argsz, count = MIG_DATA.unpack_from(connection.buffer, start)
    if command != Command.MIG_DATA_READ or size != MIG_DATA.size or flags:
        return None
    if count > limit or argsz < MIG_DATA_SIZE + count:
        return None
    connection.start = start + size
    try:
        data = engine.read(count)
    except DeviceError as error:
        logger.debug("MIG_DATA_READ refused: %s", error.reason)
        return (pack_error(message_id, command, error.errno),)
    return (pack_mig_data_read_reply_head(message_id, sum(map(len, data))), *data)
