# SPDX-License-Identifier: BSD-3-Clause
"""What is taken out of a server's answer: of the type that it should be, and in a range that can be."""

from typing import Any

MOST = (1 << 63) - 1
MOST_PAGES = 1 << 52
"""Pages of 4 KiB in 64 bits of addresses."""


def pick(answer: Any, *path: str) -> Any:
    """What is at `path`. ValueError."""
    for depth, name in enumerate(path, 1):
        if not isinstance(answer, dict) or name not in answer:
            raise ValueError(f"it has no {'.'.join(path[:depth])}")
        answer = answer[name]
    return answer


def whole(answer: Any, *path: str, most: int = MOST) -> int:
    """A number from 0 to `most`. ValueError; true is none, and neither is a text with digits."""
    value = pick(answer, *path)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{'.'.join(path)} is {_short(value)}, and should be a number from 0 to {most}")
    return value


def truth(answer: Any, *path: str) -> bool:
    """ValueError unless it is true or false."""
    value = pick(answer, *path)
    if type(value) is not bool:
        raise ValueError(f"{'.'.join(path)} is {_short(value)}, and should be true or false")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
