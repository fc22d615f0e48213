# SPDX-License-Identifier: BSD-3-Clause
"""Moving a device from one fake host to another, for tests of its state.

    saved = save_device(host, device)
    restore_device(other_host, other, saved)   # made with the same options
    other_host.resume()

What is saved is text and bytes only, as it is when it goes over a wire.
"""

import json
from dataclasses import dataclass

from vfio_user.device_models.device import Device
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.state import SavedSections, StateError, load_sections, save_sections


@dataclass(frozen=True)
class SavedDevice:
    """All of a device's state."""

    model: str
    version: int
    text: str
    """The sections as JSON: by name, each a list of version and fields."""
    memories: dict[str, bytes]

    @property
    def sections(self) -> SavedSections:
        """Made anew from the text, so that it can be spoilt."""
        return {name: (version, fields) for name, (version, fields) in json.loads(self.text).items()}

    def with_sections(self, sections: SavedSections) -> "SavedDevice":
        """The same with other sections."""
        return SavedDevice(self.model, self.version, _encode(sections), self.memories)


def _encode(sections: SavedSections) -> str:
    return json.dumps(sections, indent=1)


def save_device(host: FakeHost, device: Device) -> SavedDevice:
    """Stop the device and save it. The VMM first does the DMA that it was asked for, as one does that takes
    messages in their order: before it sees the reply to the stop."""
    host.stop()
    host.dma.answer()
    host.settle()
    memories = {name: bytes(memory.view) for name, memory in device.memories().items()}
    return SavedDevice(
        device.model, device.state_version, _encode(save_sections(device.sections())), memories
    )


def restore_device(host: FakeHost, device: Device, saved: SavedDevice) -> None:
    """Give a device, which stays stopped, the state of another one. StateError: it is as it was before."""
    host.stop()
    if saved.model != device.model or not 0 < saved.version <= device.state_version:
        raise StateError("", "", f"{saved.model} {saved.version} is not for {device.model}")
    applies = load_sections(device.sections(), saved.sections)
    memories = device.memories()
    sizes = {name: memory.size for name, memory in memories.items()}
    if {name: len(data) for name, data in saved.memories.items()} != sizes:
        raise StateError("", "", "the memories are not those of this device")
    host.reset()
    for apply in applies:
        apply()
    for name, memory in memories.items():
        memory.adopt(memoryview(bytearray(saved.memories[name])))
    host.device = device
    device.restored()
