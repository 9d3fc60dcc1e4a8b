"""The I/OAPIC's redirection table entry (RTE), and the message a pin sends for it.

An I/OAPIC makes an MSI of an RTE by fixed wiring and knows nothing of formats: what the bits mean is up to whoever
takes the message, an APIC or a remapping unit (QEMU hw/intc/ioapic.c:ioapic_entry_parse does the same).
"""

from typing import Annotated, ClassVar

from irqrouter.bits import Word, bits
from irqrouter.errors import SpecError
from irqrouter.x86.msi import DELIVERY_MODES, DESTINATION_MODES, TRIGGER_MODES, Message

_POLARITIES = ("active high", "active low")


class Rte(Word, frozen=True, kw_only=True):
    """A redirection table entry in compatibility format (82093AA I/OAPIC, section 3.2.4)."""

    width: ClassVar[int] = 64
    destination: Annotated[int, bits(63, 56, "destination APIC id")] = 0
    ext_destination: Annotated[int, bits(55, 49, "id bits 14:8 under KVM_FEATURE_MSI_EXT_DEST_ID")] = 0
    format: Annotated[int, bits(48, 48, "format", ("compatibility", "remappable"))] = 0
    mask: Annotated[int, bits(16, 16, "masked")] = 0
    tm: Annotated[int, bits(15, 15, "trigger mode", TRIGGER_MODES)] = 0
    remote_irr: Annotated[int, bits(14, 14, "remote IRR, read only: sent, not yet EOId")] = 0
    polarity: Annotated[int, bits(13, 13, "polarity", _POLARITIES)] = 0
    delivery_status: Annotated[int, bits(12, 12, "delivery status, read only")] = 0
    dm: Annotated[int, bits(11, 11, "destination mode", DESTINATION_MODES)] = 0
    delivery_mode: Annotated[int, bits(10, 8, "delivery mode", DELIVERY_MODES)] = 0
    vector: Annotated[int, bits(7, 0, "vector; an EOI is compared with it")] = 0


class RemappableRte(Word, frozen=True, kw_only=True):
    """A redirection table entry in VT-d's remappable format (VT-d §5.1.5.1)."""

    width: ClassVar[int] = 64
    index_14_0: Annotated[int, bits(63, 49, "interrupt index bits 14:0")] = 0
    format: Annotated[int, bits(48, 48, "format", ("compatibility", "remappable"))] = 1
    mask: Annotated[int, bits(16, 16, "masked")] = 0
    tm: Annotated[int, bits(15, 15, "trigger mode", TRIGGER_MODES)] = 0
    remote_irr: Annotated[int, bits(14, 14, "remote IRR, read only: sent, not yet EOId")] = 0
    polarity: Annotated[int, bits(13, 13, "polarity", _POLARITIES)] = 0
    delivery_status: Annotated[int, bits(12, 12, "delivery status, read only")] = 0
    index_15: Annotated[int, bits(11, 11, "interrupt index bit 15")] = 0
    # The IRTE's vector may differ: Linux writes the pin's number here and EOIs the pin with it.
    vector: Annotated[int, bits(7, 0, "an EOI is compared with it; the IRTE's may differ")] = 0


def message(rte: int) -> Message:
    """The message a pin sends for the 64-bit ``rte``, whatever its format. A masked pin sends none.

    Address bits 19:4 are RTE bits 63:48 and address bit 2 is RTE bit 11; data has vector, delivery and trigger mode.
    """
    if not 0 <= rte < 1 << 64:
        raise SpecError(f"RTE {rte:#x}", "must fit 64 bits")
    return Message(0xFEE00000 | rte >> 48 << 4 | (rte >> 11 & 1) << 2, rte & 0x87FF)
