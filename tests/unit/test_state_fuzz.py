# SPDX-License-Identifier: BSD-3-Clause
"""Every field of every section spoilt in every way: refused by name and nothing changed, or harmless."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import scenes
from vfio_user.device_models.e1000.bench import Bench
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.fake_migration import restore_device, save_device
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import StateError

SAVED = {model: scenes.read(scenes.files(model)[-1]) for model in scenes.SCENES}
SECTIONS = [(model, name) for model in SAVED for name in SAVED[model].sections]
MISSING = object()
NEVER: dict[type, list[Any]] = {
    bool: [0, 1, "true", None, [], {}],
    int: [True, "1", 1.0, None, [], {}, -2, 1 << 64, 1 << 20_000],
    str: [0, True, None, [], {}, "0", "zz", "00" * (1 << 20), " 00"],
    list: [0, "", None, {}, [[]], [None], [0] * 30_000, [-1], ["00" * 60] * 30_000, [1 << 64]],
    dict: [0, "", None, [], {}, {"surprise": 0}],
    type(None): [True, "", [], {}, -2, 1 << 64],
}
"""Values that a field of this type never has, whatever field it is."""

Path = tuple[str | int, ...]
OPTIONAL: set[tuple[str, Path]] = {
    *(("flow", ("pause",)), ("receive_ring", ("delay",)), ("transmit", ("delay",)))
}
"""What may be null."""


def paths(value: Any, place: Path = ()) -> Iterator[Path]:
    """Every value within; of long lists the first and the last elements."""
    if place:
        yield place
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths(inner, (*place, name))
    elif isinstance(value, list):
        for index in sorted({*range(min(2, len(value))), len(value) - 1} - {-1}):
            yield from paths(value[index], (*place, index))


def get(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def spoilt(fields: Any, path: Path, value: object) -> Any:
    """A copy along the path."""
    if not path:
        return value
    changed = copy.copy(fields)
    if value is MISSING and len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = spoilt(fields[path[0]], path[1:], value)
    return changed


def wrong_values(section: str, path: Path, value: Any) -> list[Any]:
    wrong = [bad for bad in NEVER[type(value)] if bad is not None or (section, path) not in OPTIONAL]
    return wrong if isinstance(path[-1], int) else [*wrong, MISSING]


@pytest.mark.parametrize(("model", "name"), SECTIONS)
def test_a_field_of_a_wrong_kind_is_refused_by_name_and_changes_nothing(model: str, name: str) -> None:
    host, device = scenes.SCENES[model][1]()
    before = save_device(host, device)
    (section,) = (section for section in device.sections() if section.name == name)
    version, fields = SAVED[model].sections[name]
    for path in paths(fields):
        for bad in wrong_values(name, path, get(fields, path)):
            with pytest.raises(StateError) as found:
                section.prepare(version, spoilt(fields, path, bad))
            assert found.value.section == name
            assert found.value.field.startswith(str(path[0]))
            assert len(str(found.value)) < 300
    nothing: list[Any] = [{}] if fields else []
    for bad in (None, [], 0, *nothing, {**fields, "surprise": 0}, {**fields, "x" * 1000: 0}):
        with pytest.raises(StateError):
            section.prepare(version, bad)
    assert save_device(host, device) == before


@pytest.mark.parametrize("model", SAVED)
def test_sections_that_are_missing_unknown_or_of_another_time_are_refused(model: str) -> None:
    host, device = scenes.SCENES[model][1]()
    before, sections = save_device(host, device), SAVED[model].sections
    for name, (version, fields) in sections.items():
        others = {other: saved for other, saved in sections.items() if other != name}
        for wrong in (others, {**others, name: (version + 1, fields)}, {**others, name: (0, fields)}):
            with pytest.raises(StateError) as found:
                restore_device(host, device, SAVED[model].with_sections(wrong))
            assert found.value.section == name
    with pytest.raises(StateError, match="no such section"):
        restore_device(host, device, SAVED[model].with_sections({**sections, "x" * 1000: (1, {})}))
    assert save_device(host, device) == before


NUMBERS = (
    *(0, 1, 2, 7, 15, 16, 63, 64, 127, 0x80, 255, 0xFFF, 0x4000, 0xFFFF, 0x10000, 0xFFF80, 0x7FFF_FFFF),
    *(0x8000_0000, 0xFFFF_FFF0, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 16, (1 << 64) - 1),
)


def plausible(value: Any, chance: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice([*NUMBERS, value ^ 1 << chance.randrange(32), chance.getrandbits(32)])
    if isinstance(value, str):
        data = bytearray.fromhex(value)
        for _ in range(min(len(data), chance.randint(1, 8))):
            data[chance.randrange(len(data))] = chance.getrandbits(8)
        return data.hex()
    if isinstance(value, list):
        value = [plausible(inner, chance) if chance.random() < 0.3 else inner for inner in value]
        return value * chance.randint(0, 3) if chance.random() < 0.1 else value
    return value


def change(sections: Any, chance: random.Random) -> Any:
    """The sections with a few values that they might have."""
    changed = {name: (version, fields) for name, (version, fields) in sections.items()}
    for _ in range(chance.randint(1, 6)):
        name = chance.choice([*changed])
        version, fields = changed[name]
        path = chance.choice([*paths(fields)])
        changed[name] = version, spoilt(fields, path, plausible(get(fields, path), chance))
    return changed


def live_on(host: FakeHost, regions: Any, chance: random.Random) -> None:
    """What a guest and time do to a device."""
    errors: list[Exception] = []
    host.tasks._on_error = lambda _key, error: errors.append(error)
    host.resume()
    for _ in range(20):
        region = regions[chance.choice([index for index in regions if index != 7])]
        offset = chance.randrange(min(region.size, 0x6000)) & ~3
        if chance.random() < 0.5:
            region.read(offset, 4)
        else:
            region.write(offset, chance.choice([0, 1, 0xFF, 0xFFFF_FFFF]).to_bytes(4, "little"))
        host.answer(4)
    regions[7].write(4, b"\x07\x00")
    host.advance(chance.choice([1_000, 10_000_000]))
    host.advance(10_000_000_000)
    host.answer()
    assert not errors


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_whatever_loads_does_an_e1000_no_harm(seed: int, mapped: bool) -> None:
    chance = random.Random(seed)
    bench = Bench(mapped=mapped, memory=1 << 20)
    before = save_device(bench.host, bench.device)
    saved = SAVED["e1000"].with_sections(change(SAVED["e1000"].sections, chance))
    try:
        restore_device(bench.host, bench.device, saved)
    except StateError:
        assert save_device(bench.host, bench.device) == before
        return
    bench.moved(mapped=mapped)  # it can be saved again, and that state is good
    for number in range(4):
        bench.port.offer(bytes.fromhex("525400123456") + bytes(50 + number))
    live_on(bench.host, bench.device.regions, chance)
    bench.port.offer(b"\xff" * 100)
    bench.run()
    bench.moved()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_whatever_loads_does_a_scratch_no_harm(seed: int, mapped: bool) -> None:
    chance = random.Random(seed)
    host = FakeHost(mapped=mapped)
    device = Scratch(host, memory=1 << 20)
    before = save_device(host, device)
    saved = SAVED["scratch"].with_sections(change(SAVED["scratch"].sections, chance))
    try:
        restore_device(host, device, saved)
    except StateError:
        assert save_device(host, device) == before
        return
    restore_device(*scenes.SCENES["scratch"][1](), save_device(host, device))
    live_on(host, device.regions, chance)
    restore_device(*scenes.SCENES["scratch"][1](), save_device(host, device))
