# SPDX-License-Identifier: BSD-3-Clause
"""Finding models, reading their options, making devices."""

import sys
from pathlib import Path

import pytest

from vfio_user.device_models.backends import Backend
from vfio_user.device_models.catalog import MODELS, load_model, make_device, parse_options
from vfio_user.device_models.device import Device, OptionError
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.net import NetDevice
from vfio_user.device_models.scratch import Scratch


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_table_can_be_made_with_its_defaults(name: str) -> None:
    model = load_model(name)
    assert model.model == name
    assert model.summary
    port = Backend() if issubclass(model, NetDevice) else None
    device = make_device(model, FakeHost(), port, parse_options(model, []))
    assert isinstance(device, Device)
    assert all(option.help and option.name for option in model.options)


def test_models_by_path() -> None:
    assert load_model("vfio_user.device_models.scratch:Scratch") is Scratch


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("e10000", "there are e1000, faulty, scratch, or package.module:Class"),
        ("", "there is no model"),
        (":", "there is no model"),
        ("json:", "there is no model"),
        ("no_such_module:Class", "cannot import no_such_module: ModuleNotFoundError"),
        ("json:NoSuchClass", "json has no class NoSuchClass"),
        ("json:JSONDecoder", "not a subclass"),
        ("json:dumps", "not a subclass"),
        (".relative:Class", "cannot import"),
    ],
)
def test_models_that_cannot_be_had(name: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        load_model(name)


def test_a_users_module_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_model.py").write_text("raise RuntimeError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError, match="cannot import broken_model: RuntimeError: not today"):
        load_model("broken_model:Class")
    assert "broken_model" not in sys.modules


def test_options_that_cannot_be_used() -> None:
    with pytest.raises(OptionError, match="write NAME=VALUE"):
        parse_options(E1000, ["mac"])
    with pytest.raises(OptionError, match="scratch has no option 'x'; its options are memory"):
        parse_options(Scratch, ["x=1"])
    with pytest.raises(OptionError, match="has no option 'x'; its options are fcs, itr, mac, rx_itr, verify"):
        parse_options(E1000, ["x=1"])
    with pytest.raises(OptionError, match="option itr: it is"):
        parse_options(E1000, ["itr=1.5"])


def test_the_last_assignment_counts_and_values_may_hold_an_equals_sign() -> None:
    assert parse_options(E1000, ["itr=5", "itr=7"])["itr"] == 7000
    with pytest.raises(OptionError, match="'a=b'"):
        parse_options(E1000, ["mac=a=b"])


def test_a_network_device_needs_a_backend() -> None:
    with pytest.raises(OptionError, match="network backend"):
        make_device(E1000, FakeHost(), None, {})
