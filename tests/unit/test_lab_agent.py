# SPDX-License-Identifier: BSD-3-Clause
"""Commands to the guest and answers from it, as bytes."""

import itertools
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.client.qemu.agent import LONGEST_COMMAND, Answer, AnswerParser, command_line

ANSWERS = [
    Answer("ready", 0, b""),
    Answer("1", 0, b"out\n\x01 2 0 1\n"),
    Answer("2", 137, b""),
    Answer("3", 1, bytes(256)),
]


def _bytes(answer: Answer) -> bytes:
    return b"\x01%s %d %d\n" % (answer.tag.encode(), answer.status, len(answer.output)) + answer.output


STREAM = b"noise\n" + b"".join(map(_bytes, ANSWERS))


@given(st.lists(st.integers(0, len(STREAM))))
def test_the_borders_of_feed_do_not_matter(cuts: list[int]) -> None:
    parser, borders = AnswerParser(), [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in itertools.pairwise(borders)]
    assert [answer for piece in pieces for answer in parser.feed(piece)] == ANSWERS


@pytest.mark.parametrize("noise", [b"\x01half", b"\x01\x01", b"\x01a b c\n", b"\x011 2\n", b"\x01 1 -1 3\n"])
def test_noise_at_reset_is_passed_over(noise: bytes) -> None:
    assert list(AnswerParser().feed(noise + _bytes(ANSWERS[0]) + _bytes(ANSWERS[3])))[-1] == ANSWERS[3]


# The escape is bash's too; where the shell reads more bytes as one character, this is not about it.
@pytest.mark.parametrize("text", ["plain", "it's", "a\nb\n", "\\n \\", 'é\t\x7f$x`y`"', "\x0112"])
def test_the_shell_reads_the_text_that_was_meant(text: str) -> None:
    line = command_line(7, 2.4, text)
    assert line.count(b"\n") == 1
    shown = subprocess.run(
        ["bash", "-c", 'run() { printf "%s|%s|%s" "$@"; }; ' + line.decode()], capture_output=True, check=True
    )
    assert shown.stdout == f"7|2|{text}".encode()


def test_a_limit_is_at_least_a_second() -> None:
    assert command_line(1, 0.01, "x") == b"run 1 1 $'x'\n"


@pytest.mark.parametrize("text", ["a\0b", "x" * LONGEST_COMMAND])
def test_what_no_line_can_carry_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="command"):
        command_line(1, 1, text)
