# SPDX-License-Identifier: BSD-3-Clause
"""Numbers that a driver of the 82540EM needs.

Source: Intel, "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual". They are
written down a second time on purpose: a driver that shared the model's tables would share its mistakes.
"""

import struct
from collections.abc import Mapping
from enum import IntEnum, IntFlag

VENDOR_AND_DEVICE = 0x100E_8086
MEMORY_BAR = 0


class Reg(IntEnum):
    """Register offsets (13.3)."""

    CTRL = 0x0000
    STATUS = 0x0008
    EECD = 0x0010
    MDIC = 0x0020
    ICR = 0x00C0
    ITR = 0x00C4
    ICS = 0x00C8
    IMS = 0x00D0
    IMC = 0x00D8
    RCTL = 0x0100
    TCTL = 0x0400
    TIPG = 0x0410
    RDBAL = 0x2800
    RDBAH = 0x2804
    RDLEN = 0x2808
    RDH = 0x2810
    RDT = 0x2818
    RDTR = 0x2820
    TDBAL = 0x3800
    TDBAH = 0x3804
    TDLEN = 0x3808
    TDH = 0x3810
    TDT = 0x3818
    TIDV = 0x3820
    RXCSUM = 0x5000
    MTA = 0x5200
    RAL0 = 0x5400
    RAH0 = 0x5404


class Ctrl(IntFlag):
    FD = 1 << 0
    ASDE = 1 << 5
    SLU = 1 << 6
    ILOS = 1 << 7
    SPEED_1000 = 2 << 8
    FRCSPD = 1 << 11
    FRCDPX = 1 << 12
    RST = 1 << 26


STATUS_LINK_UP = 1 << 1


class Eecd(IntFlag):
    """The EEPROM's pins (13.4.3)."""

    SK = 1 << 0
    CS = 1 << 1
    DI = 1 << 2
    DO = 1 << 3
    REQ = 1 << 6
    GNT = 1 << 7
    PRES = 1 << 8
    SIZE = 1 << 9


EEPROM_READ = 0b110
EEPROM_SUM_WORDS, EEPROM_SUM = 0x40, 0xBABA


class Mdic(IntFlag):
    """The way to the PHY (13.4.8)."""

    WRITE = 1 << 26
    READ = 2 << 26
    READY = 1 << 28
    ERROR = 1 << 30


PHY_ADDRESS = 1
PHY_CONTROL, PHY_STATUS, PHY_ID1, PHY_ID2, PHY_ADVERTISE, PHY_1000_CONTROL = 0, 1, 2, 3, 4, 9
PHY_RESET, PHY_LOOPBACK, PHY_AUTONEG, PHY_RESTART = 1 << 15, 1 << 14, 1 << 12, 1 << 9
PHY_FULL_1000 = 0x0140  # full duplex, 1000 Mbit/s
PHY_M88 = 0x0141


class Cause(IntFlag):
    """Interrupt causes (13.4.17)."""

    TXDW = 1 << 0
    TXQE = 1 << 1
    LSC = 1 << 2
    RXSEQ = 1 << 3
    RXDMT0 = 1 << 4
    RXO = 1 << 6
    RXT0 = 1 << 7


class Rctl(IntFlag):
    """Receive control (13.4.22); buffers of 2048 bytes are BSIZE 0."""

    EN = 1 << 1
    UPE = 1 << 3
    MPE = 1 << 4
    BAM = 1 << 15
    SECRC = 1 << 26


TCTL_EN, TCTL_PSP, TCTL_CT, TCTL_COLD = 1 << 1, 1 << 3, 0x0F << 4, 0x40 << 12
TIPG_COPPER = 10 | 8 << 10 | 6 << 20
RXCSUM_ALL = 1 << 8 | 1 << 9  # IPOFL, TUOFL
RAH_VALID = 1 << 31

# Descriptors (3.2.3, 3.3.3, 3.3.6, 3.3.7)
DESCRIPTOR_SIZE = 16
RX_DESCRIPTOR = struct.Struct("<QHHBBH")  # address, length, checksum, status, errors, special
TX_LEGACY = struct.Struct("<QHBBBBH")  # address, length, CSO, command, status, CSS, special
TX_CONTEXT = struct.Struct("<BBHBBHIBBH")  # IPCSS, IPCSO, IPCSE, TUCSS, TUCSO, TUCSE, length, ...
TX_DATA = struct.Struct("<QIBBH")  # address, length with type and command, status, options, special
TX_STATUS_OFFSET = 12
DONE = 1 << 0
RX_END_OF_PACKET, RX_IGNORE_SUM, RX_UDP_TCP_SUM, RX_IP_SUM = 1 << 1, 1 << 2, 1 << 5, 1 << 6


class Command(IntFlag):
    """Commands of a transmit descriptor; TCP and IP only in a context descriptor (3.3.6)."""

    EOP = 1 << 0
    IFCS = 1 << 1
    IC = 1 << 2
    TSE = 1 << 2
    RS = 1 << 3
    DEXT = 1 << 5
    TCP = 1 << 0
    IP = 1 << 1


TYPE_DATA = 1 << 20
OPTION_IP_SUM, OPTION_TCP_SUM = 1 << 0, 1 << 1

STATISTICS: Mapping[str, int] = {
    "crcerrs": 0x4000,
    "mpc": 0x4010,
    "prc64": 0x405C,
    "gprc": 0x4074,
    "bprc": 0x4078,
    "mprc": 0x407C,
    "gptc": 0x4080,
    "gorcl": 0x4088,
    "gorch": 0x408C,
    "gotcl": 0x4090,
    "gotch": 0x4094,
    "rnbc": 0x40A0,
    "tpr": 0x40D0,
    "tpt": 0x40D4,
    "tsctc": 0x40F8,
}
"""Counters that are cleared by reading (13.7); of the two halves of an octet counter the low one first."""
