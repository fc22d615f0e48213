# SPDX-License-Identifier: BSD-3-Clause
"""Work at several devices at once."""

import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import trio

T = TypeVar("T")


@contextlib.asynccontextmanager
async def side_by_side() -> AsyncIterator[trio.Nursery]:
    """A nursery whose first failure comes out as it is, not inside a group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise first_of(group) from None


def first_of(error: BaseException) -> BaseException:
    """The failure that counts in a group: one that is no cancellation, if there is one."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_of(inner) for inner in error.exceptions]
    return next((leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)), leaves[0])


async def shielded(work: Awaitable[T]) -> T:
    """The result of work that no cancellation from outside may cut."""
    results: list[T] = []
    with trio.CancelScope(shield=True):
        results.append(await work)
    return results[0]
