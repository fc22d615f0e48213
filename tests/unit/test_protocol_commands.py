# SPDX-License-Identifier: BSD-3-Clause
"""COMMANDS is complete; what is missing for a new command is named here."""

from __future__ import annotations

import pytest

from vfio_user.protocol import layouts, messages
from vfio_user.protocol.commands import BY_NUMBER, BY_REPLY, BY_REQUEST, COMMANDS
from vfio_user.protocol.constants import SCM_MAX_FD, Command, Role


def _class_name(command: Command, direction: str) -> str:
    return "".join(word.capitalize() for word in command.name.split("_")) + direction


@pytest.mark.parametrize("command", list(Command))
def test_a_command_has_messages_layouts_and_a_row(command: Command) -> None:
    for direction in ("Request", "Reply"):
        kind = getattr(messages, _class_name(command, direction), None)
        assert kind is not None, f"messages.py lacks {_class_name(command, direction)}"
        assert kind in layouts.LAYOUTS, f"layouts.py lacks a layout of {kind.__name__}"
        assert command in COMMANDS, f"commands.py lacks a row of {command.name}"
        row = COMMANDS[command]
        assert (row.request if direction == "Request" else row.reply) is kind


def test_every_message_belongs_to_one_command() -> None:
    kinds = {kind for kind in layouts.LAYOUTS if issubclass(kind, messages.Message)}
    assert kinds == set(BY_REQUEST) | set(BY_REPLY)
    assert len(kinds) == 2 * len(Command)


def test_the_numbers_are_those_of_both_specifications() -> None:
    assert sorted(BY_NUMBER) == list(range(1, 19))
    assert {row.command for row in COMMANDS.values() if row.sender is Role.SERVER} == {
        Command.DMA_READ,
        Command.DMA_WRITE,
    }
    assert {row.command for row in COMMANDS.values() if row.edition == "v1"} == {Command.DIRTY_PAGES}


def test_which_messages_may_bring_file_descriptors() -> None:
    requests = {row.command: row.request_fds for row in COMMANDS.values() if row.request_fds[1]}
    assert requests == {Command.DMA_MAP: (0, 1), Command.DEVICE_SET_IRQS: (0, SCM_MAX_FD)}
    replies = {row.command for row in COMMANDS.values() if row.reply_fds[1]}
    assert replies == {
        Command.VERSION,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
    }


def test_headings() -> None:
    assert COMMANDS[Command.DEVICE_SET_IRQS].heading == "VFIO_USER_DEVICE_SET_IRQS"
