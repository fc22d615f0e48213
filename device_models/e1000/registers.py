# SPDX-License-Identifier: BSD-3-Clause
"""The registers of the 82540EM, apart from its statistics, as one table.

Source: Intel, "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual", chapter 13,
"Register Descriptions". Registers that drive nothing in this model (LEDs, wake-up, manageability, the
diagnostic FIFO pointers) keep what is written, as they would with nothing attached.
"""

from vfio_user.device_models.e1000.bits import Ctrl, Rctl, Tctl
from vfio_user.device_models.registers import Field, Register

MAC_SIZE = 128 * 1024
"""Bytes of the register BAR."""

ALL = 0xFFFF_FFFF
LOW = 0xFFFF
RING_LENGTH = 0x000F_FF80  # a multiple of 128 bytes, 8 descriptors


def _flags(*names: str) -> tuple[Field, ...]:
    """Fields from "NAME@shift" or "NAME@shift+bits"."""
    fields = []
    for text in names:
        name, _, place = text.partition("@")
        shift, _, bits = place.partition("+")
        fields.append(Field(name, int(shift), int(bits or 1)))
    return tuple(fields)


CAUSES = _flags(
    *("TXDW@0", "TXQE@1", "LSC@2", "RXSEQ@3", "RXDMT0@4", "RXO@6", "RXT0@7", "MDAC@9", "RXCFG@10"),
    *("PHYINT@12", "GPI_SDP6@13", "GPI_SDP7@14", "TXD_LOW@15", "SRPD@16"),
)
_THRESHOLDS = _flags("PTHRESH@0+6", "HTHRESH@8+6", "WTHRESH@16+6", "GRAN@24")

CONTROL = (
    Register(
        *("CTRL", 0x0000),
        reset=Ctrl.FD | Ctrl.SPEED_1000 | Ctrl.SLU,
        writable=Ctrl.WRITABLE,
        fields=_flags(
            *("FD@0", "LRST@3", "ASDE@5", "SLU@6", "ILOS@7", "SPEED@8+2", "FRCSPD@11", "FRCDPX@12"),
            *("SDP0_DATA@18", "SDP1_DATA@19", "ADVD3WUC@20", "EN_PHY_PWR_MGMT@21", "SDP0_IODIR@22"),
            *("SDP1_IODIR@23", "RST@26", "RFCE@27", "TFCE@28", "VME@30", "PHY_RST@31"),
        ),
        text="device control",
    ),
    Register("CTRL_DUP", 0x0004, derived=True, text="a second place of CTRL"),
    Register(
        *("STATUS", 0x0008),
        fields=_flags(
            *("FD@0", "LU@1", "FUNCTION_ID@2+2", "TXOFF@4", "TBIMODE@5", "SPEED@6+2", "ASDV@8+2"),
            *("MTXCKOK@10", "PCI66@11", "BUS64@12", "PCIX_MODE@13", "PCIXSPD@14+2"),
        ),
        derived=True,
        text="device status, read-only",
    ),
    Register(
        *("EECD", 0x0010),
        fields=_flags("SK@0", "CS@1", "DI@2", "DO@3", "FWE@4+2", "REQ@6", "GNT@7", "PRES@8", "SIZE@9"),
        derived=True,
        text="EEPROM and flash control: the pins of the Microwire EEPROM",
    ),
    Register(
        "EERD", 0x0014, fields=_flags("START@0", "DONE@4", "ADDR@8+8", "DATA@16+16"), text="EEPROM read"
    ),
    Register("CTRL_EXT", 0x0018, writable=0x00C0_DFFF, text="extended device control"),
    Register("FLA", 0x001C, writable=0x0000_000F, text="flash access; there is no flash"),
    Register(
        *("MDIC", 0x0020),
        reset=1 << 28,
        fields=_flags("DATA@0+16", "REGADD@16+5", "PHYADD@21+5", "OP@26+2", "R@28", "I@29", "E@30"),
        text="MDI control: the way to the PHY's registers",
    ),
    Register("FCAL", 0x0028, writable=ALL, text="flow control address, bytes 0 to 3"),
    Register("FCAH", 0x002C, writable=LOW, text="flow control address, bytes 4 and 5"),
    Register("FCT", 0x0030, writable=LOW, text="flow control type"),
    Register("VET", 0x0038, writable=LOW, reset=0x8100, text="VLAN Ethernet type"),
    Register("TXCW", 0x0178, writable=0xC000_FFFF, text="transmit configuration word (TBI only)"),
    Register("RXCW", 0x0180, text="receive configuration word (TBI only)"),
    Register("FCTTV", 0x0170, writable=LOW, text="flow control transmit timer value"),
    Register("LEDCTL", 0x0E00, reset=0x0706_8302, writable=0xCFCF_CFCF, text="LED control"),
    Register(
        *("PBA", 0x1000),
        reset=0x0010_0030,
        writable=0x7F,
        internal=0x7F << 16,
        text="packet buffer: KiB for receive",
    ),
    Register("PBS", 0x1008, writable=ALL, text="packet buffer size, diagnostic"),
)

INTERRUPT = (
    Register("ICR", 0x00C0, fields=CAUSES, text="interrupt causes, cleared by reading"),
    Register("ITR", 0x00C4, writable=LOW, text="least interval between interrupts, 256 ns"),
    Register("ICS", 0x00C8, fields=CAUSES, derived=True, text="sets causes; reads as ICR without clearing"),
    Register("IMS", 0x00D0, fields=CAUSES, text="enables causes"),
    Register("IMC", 0x00D8, fields=CAUSES, derived=True, text="disables causes"),
)

RECEIVE = (
    Register(
        *("RCTL", 0x0100),
        writable=Rctl.WRITABLE,
        fields=_flags(
            *("EN@1", "SBP@2", "UPE@3", "MPE@4", "LPE@5", "LBM@6+2", "RDMTS@8+2", "MO@12+2", "BAM@15"),
            *("BSIZE@16+2", "VFE@18", "CFIEN@19", "CFI@20", "DPF@22", "PMCF@23", "BSEX@25", "SECRC@26"),
        ),
        text="receive control",
    ),
    Register("FCRTL", 0x2160, writable=0x8000_FFF8, fields=_flags("RTL@3+13", "XONE@31"), text="XON below"),
    Register("FCRTH", 0x2168, writable=0x8000_FFF8, fields=_flags("RTH@3+13", "FCE@31"), text="XOFF above"),
    Register("RDFH", 0x2410, writable=0x1FFF, text="receive data FIFO head, diagnostic"),
    Register("RDFT", 0x2418, writable=0x1FFF, text="receive data FIFO tail, diagnostic"),
    Register("RDFHS", 0x2420, writable=0x1FFF, text="receive data FIFO head saved, diagnostic"),
    Register("RDFTS", 0x2428, writable=0x1FFF, text="receive data FIFO tail saved, diagnostic"),
    Register("RDFPC", 0x2430, writable=0x1FFF, text="receive data FIFO packets, diagnostic"),
    Register("RDBAL", 0x2800, writable=0xFFFF_FFF0, text="receive ring address, low"),
    Register("RDBAH", 0x2804, writable=ALL, text="receive ring address, high"),
    Register("RDLEN", 0x2808, writable=RING_LENGTH, text="receive ring length in bytes"),
    Register("RDH", 0x2810, writable=LOW, text="receive head: the device's next descriptor"),
    Register("RDT", 0x2818, writable=LOW, text="receive tail: the first that the device may not use"),
    Register(
        "RDTR", 0x2820, writable=LOW, fields=_flags("DELAY@0+16", "FPD@31"), text="receive delay, 1.024 us"
    ),
    Register(
        "RXDCTL", 0x2828, writable=0x013F_3F3F, reset=0x0001_0000, fields=_THRESHOLDS, text="thresholds"
    ),
    Register("RADV", 0x282C, writable=LOW, text="longest receive delay, 1.024 us"),
    Register("RSRPD", 0x2C00, writable=0x0FFF, text="size up to which a packet is small, bytes"),
    Register(
        *("RXCSUM", 0x5000),
        writable=0x0000_07FF,
        fields=_flags("PCSS@0+8", "IPOFL@8", "TUOFL@9", "IPV6OFL@10"),
        text="receive checksum control",
    ),
    Register("MTA", 0x5200, writable=ALL, count=128, stride=4, text="multicast table"),
    Register("RAL", 0x5400, writable=ALL, count=16, stride=8, text="receive address, bytes 0 to 3"),
    Register(
        *("RAH", 0x5404),
        writable=0x8003_FFFF,
        count=16,
        stride=8,
        fields=_flags("RAH@0+16", "AS@16+2", "AV@31"),
        text="receive address, bytes 4 and 5, and its use",
    ),
    Register("VFTA", 0x5600, writable=ALL, count=128, stride=4, text="VLAN filter table"),
)

TRANSMIT = (
    Register(
        *("TCTL", 0x0400),
        writable=Tctl.WRITABLE,
        fields=_flags("EN@1", "PSP@3", "CT@4+8", "COLD@12+10", "SWXOFF@22", "PBE@23", "RTLC@24", "NRTU@25"),
        text="transmit control",
    ),
    Register("TCTL_EXT", 0x0404, writable=0x000F_FFFF, text="extended transmit control"),
    Register("TIPG", 0x0410, writable=0x3FFF_FFFF, text="inter-packet gap"),
    Register("TBT", 0x0448, writable=LOW, text="burst timer"),
    Register("AIFS", 0x0458, writable=LOW, text="adaptive inter-frame spacing"),
    Register("TXDMAC", 0x3000, writable=1, text="transmit DMA control"),
    Register("TDFH", 0x3410, writable=0x1FFF, text="transmit data FIFO head, diagnostic"),
    Register("TDFT", 0x3418, writable=0x1FFF, text="transmit data FIFO tail, diagnostic"),
    Register("TDFHS", 0x3420, writable=0x1FFF, text="transmit data FIFO head saved, diagnostic"),
    Register("TDFTS", 0x3428, writable=0x1FFF, text="transmit data FIFO tail saved, diagnostic"),
    Register("TDFPC", 0x3430, writable=0x1FFF, text="transmit data FIFO packets, diagnostic"),
    Register("TDBAL", 0x3800, writable=0xFFFF_FFF0, text="transmit ring address, low"),
    Register("TDBAH", 0x3804, writable=ALL, text="transmit ring address, high"),
    Register("TDLEN", 0x3808, writable=RING_LENGTH, text="transmit ring length in bytes"),
    Register("TDH", 0x3810, writable=LOW, text="transmit head: the device's next descriptor"),
    Register("TDT", 0x3818, writable=LOW, text="transmit tail: the first that is not yet the device's"),
    Register("TIDV", 0x3820, writable=LOW, text="transmit interrupt delay, 1.024 us"),
    Register(
        *("TXDCTL", 0x3828),
        writable=0xFF3F_3F3F,
        fields=(*_THRESHOLDS, Field("LWTHRESH", 25, 7)),
        text="thresholds",
    ),
    Register("TADV", 0x382C, writable=LOW, text="longest transmit interrupt delay, 1.024 us"),
    Register("TSPMT", 0x3830, reset=0x0100_0400, writable=ALL, text="segmentation pad and threshold"),
)

WAKE_UP = (
    Register("WUC", 0x5800, writable=0x0000_000F, text="wake-up control"),
    Register("WUFC", 0x5808, writable=0x000F_80FF, text="wake-up filter control"),
    Register("WUS", 0x5810, write_1_to_clear=0x000F_00FF, text="wake-up status"),
    Register("MANC", 0x5820, writable=0x01FF_FF00, text="management control; there is no manageability"),
    Register("IPAV", 0x5838, writable=0x0001_000F, text="IP addresses valid"),
    Register("IP4AT", 0x5840, writable=ALL, count=4, stride=8, text="IPv4 addresses"),
    Register("IP6AT", 0x5880, writable=ALL, count=4, stride=4, text="IPv6 address"),
    Register("WUPL", 0x5900, text="wake-up packet length"),
    Register("WUPM", 0x5A00, count=32, stride=4, text="wake-up packet"),
    Register("FFLT", 0x5F00, writable=0x7FF, count=4, stride=8, text="flexible filter lengths"),
    Register("FFMT", 0x9000, writable=0xF, count=128, stride=8, text="flexible filter masks"),
    Register("FFVT", 0x9800, writable=ALL, count=128, stride=8, text="flexible filter values"),
)

IO_WINDOW = (
    Register("IOADDR", 0x00, writable=ALL, text="offset of the register that IODATA shows"),
    Register("IODATA", 0x04, derived=True, text="the register at IOADDR"),
)
IO_SIZE = 64
"""Bytes of the I/O BAR."""
