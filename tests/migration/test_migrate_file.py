# SPDX-License-Identifier: BSD-3-Clause
"""A guest saved to a file and restored from it; files that are cut, changed, foreign, or find no room."""

import contextlib
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from migration.moving import WAYS, Yard, open_yard, seeded, wait_until
from migration.scratch_guest import Copier
from needs import missing
from vfio_user.client.attachment import Attachment
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions
from vfio_user.client.guest import Guest, open_guest
from vfio_user.client.migration.compare import compare_memory
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Limits, Outcome, Report, Step, Where
from vfio_user.client.migration.saved_file import SavedFile, SavedFileError
from vfio_user.client.migration.saving import restore, save
from vfio_user.client.migration.v2 import V2Driver
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol.constants import MigrationState


async def busy(guest: Guest, chance: random.Random) -> Copier:
    """A guest that copies, and has done so."""
    copier = Copier(guest.devices[0], chance)
    guest.start(copier.run)
    await goes_on(copier)
    return copier


async def goes_on(copier: Copier) -> None:
    before = copier.copies
    await wait_until(lambda: copier.copies > before + 1)


async def fresh(yard: Yard) -> Attachment:
    return await yard.incoming(yard.serve(Scratch))


async def saved_idle(yard: Yard, path: Path) -> FakeVmm:
    """The file of a guest that has written a word of the device and some memory, and stands still."""
    vmm = (await yard.start(yard.serve(Scratch))).vmm
    await vmm.write(0, 0x10, 0x1234)
    vmm.ram.write(0x5000, b"memory")
    (await save(vmm, path)).check()
    return vmm


@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_saved_and_restored_under_load(tmp_path: Path, source: str, destination: str) -> None:
    path, options = tmp_path / "saved", Options(source, destination)
    with seeded(f"file {source} {destination}") as chance:
        async with open_yard(tmp_path) as yard:
            here = await yard.start(yard.serve(Scratch))
            async with open_guest([here.vmm]) as guest:
                copier = await busy(guest, chance)
                limits = Limits(rounds=chance.randrange(3))
                # It runs on; then the same file is written again, and it stands still.
                report = await save(here.vmm, path, go_on=True, guest=guest, limits=limits, options=options)
                assert report.check().source_runs
                await goes_on(copier)
                report = await save(here.vmm, path, guest=guest, limits=limits, options=options)
                assert not report.check().source_runs
                assert report.notes == ()
                there = await fresh(yard)

                async def equal(here: FakeVmm = here.vmm, there: FakeVmm = there.vmm) -> None:
                    assert compare_memory(here.ram, there.ram) == []

                # Before the device runs, which goes on writing.
                restored = await restore(there.vmm, path, options=replace(options, switch=equal))
                assert restored.check().state == report.state
                guest.move([there.vmm])
                guest.resume()
                await here.close()
                await goes_on(copier)


async def test_restored_with_its_guest(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    async with open_yard(tmp_path) as yard:
        here, there = await yard.start(yard.serve(Scratch)), await fresh(yard)
        async with open_guest([here.vmm]) as guest:
            copier = await busy(guest, random.Random(1))
            (await save(here.vmm, path, guest=guest)).check()
            steps: list[Step] = []
            report = await restore(
                there.vmm, path, guest=guest, progress=lambda progress: steps.append(progress.step)
            )
            assert report.check().failure is None
            assert steps == [
                *(Step.CHECK, Step.PREPARE, Step.STATE, Step.LOAD, Step.SWITCH, Step.START, Step.DONE)
            ]
            await goes_on(copier)


async def test_zero_memory_takes_no_room_and_is_zero_again(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    async with open_yard(tmp_path, VmmOptions(memory=((0, 64 << 20),))) as yard:
        here, there = await yard.start(yard.serve(Scratch)), await fresh(yard)
        here.vmm.ram.write(0, b"x")
        there.vmm.ram.write(32 << 20, b"what was there before")
        (await save(here.vmm, path)).check()
        assert path.stat().st_size < 2 << 20
        (await restore(there.vmm, path)).check()
        assert compare_memory(here.vmm.ram, there.vmm.ram) == []


# Files that are not what they were


async def refused(yard: Yard, path: Path, match: str) -> Report:
    """It is refused for this reason, and the destination is as it was."""
    there = await fresh(yard)
    await there.vmm.write(0, 0x10, 0xAFFE)
    report = await restore(there.vmm, path)
    assert report.failure is not None
    assert match in report.failure.reason
    assert await there.vmm.read(0, 0x10) == 0xAFFE
    assert not there.vmm.ram.read(0x5000, 1)[0]
    driver = await V2Driver.open(there.vmm.client)
    assert driver is not None
    assert await driver.state() is MigrationState.RUNNING
    await there.close()
    return report


async def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    whole, cut = tmp_path / "saved", tmp_path / "cut"
    async with open_yard(tmp_path) as yard:
        await saved_idle(yard, whole)
        data = whole.read_bytes()
        chance = random.Random(3)
        for length in (0, 1, 15, 16, 17, *(chance.randrange(len(data)) for _ in range(100)), len(data) - 1):
            cut.write_bytes(data[:length])
            with pytest.raises(SavedFileError, match=f"cut off at {length}$"):
                SavedFile(cut)
        report = await refused(yard, cut, "cut off")
        assert (report.failure and report.failure.where) is Where.FILE


async def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    whole, changed = tmp_path / "saved", tmp_path / "changed"
    async with open_yard(tmp_path) as yard:
        await saved_idle(yard, whole)
        data = bytearray(whole.read_bytes())
        chance = random.Random(4)
        for place in (*range(16), *(chance.randrange(len(data)) for _ in range(200)), len(data) - 1):
            data[place] ^= 1 << chance.randrange(8)
            changed.write_bytes(data)
            with pytest.raises(SavedFileError):
                SavedFile(changed)
            data[:] = whole.read_bytes()
        changed.write_bytes(data + b"\0")
        await refused(yard, changed, "something follows its end")
        data[len(data) // 2] ^= 1
        changed.write_bytes(data)
        await refused(yard, changed, "")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"#!/bin/sh\n" * 10, "no saved guest"),
        (b"vfusaved\x02\0\0\0\x02\0\0\0{}", "version 2"),
        (b"vfusaved\x01\0\0\0\x02\0\0\0{}", "header does not say"),
        (b"vfusaved\x01\0\0\0\x02\0\0\0[[", "not"),
        (b"vfusaved\x01\0\0\0\xff\xff\xff\xff", "more than any record"),
    ],
)
async def test_a_file_that_is_something_else_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    async with open_yard(tmp_path) as yard:
        await refused(yard, path, match)


async def test_no_file(tmp_path: Path) -> None:
    async with open_yard(tmp_path) as yard:
        report = await refused(yard, tmp_path / "nothing", "No such file")
        assert (report.failure and report.failure.where) is Where.FILE


async def test_a_guest_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    async with open_yard(tmp_path) as yard:
        await saved_idle(yard, path)
        wrong_model = await yard.incoming(yard.serve(Faulty))
        report = await restore(wrong_model.vmm, path)
        assert report.failure is not None
        assert (report.failure.where, report.failure.device) == (Where.DESTINATION, 0)
        less = VmmOptions(memory=((0, 0xA0000),))
        wrong_memory = await yard.incoming(yard.serve(Scratch), options=less)
        report = await restore(wrong_memory.vmm, path)
        assert report.failure is not None
        assert "its memory is 0xa0000 bytes at 0x0, the guest's is" in report.failure.reason


# No room


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow above `size` bytes: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system with so little room: ENOSPC."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        missing("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("before", [None, b"what was saved before"])
@pytest.mark.parametrize("room", [0, 4096, 1 << 20])
async def test_a_file_without_room_is_removed_and_the_guest_runs_on(
    tmp_path: Path, room: int, before: bytes | None
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    path = folder / "saved"
    if before is not None:
        path.write_bytes(before)
    async with open_yard(tmp_path) as yard:
        here = await yard.start(yard.serve(Scratch))
        async with open_guest([here.vmm]) as guest:
            copier = await busy(guest, random.Random(5))
            with file_limit(room):
                report = await save(here.vmm, path, guest=guest)
            assert report.failure is not None
            assert report.failure.where is Where.FILE
            assert "File too large" in report.failure.reason
            assert report.source_runs
            assert report.notes == ()
            assert [found.name for found in folder.iterdir()] == (["saved"] if before else [])
            assert before is None or path.read_bytes() == before
            await goes_on(copier)


@pytest.mark.root
async def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        async with open_yard(tmp_path) as yard:
            here = await yard.start(yard.serve(Scratch))
            async with open_guest([here.vmm]) as guest:
                copier = await busy(guest, random.Random(6))
                report = await save(here.vmm, disk / "saved", guest=guest)
                assert report.failure is not None
                assert "No space left on device" in report.failure.reason
                assert report.source_runs
                assert os.listdir(disk) == []
                await goes_on(copier)


async def test_cancelled_the_file_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    async with open_yard(tmp_path) as yard:
        here = await yard.start(yard.serve(Scratch))
        async with open_guest([here.vmm]) as guest:
            copier = await busy(guest, random.Random(7))
            limits = Limits(rounds=10_000, downtime=0, timeout=0.2)
            report = await save(here.vmm, folder / "saved", guest=guest, limits=limits)
            assert report.failure is not None
            assert report.failure.reason == "not done within 0.2 s"
            assert (report.outcome, report.source_runs) == (Outcome.FAILED, True)
            assert os.listdir(folder) == []
            await goes_on(copier)
