# SPDX-License-Identifier: BSD-3-Clause
"""The pytest plugin in somebody else's project: a folder of its own, and pytest in another process."""

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

MODEL = """
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.registers import Register, RegisterFile

class Counter(PciDevice):
    "Adds up what is written to it."
    model = "counter"
    summary = "a sum"
    state_version = 1
    identity = Identity(vendor_id=0x1234, device_id=0x0009, class_code=0xFF0000)

    def __init__(self, host):
        rows = (Register("SUM", 0, writable=0xFFFFFFFF),)
        self.registers = RegisterFile(0x1000, rows, on_write={"SUM": self._add})
        super().__init__(host, {0: Bar(self.registers)})

    def _add(self, _index, value):
        self.registers.cell("SUM").value += value & 0xFF

class Forgetful(Counter):
    "Has a sum that it does not save."

    def _add(self, _index, value):
        self.sum = getattr(self, "sum", 0) + (value & 0xFF)
        self.registers.cell("SUM").on_read = lambda _: self.sum
"""
USE = """
class Sum:
    def __init__(self):
        self.expected = 0

    async def use(self, device, chance):
        value = chance.randrange(256)
        await device.write(0, 0, value)
        self.expected += value
        assert await device.read(0, 0) == self.expected
"""
TESTS = """
from counter import Counter
from use import Sum

def test_plain(vfio_migration):
    vfio_migration.check(Counter, Sum().use)

def test_by_name(vfio_migration):
    vfio_migration.check("counter:Counter", Sum().use, moves=2)

async def test_trio(vfio_migration):
    async with vfio_migration.open(Counter) as bed:
        await bed.device.write(0, 0, 40)
        await bed.move(source="v1", destination="v2")
        await bed.device.write(0, 0, 2)
        assert await bed.device.read(0, 0) == 42
"""
FAILING = """
from counter import Forgetful
from use import Sum

def test_it(vfio_migration):
    vfio_migration.check(Forgetful, Sum().use)
"""
LAZY = """
import sys

def test_nothing_was_imported():
    ours = {name for name in sys.modules if name.startswith("vfio_user")}
    assert ours == {"vfio_user", "vfio_user.testing", "vfio_user.testing.pytest_plugin"}
"""


WRONG = """
import pytest
from use import Sum

@pytest.mark.parametrize("settings", [
    {"options": {"memory": "3"}},
    {"options": {"colour": "red"}},
    {"options": ["memory=4K"]},
    {"memory": [(1, 5)]},
    {"memory": 4096},
    {"colour": "red"},
    {"moves": 0},
])
def test_settings(vfio_migration, settings):
    vfio_migration.check("scratch", Sum().use, **settings)

@pytest.mark.parametrize("model", ["nothing", 3, int, "faulty:Nothing", "no.such:Model"])
def test_model(vfio_migration, model):
    vfio_migration.check(model, Sum().use)

def test_use(vfio_migration):
    vfio_migration.check("scratch", 3)

async def test_open(vfio_migration):
    async with vfio_migration.open("scratch", options={"memory": "3"}):
        pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with a device model and a guest that uses it."""
    pytester.makepyfile(counter=MODEL, use=USE)
    pytester.makeini("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    return project.runpytest_subprocess("-q", "-p", "no:cacheprovider", *words)


def test_plain_tests_and_trio_tests(project: pytest.Pytester) -> None:
    project.makepyfile(test_counter=TESTS)
    run(project, "--vfio-user-moves=3").assert_outcomes(passed=3)


def test_coroutines_need_no_other_plugin(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\nfilterwarnings = error\n")
    project.makepyfile(test_counter=TESTS)
    words = ("--vfio-user-moves=1", "-k", "trio")
    run(project, *words, "-p", "no:trio").assert_outcomes(passed=1, deselected=2)
    run(project, *words).assert_outcomes(passed=1, deselected=2)
    project.makepyfile(test_counter=TESTS.replace("== 42", "== 43"))
    failed = run(project, *words, "-p", "no:trio")
    failed.assert_outcomes(failed=1, deselected=2)
    assert "/testing/" not in failed.stdout.str()
    failed.stdout.fnmatch_lines(["*repeat it with --vfio-user-seed=*"])


UNDER_ASYNCIO = """
import asyncio

def test_it(vfio_migration):
    async def main():
        async with vfio_migration.open("scratch"):
            pass
    asyncio.run(main())
"""


def test_under_another_event_loop_it_says_so(project: pytest.Pytester) -> None:
    project.makepyfile(test_loop=UNDER_ASYNCIO)
    done = run(project)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*RuntimeError: this runs under trio*take `run`*"])


def test_a_seed_repeats_the_choices_under_another_name(project: pytest.Pytester) -> None:
    """Also in another file, and with other tests before it."""
    project.makepyfile(test_counter=FAILING)
    first = run(project).stdout.str()
    seed = re.findall(r"--vfio-user-seed=\d+", first)[0]
    (project.path / "test_counter.py").unlink()
    renamed = "def test_before(vfio_migration):\n    pass\n" + FAILING.replace("test_it", "test_renamed")
    project.makepyfile(test_other=renamed)
    again = run(project, seed).stdout.str()
    moves = [re.findall(r"move \d+: [^:\n]*", output)[0] for output in (first, again)]
    assert moves[0] == moves[1]


def test_in_processes_of_their_own_that_find_the_model(project: pytest.Pytester) -> None:
    project.makepyfile(test_counter=TESTS)
    run(project, "--vfio-user-apart", "-k", "by_name").assert_outcomes(passed=1, deselected=2)


def test_a_failure_says_what_repeats_it(project: pytest.Pytester) -> None:
    project.makepyfile(test_counter=FAILING)
    first = run(project)
    first.assert_outcomes(failed=1)
    text = first.stdout.str()
    assert re.search(r"^E +AssertionError", text, re.MULTILINE)
    found = re.search(r"repeat it with (--vfio-user-seed=\d+)", text)
    assert found is not None
    again = run(project, found[1]).stdout.str()
    moves = [re.findall(r"move \d+: [^:\n]*", output) for output in (text, again)]
    assert moves[0]
    assert moves[0][0] == moves[1][0]


def test_who_does_not_use_it_loads_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LAZY)
    run(pytester).assert_outcomes(passed=1)


def test_the_options_are_documented(pytester: pytest.Pytester) -> None:
    text = run(pytester, "--help").stdout.str()
    assert all(name in text for name in ("--vfio-user-seed", "--vfio-user-moves", "--vfio-user-apart"))
    assert "vfio_migration" in run(pytester, "--fixtures").stdout.str()


def test_a_mistake_in_a_test_is_shown_where_it_was_made(project: pytest.Pytester) -> None:
    """Of the library nothing is shown; and the message says what there is, or what to write."""
    project.makepyfile(test_wrong=WRONG)
    done = run(project)
    done.assert_outcomes(failed=14)
    text = done.stdout.str()
    places = re.findall(r"^(\S+\.py):\d+: ", text, re.MULTILINE)
    assert places == ["test_wrong.py"] * 13, places  # a coroutine's is in an exception group
    assert "/testing/" not in text
    for hint in (
        "a power of two from 4K to 1G, not '3'",
        "its options are memory",
        "options={name: text, ...}",
        "write memory=[(address, size in bytes), ...]",
        "there are options, memory, shared, compare",
        "moves=0: at least 1",
        "there are e1000, faulty, scratch, or package.module:Class",
        "write `async def use(device, chance)`",
    ):
        assert hint in text, hint


@pytest.mark.parametrize("words", [["--vfio-user-moves=0"], ["--vfio-user-seed=x"]])
def test_wrong_options(pytester: pytest.Pytester, words: list[str]) -> None:
    done = run(pytester, *words)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert words[0].partition("=")[0] in done.stderr.str()


def test_the_plugin_itself_imports_only_pytest() -> None:
    source = (Path(__file__).parents[2] / "testing" / "pytest_plugin.py").read_text()
    top = re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE)
    assert top == ["inspect", "typing", "pytest"]


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_a_number_of_moves_that_is_none(pytester: pytest.Pytester, text: str) -> None:
    done = pytester.runpytest_inprocess(f"--vfio-user-moves={text}")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*'{text}' is no number of moves: give 1 or more*"])
