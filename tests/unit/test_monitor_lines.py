# SPDX-License-Identifier: BSD-3-Clause
"""Lines for QEMU's human monitor, and what it printed (QEMU 11.1.3)."""

import pytest

from vfio_user.client.qemu_migration.monitor import (
    Function,
    MonitorError,
    Write,
    parse_memory,
    parse_port,
    read_memory_line,
    read_port_line,
    require_silence,
    write_lines,
)


def test_a_write_selects_its_word_once() -> None:
    writes = [Write(0x10, 4, 0xFEBF_000C), Write(0x3C, 1, 0x2A), Write(0x3D, 1, 1), Write(0x5A, 2, 0x8000)]
    assert write_lines(Function(1, 4, 2), writes) == [
        "o/w 0xcf8 0x80012210",
        "o/w 0xcfc 0xfebf000c",
        "o/w 0xcf8 0x8001223c",
        "o/b 0xcfc 0x2a",
        "o/b 0xcfd 0x1",
        "o/w 0xcf8 0x80012258",
        "o/h 0xcfe 0x8000",
    ]
    assert write_lines(Function(0, 0, 0), []) == []


def test_every_line_has_its_width() -> None:
    assert [read_port_line(0xC040, width) for width in (1, 2, 4)] == [
        "i/b 0xc040",
        "i/h 0xc040",
        "i/w 0xc040",
    ]
    assert read_memory_line(0x1_FEBF_D000, 256) == "xp/64xw 0x1febfd000"


def test_what_was_printed() -> None:
    assert parse_port("portl[0x0cf8] = 0x80000060\r\n") == 0x8000_0060
    assert parse_port("portw[0x0cfe] = 0x8001\r\n") == 0x8001
    assert parse_port("portb[0x0cfe] = 0x01\r\n") == 1
    rows = "febfd000: 0x0a000040 0x00000000 0x00000055 0x00000001\r\nfebfd010: 0x0a000044\r\n"
    assert parse_memory(rows, 20) == bytes.fromhex("4000000a 00000000 55000000 01000000 4400000a")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("Cannot access memory\r\n", 4),
        ("", 4),
        ("febfd000: 0x0a000040\r\n", 8),
        ("febfd000: 0x0a000040 0x00000000\r\n", 4),
        ("febfd000: 0x0a\r\n", 4),
    ],
)
def test_what_is_no_memory(text: str, size: int) -> None:
    with pytest.raises(MonitorError, match=f"for {size} bytes of memory"):
        parse_memory(text, size)


@pytest.mark.parametrize("text", ["", "unknown command: 'i'\r\n", "portl[0x0cf8] = \r\n"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(MonitorError, match="for a port"):
        parse_port(text)


def test_a_complaint_about_a_write_is_told() -> None:
    require_silence(["o/w 0xcf8 0x0", "o/b 0xcfc 0x0"], ["", "\r\n"])
    with pytest.raises(MonitorError, match="'o/b 0xcfc 0x0' with 'invalid char'"):
        require_silence(["o/w 0xcf8 0x0", "o/b 0xcfc 0x0"], ["", "invalid char\r\n"])
