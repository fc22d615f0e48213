# SPDX-License-Identifier: BSD-3-Clause
"""Whether a device has got the state of another one: what both would save now must be the same."""

from collections.abc import Iterator

from vfio_user.device_models.device import Device
from vfio_user.device_models.state import Value

_SHORT = 30


class StateDiffers(AssertionError):
    """The device at the destination would save something else than the one at the source did."""


def compare_state(source: Device | None, destination: Device | None) -> None:
    """StateDiffers with all fields that differ; both devices are stopped. None: nobody can look."""
    __tracebackhide__ = True
    if source is None or destination is None:
        return
    theirs = {section.name: section for section in destination.sections()}
    different = [
        f"section {section.name}, field {line}"
        for section in source.sections()
        for line in _differences("", section.save(), theirs[section.name].save())
    ]
    memories = destination.memories()
    different += [
        f"memory {name}" for name, memory in source.memories().items() if memory.view != memories[name].view
    ]
    if different:
        lines = "\n  ".join(different)
        raise StateDiffers(f"saved at the source, and would be saved at the destination:\n  {lines}")


def _differences(path: str, one: Value, other: Value) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one | other:
            yield from _differences(f"{path}.{name}" if path else name, one.get(name), other.get(name))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}[{place}]", mine, theirs)
    elif isinstance(one, str) and isinstance(other, str) and one != other:
        place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
        where = f" from character {place}" if place > 0 else ""
        place = max(place, 0)
        yield f"{path}{where}: {_short(one[place:])}, {_short(other[place:])}"
    elif one != other:
        yield f"{path}: {_short(one)}, {_short(other)}"


def _short(value: Value) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."
