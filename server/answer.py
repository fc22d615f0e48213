# SPDX-License-Identifier: BSD-3-Clause
"""What a handler of a command gives back."""

from dataclasses import dataclass

from vfio_user.protocol import messages as m


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply and the descriptors to go with it, which stay the server's.

    `lasting`: its payload never changes again, so that it need not be copied to be sent later.
    """

    body: m.Message
    fds: tuple[int, ...] = ()
    lasting: bool = False
