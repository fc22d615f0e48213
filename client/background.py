# SPDX-License-Identifier: BSD-3-Clause
"""Tasks that serve a block of code, without changing what the block raises."""

import contextlib
from collections.abc import AsyncIterator

import trio


@contextlib.asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled when the block ends.

    The block's own exception comes out as it is, not inside an ExceptionGroup, as long as no task of the
    nursery fails as well.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
