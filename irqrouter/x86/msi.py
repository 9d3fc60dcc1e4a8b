"""MSI messages: the write a device makes to raise an interrupt, as KVM and the remapping units see it."""

from typing import Annotated, ClassVar

import msgspec

from irqrouter.bits import Word, bits
from irqrouter.errors import SpecError


class Message(msgspec.Struct, frozen=True, order=True):
    """One MSI write: a 64-bit ``address`` (high dword in bits 63:32) and 32-bit ``data``."""

    address: int
    data: int

    def describe(self) -> str:
        """``FEE03008/00004041``, with the high dword in front where it is not zero."""
        high = self.address >> 32
        prefix = f"{high:08X}:" if high else ""
        return f"{prefix}{self.address & 0xFFFFFFFF:08X}/{self.data:08X}"


class Request(msgspec.Struct, frozen=True):
    """A message as a remapping unit receives it, with the 16-bit ``requester`` id (:func:`bdf`)."""

    message: Message
    requester: int


def checked(message: Message) -> Message:
    """Return ``message`` if its address fits 64 bits and its data 32; raise :class:`SpecError` otherwise."""
    if not 0 <= message.address < 1 << 64:
        raise SpecError(f"MSI address {message.address:#x}", "must fit 64 bits")
    if not 0 <= message.data < 1 << 32:
        raise SpecError(f"MSI data {message.data:#x}", "must fit 32 bits")
    return message


def checked_requester(requester: int) -> int:
    """Return ``requester`` if it fits 16 bits; raise :class:`SpecError` otherwise."""
    if not 0 <= requester < 1 << 16:
        raise SpecError(f"requester id {requester:#x}", "must fit 16 bits")
    return requester


def is_interrupt(address: int) -> bool:
    """Whether a write to the 64-bit ``address`` is an interrupt request: FEEx_xxxxh, the high dword 0."""
    return address >> 20 == 0xFEE


def bdf(requester: int) -> str:
    """A requester id (bus 15:8, device 7:3, function 2:0) as ``00:03.0``."""
    return f"{requester >> 8:02x}:{requester >> 3 & 0x1F:02x}.{requester & 7}"


def with_extended_destination(message: Message) -> Message:
    """The message with destination id bits 14:8 where KVM wants them.

    A guest that uses KVM_FEATURE_MSI_EXT_DEST_ID puts them into address bits 11:5, which KVM does not read; KVM takes
    them in bits 14:8 of the high dword. Remappable messages, and those with a high dword, have no such bits and
    stay as they are (QEMU target/i386/kvm/kvm.c:kvm_swizzle_msi_ext_dest_id).
    """
    address = message.address
    if address & 0x10 or address >> 32:
        return message
    return Message(address & ~0xFE0 | (address >> 5 & 0x7F) << 40, message.data)


DESTINATION_MODES = ("physical", "logical")
TRIGGER_MODES = ("edge", "level")
DELIVERY_MODES = ("fixed", "lowest priority", "SMI", "", "NMI", "INIT", "", "ExtINT")


class CompatibilityAddress(Word, frozen=True, kw_only=True):
    """The address of a compatibility-format MSI (Intel SDM vol. 3, "Message Address Register Format").

    The high dword is KVM's (``KVM_X2APIC_API_USE_32BIT_IDS``): destination bits 31:8 in its bits 31:8, the
    rest 0.
    """

    width: ClassVar[int] = 64
    destination_31_8: Annotated[int, bits(63, 40, "destination APIC id bits 31:8, as KVM takes them")] = 0
    prefix: Annotated[int, bits(31, 20, "FEEh in an interrupt request")] = 0xFEE
    destination: Annotated[int, bits(19, 12, "destination APIC id bits 7:0")] = 0
    ext_destination: Annotated[int, bits(11, 5, "id bits 14:8 under KVM_FEATURE_MSI_EXT_DEST_ID")] = 0
    format: Annotated[int, bits(4, 4, "format", ("compatibility", "remappable"))] = 0
    rh: Annotated[int, bits(3, 3, "redirection hint")] = 0
    dm: Annotated[int, bits(2, 2, "destination mode", DESTINATION_MODES)] = 0
    ignored: Annotated[int, bits(1, 0, "ignored")] = 0


class CompatibilityData(Word, frozen=True, kw_only=True):
    """The data of a compatibility-format MSI (Intel SDM vol. 3, "Message Data Register Format")."""

    width: ClassVar[int] = 32
    tm: Annotated[int, bits(15, 15, "trigger mode", TRIGGER_MODES)] = 0
    level: Annotated[int, bits(14, 14, "level", ("deassert", "assert"))] = 0
    delivery_mode: Annotated[int, bits(10, 8, "delivery mode", DELIVERY_MODES)] = 0
    vector: Annotated[int, bits(7, 0, "vector")] = 0


def remapped(*, destination: int, dm: int, rh: int, vector: int, delivery_mode: int, tm: int) -> Message:
    """The message a remapping unit makes of these fields of a table entry.

    ``destination`` is a 32-bit APIC id, whose bits 31:8 go into the high dword. Data bit 14 (assert) is set.
    """
    address = CompatibilityAddress(destination_31_8=destination >> 8, destination=destination & 0xFF, rh=rh, dm=dm)
    data = CompatibilityData(tm=tm, level=1, delivery_mode=delivery_mode, vector=vector)
    return Message(address.encode(), data.encode())
