# SPDX-License-Identifier: BSD-3-Clause
"""Device models by name: finding a model, reading its options, making a device."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from vfio_user.device_models.device import Device, Host, Option, OptionError
from vfio_user.device_models.net import NetBackend, NetDevice

MODELS: Mapping[str, str] = {
    "e1000": "vfio_user.device_models.e1000.device:E1000",
    "faulty": "vfio_user.device_models.faulty:Faulty",
    "scratch": "vfio_user.device_models.scratch:Scratch",
}
"""The models that come with the package: name, and where the class is (module:class)."""


def load_model(name: str) -> type[Device]:
    """The class of a model: a name in `MODELS`, or "package.module:Class". Raises OptionError."""
    path = MODELS.get(name, name)
    module_name, separator, class_name = path.partition(":")
    if not (separator and module_name and class_name):
        known = ", ".join(sorted(MODELS))
        raise OptionError(f"there is no model {name!r}; there are {known}, or package.module:Class")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way; none of them is our crash
        raise OptionError(f"model {name!r}: cannot import {module_name}: {_describe(error)}") from error
    for part in class_name.split("."):
        if not hasattr(found, part):
            raise OptionError(f"model {name!r}: {module_name} has no class {class_name}")
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise OptionError(f"model {name!r}: {class_name} is not a subclass of vfio_user's Device")
    return found


def parse_options(model: type[Device], assignments: Sequence[str]) -> dict[str, Any]:
    """The values of all options of `model`: its defaults, and "NAME=VALUE" texts. Raises OptionError.

    The last of several assignments to one name counts.
    """
    options = {option.name: option for option in model.options}
    texts = {option.name: option.default for option in model.options}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise OptionError(f"option {assignment!r}: write NAME=VALUE")
        if name not in options:
            raise OptionError(f"{_name(model)} has no option {name!r}; {_list(options)}")
        texts[name] = text
    return {name: _parse(options[name], text) for name, text in texts.items()}


def make_device(
    model: type[Device], host: Host, port: NetBackend | None, options: Mapping[str, Any]
) -> Device:
    """Make a device; `port` is given to network devices only. Raises OptionError without the one it needs."""
    constructor: Any = model  # models take their own options
    if not issubclass(model, NetDevice):
        device: Device = constructor(host, **options)
    elif port is None:
        raise OptionError(f"{_name(model)} is a network device: it needs a network backend")
    else:
        device = constructor(host, port, **options)
    return device


def _parse(option: Option, text: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        raise OptionError(f"option {option.name}: {error}") from error


def _list(options: Mapping[str, Option]) -> str:
    return f"its options are {', '.join(sorted(options))}" if options else "it has no options"


def _name(model: type[Device]) -> str:
    return str(getattr(model, "model", model.__name__))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
