# SPDX-License-Identifier: BSD-3-Clause
"""Bits of the 82540EM's registers that the model acts on (Software Developer's Manual, chapter 13).

Plain integers in namespaces, not enum.IntFlag: an operation on an IntFlag costs a microsecond.
"""


class Ctrl:
    """Device control."""

    FD = 1 << 0
    SLU = 1 << 6
    ILOS = 1 << 7
    SPEED_SHIFT = 8
    SPEED_1000 = 2 << 8
    FRCSPD = 1 << 11
    FRCDPX = 1 << 12
    RST = 1 << 26
    RFCE = 1 << 27
    TFCE = 1 << 28
    VME = 1 << 30
    PHY_RST = 1 << 31
    WRITABLE = 0xFBFC_3FFF & ~PHY_RST
    """All but RST, which clears itself, and PHY_RST, which reads as 0."""


class Status:
    """Device status."""

    FD = 1 << 0
    LU = 1 << 1
    TXOFF = 1 << 4
    SPEED_SHIFT = 6
    ASDV_SHIFT = 8
    MTXCKOK = 1 << 10


class Eecd:
    """EEPROM and flash control."""

    SK = 1 << 0
    CS = 1 << 1
    DI = 1 << 2
    DO = 1 << 3
    FWE = 3 << 4
    REQ = 1 << 6
    GNT = 1 << 7
    PRES = 1 << 8


class Eerd:
    """EEPROM read."""

    START = 1 << 0
    DONE = 1 << 4
    ADDRESS_SHIFT = 8
    DATA_SHIFT = 16


class CtrlExt:
    """Extended device control."""

    EE_RST = 1 << 13


class Mdic:
    """MDI control."""

    DATA = 0xFFFF
    REGISTER_SHIFT = 16
    PHY_SHIFT = 21
    WRITE = 1 << 26
    READ = 2 << 26
    READY = 1 << 28
    INTERRUPT = 1 << 29
    ERROR = 1 << 30


class Cause:
    """Interrupt causes: ICR, ICS, IMS, IMC."""

    TXDW = 1 << 0
    TXQE = 1 << 1
    LSC = 1 << 2
    RXSEQ = 1 << 3
    RXDMT0 = 1 << 4
    RXO = 1 << 6
    RXT0 = 1 << 7
    MDAC = 1 << 9
    PHYINT = 1 << 12
    TXD_LOW = 1 << 15
    SRPD = 1 << 16
    ALL = 0x0001_FFFF
    """The reserved ones too: Linux' self-test sets bits 5 and 8 and waits for their interrupt."""


class Rctl:
    """Receive control."""

    EN = 1 << 1
    SBP = 1 << 2
    UPE = 1 << 3
    MPE = 1 << 4
    LPE = 1 << 5
    LBM = 3 << 6
    LBM_MAC = 1 << 6
    RDMTS_SHIFT = 8
    MO_SHIFT = 12
    BAM = 1 << 15
    BSIZE_SHIFT = 16
    VFE = 1 << 18
    CFIEN = 1 << 19
    CFI = 1 << 20
    DPF = 1 << 22
    PMCF = 1 << 23
    BSEX = 1 << 25
    SECRC = 1 << 26
    WRITABLE = 0x06DF_B3FE


class Tctl:
    """Transmit control."""

    EN = 1 << 1
    PSP = 1 << 3
    SWXOFF = 1 << 22
    WRITABLE = 0x03BF_FFFA
    """SWXOFF clears itself."""


class Rxcsum:
    """Receive checksum control."""

    PCSS = 0xFF
    IPOFL = 1 << 8
    TUOFL = 1 << 9
    IPV6OFL = 1 << 10


RAH_AV = 1 << 31
FPD = 1 << 31
"""Flush partial descriptor block, of RDTR and TIDV: ends a delay."""
XON_ENABLE = 1 << 31

LOOPBACK_NONE, LOOPBACK_MAC, LOOPBACK_TRANSCEIVER = 0, 1 << 6, 3 << 6
