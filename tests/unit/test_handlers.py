# SPDX-License-Identifier: BSD-3-Clause
"""The table of handlers is complete: one for every command that a client sends."""

import inspect

import pytest

from vfio_user.protocol.commands import COMMANDS
from vfio_user.protocol.constants import Command, Role
from vfio_user.protocol.messages import Message
from vfio_user.server.handlers import HANDLERS, SET_UP

FROM_CLIENT = {row.command for row in COMMANDS.values() if row.sender is Role.CLIENT}


def test_every_command_of_a_client_has_a_handler_and_no_other() -> None:
    assert set(HANDLERS) == FROM_CLIENT
    assert FROM_CLIENT | {Command.DMA_READ, Command.DMA_WRITE} == set(Command)


@pytest.mark.parametrize("command", HANDLERS, ids=lambda command: command.name)
def test_a_handler_takes_the_request_of_its_command(command: Command) -> None:
    """The annotation of its parameter is the class of the request, or that of any message."""
    parameter = inspect.signature(HANDLERS[command]).parameters["request"]
    assert parameter.annotation in (COMMANDS[command].request, Message)


def test_the_device_begins_to_work_with_an_access_or_a_reset() -> None:
    assert set(HANDLERS) - SET_UP == {
        Command.REGION_READ,
        Command.REGION_WRITE,
        Command.REGION_WRITE_MULTI,
        Command.DEVICE_RESET,
    }
