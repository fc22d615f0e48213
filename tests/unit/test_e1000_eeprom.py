# SPDX-License-Identifier: BSD-3-Clause
"""The EEPROM by its pins, as a driver clocks them, and by EERD; test 2 of `ethtool -t`."""

import pytest

from vfio_user.device_models.catalog import parse_options
from vfio_user.device_models.device import OptionError
from vfio_user.device_models.e1000.bench import Bench
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.e1000.options import Verify

MAC = bytes.fromhex("02aabbccddee")


def test_the_drivers_eeprom_test_sums_to_baba() -> None:
    bench = Bench(mac=MAC)
    words = [bench.read_eeprom(address)[0] for address in range(64)]
    assert sum(words) & 0xFFFF == 0xBABA
    assert b"".join(word.to_bytes(2, "little") for word in words[:3]) == MAC
    assert words[0x0B:0x0F] == [0x001E, 0x8086, 0x100E, 0x8086]


def test_one_read_command_gives_word_after_word() -> None:
    bench = Bench(mac=MAC)
    assert bench.read_eeprom(62, 4) == [bench.read_eeprom(place)[0] for place in (62, 63, 0, 1)]


def test_a_read_begins_with_a_zero_bit() -> None:
    bench = Bench()
    bench.eeprom_begin()
    bench._clock_out(0b110 << 6 | 0x0E, 9)
    assert not bench.read("EECD") & 8


def test_reading_by_eerd() -> None:
    bench = Bench()
    for address in range(64):
        bench.write("EERD", address << 8 | 1)
        value = bench.read("EERD")
        assert value & 0x10
        assert value >> 16 == bench.device.mac.eeprom.words[address]
    bench.write("EERD", 64 << 8 | 1)
    assert bench.read("EERD") >> 16 == 0


def test_writing_a_word_and_the_checksum() -> None:
    bench = Bench()
    bench.write_eeprom(0x20, 0xBEEF)
    assert bench.read_eeprom(0x20) == [0xBEEF]
    words = [bench.read_eeprom(address)[0] for address in range(63)]
    bench.write_eeprom(63, 0xBABA - sum(words) & 0xFFFF)
    assert sum(bench.device.mac.eeprom.words) & 0xFFFF == 0xBABA


def test_nothing_is_written_without_enable() -> None:
    bench = Bench()
    before = list(bench.device.mac.eeprom.words)
    bench.write_eeprom(0x20, 0xBEEF, enable=False)
    bench.write_eeprom(0x21, 0x1234)  # enables and disables again
    bench.write_eeprom(0x22, 0xBEEF, enable=False)
    before[0x21] = 0x1234
    assert bench.device.mac.eeprom.words == before


def test_erase_and_the_commands_for_all_words() -> None:
    bench = Bench()
    eeprom = bench.device.mac.eeprom
    bench.eeprom_begin()
    bench.eeprom_command(0b10011 << 4)  # EWEN
    bench.eeprom_command(0b111 << 6 | 5)  # ERASE
    assert eeprom.words[5] == 0xFFFF
    bench.eeprom_command((0b10001 << 4) << 16 | 0x5AA5, 25)  # WRAL
    assert eeprom.words == [0x5AA5] * 64
    bench.eeprom_command(0b10010 << 4)  # ERAL
    assert eeprom.words == [0xFFFF] * 64


def test_a_command_that_is_cut_short_does_nothing() -> None:
    bench = Bench()
    before = list(bench.device.mac.eeprom.words)
    bench.eeprom_begin()
    bench.eeprom_command(0b10011 << 4)
    bench.eeprom_command((0b101 << 6 | 4) << 7 | 0x55, 16)  # 7 of 16 data bits
    bench.eeprom_command(0b11, 2)
    assert bench.device.mac.eeprom.words == before


def test_no_grant_without_request_and_contents_survive_resets() -> None:
    bench = Bench()
    assert not bench.read("EECD") & 0x80
    bench.write_eeprom(0, 0x0302)
    bench.reset_by_window()
    assert bench.read("RAL") & 0xFFFF == 0x0302
    bench.host.reset()
    bench.device.reset()
    assert bench.read_eeprom(0) == [0x0302]


def test_endless_clocking_does_not_grow() -> None:
    bench = Bench()
    bench.eeprom_begin()
    bench._clock_out((1 << 200) - 1 & ~(0b11 << 197), 200)
    assert len(bench.device.mac.eeprom.bits_in) <= 25


@pytest.mark.parametrize(
    "text", ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "0:0:0:0:0:0", "00:00:00:00:00:00"]
)
def test_addresses_of_more_or_less_than_one_station_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="option mac"):
        parse_options(E1000, [f"mac={text}"])


def test_options() -> None:
    assert parse_options(E1000, ["mac=02-aa-BB-cc-dd-ee"])["mac"] == MAC
    assert parse_options(E1000, ["itr=1000"])["itr"] == 1_000_000
    assert parse_options(E1000, [])["itr"] == 0
    assert parse_options(E1000, ["verify=trust"])["verify"] is Verify.TRUST
    for bad in ("itr=-1", "itr=5001", "itr=fast", "verify=never", "fcs=1", "mac="):
        with pytest.raises(OptionError, match="option"):
            parse_options(E1000, [bad])
    with pytest.raises(OptionError, match="fcs, itr, mac, rx_itr, verify"):
        parse_options(E1000, ["speed=1"])
