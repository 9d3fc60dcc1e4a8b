"""Interrupt remapping as a VT-d unit does it: tables, checks and faults to the bit, without state or I/O.

Sections are those of the Intel Virtualization Technology for Directed I/O specification, revision 4.1. Where
its text leaves room, the comment at the spot says which reading is taken.
"""

import enum
import functools
from collections.abc import Callable
from typing import Annotated, ClassVar

import msgspec

from irqrouter.bits import Word, bits
from irqrouter.errors import GuestMemoryError, SpecError
from irqrouter.iommu.fault import Fault, NotAnInterrupt, unremapped
from irqrouter.scope import EVERYTHING, UNINDEXED, Cookie, Scope
from irqrouter.x86.msi import (
    DELIVERY_MODES,
    DESTINATION_MODES,
    TRIGGER_MODES,
    Message,
    Request,
    is_interrupt,
    remapped,
)

IRTE_SIZE = 16


class RemappableAddress(Word, frozen=True, kw_only=True):
    """The address of a remappable-format request (§5.1.2.2)."""

    width: ClassVar[int] = 32
    prefix: Annotated[int, bits(31, 20, "FEEh in an interrupt request")] = 0xFEE
    handle_14_0: Annotated[int, bits(19, 5, "interrupt handle bits 14:0")] = 0
    format: Annotated[int, bits(4, 4, "format", ("compatibility", "remappable"))] = 1
    shv: Annotated[int, bits(3, 3, "subhandle valid: data[15:0] is added to the handle")] = 0
    handle_15: Annotated[int, bits(2, 2, "interrupt handle bit 15")] = 0
    ignored: Annotated[int, bits(1, 0, "ignored")] = 0


class RemappableData(Word, frozen=True, kw_only=True):
    """The data of a remappable-format request with SHV=1 (§5.1.2.2); ignored with SHV=0."""

    width: ClassVar[int] = 32
    subhandle: Annotated[int, bits(15, 0, "subhandle")] = 0


class Irta(Word, frozen=True, kw_only=True):
    """Interrupt Remapping Table Address register, offset B8h."""

    width: ClassVar[int] = 64
    base_63_12: Annotated[int, bits(63, 12, "table address bits 63:12")] = 0
    eime: Annotated[int, bits(11, 11, "extended interrupt mode", ("xAPIC", "x2APIC"))] = 0
    s: Annotated[int, bits(3, 0, "the table has 2^(s+1) entries")] = 0


_SVT = ("none", "requester id under SQ", "bus range", "")
_SQ = ("all bits", "ignoring bit 2", "ignoring bits 2:1", "ignoring bits 2:0")


class Irte(Word, frozen=True, kw_only=True):
    """Interrupt Remapping Table Entry for remapped interrupts (§9.9)."""

    width: ClassVar[int] = 128
    svt: Annotated[int, bits(83, 82, "source validation", _SVT)] = 0
    sq: Annotated[int, bits(81, 80, "source id compare", _SQ)] = 0
    sid: Annotated[int, bits(79, 64, "source id")] = 0
    dst: Annotated[int, bits(63, 32, "destination: 32-bit id with EIME, else id in bits 47:40")] = 0
    v: Annotated[int, bits(23, 16, "vector")] = 0
    im: Annotated[int, bits(15, 15, "mode", ("remapped", "posted"))] = 0
    avail: Annotated[int, bits(11, 8, "available to software")] = 0
    dlm: Annotated[int, bits(7, 5, "delivery mode", DELIVERY_MODES)] = 0
    tm: Annotated[int, bits(4, 4, "trigger mode", TRIGGER_MODES)] = 0
    rh: Annotated[int, bits(3, 3, "redirection hint")] = 0
    dm: Annotated[int, bits(2, 2, "destination mode", DESTINATION_MODES)] = 0
    fpd: Annotated[int, bits(1, 1, "fault processing disable: qualified faults are not recorded")] = 0
    p: Annotated[int, bits(0, 0, "present")] = 0


class PostedIrte(Word, frozen=True, kw_only=True):
    """Interrupt Remapping Table Entry for posted interrupts (§9.10): needs CAP.PI, which we do not offer."""

    width: ClassVar[int] = 128
    pda_63_32: Annotated[int, bits(127, 96, "posted descriptor address bits 63:32")] = 0
    svt: Annotated[int, bits(83, 82, "source validation", _SVT)] = 0
    sq: Annotated[int, bits(81, 80, "source id compare", _SQ)] = 0
    sid: Annotated[int, bits(79, 64, "source id")] = 0
    pda_31_6: Annotated[int, bits(63, 38, "posted descriptor address bits 31:6")] = 0
    v: Annotated[int, bits(23, 16, "vector to set in the posted descriptor")] = 0
    im: Annotated[int, bits(15, 15, "mode", ("remapped", "posted"))] = 1
    urg: Annotated[int, bits(14, 14, "urgent")] = 0
    avail: Annotated[int, bits(11, 8, "available to software")] = 0
    fpd: Annotated[int, bits(1, 1, "fault processing disable: qualified faults are not recorded")] = 0
    p: Annotated[int, bits(0, 0, "present")] = 0


class Frcd(Word, frozen=True, kw_only=True):
    """Fault Recording register as an interrupt-remapping fault fills it."""

    width: ClassVar[int] = 128
    f: Annotated[int, bits(127, 127, "fault: this register holds a record")] = 0
    fr: Annotated[int, bits(103, 96, "fault reason")] = 0
    sid: Annotated[int, bits(79, 64, "source id")] = 0
    fi: Annotated[int, bits(63, 48, "fault info: interrupt index, for reasons 20h-2Fh")] = 0


class InterruptEntryCacheInvalidate(Word, frozen=True, kw_only=True):
    """The ``iec_inv_dsc`` descriptor (§6.5.2)."""

    width: ClassVar[int] = 128
    iidx: Annotated[int, bits(47, 32, "interrupt index")] = 0
    im: Annotated[int, bits(31, 27, "index mask: 2^im entries")] = 0
    type_6_4: Annotated[int, bits(11, 9, "descriptor type bits 6:4")] = 0
    g: Annotated[int, bits(4, 4, "granularity", ("global", "index-selective"))] = 0
    type_3_0: Annotated[int, bits(3, 0, "descriptor type bits 3:0")] = 4


class InvalidationWait(Word, frozen=True, kw_only=True):
    """The ``inv_wait_dsc`` descriptor (§6.5.2)."""

    width: ClassVar[int] = 128
    status_address_63_2: Annotated[int, bits(127, 66, "status address bits 63:2")] = 0
    status_data: Annotated[int, bits(63, 32, "status data")] = 0
    type_6_4: Annotated[int, bits(11, 9, "descriptor type bits 6:4")] = 0
    pd: Annotated[int, bits(7, 7, "page-request drain")] = 0
    fn: Annotated[int, bits(6, 6, "fence")] = 0
    sw: Annotated[int, bits(5, 5, "status write")] = 0
    if_: Annotated[int, bits(4, 4, "interrupt flag")] = 0
    type_3_0: Annotated[int, bits(3, 0, "descriptor type bits 3:0")] = 5


class FaultReason(enum.IntEnum):
    """Interrupt-remapping fault reasons, as recorded in FRCD.FR.

    27h and 28h belong to posted descriptors, 29h to malformed writes; neither reaches us.
    """

    RESERVED_IN_REQUEST = 0x20
    INDEX_TOO_HIGH = 0x21
    NOT_PRESENT = 0x22
    TABLE_UNREADABLE = 0x23
    RESERVED_IN_IRTE = 0x24
    COMPATIBILITY_BLOCKED = 0x25
    SOURCE_REJECTED = 0x26


_WHY = {
    FaultReason.RESERVED_IN_REQUEST: "data[31:16] is not 0 in a request with a subhandle",
    FaultReason.INDEX_TOO_HIGH: "the index lies beyond the table",
    FaultReason.NOT_PRESENT: "the IRTE is not present",
    FaultReason.TABLE_UNREADABLE: "the IRTE cannot be read",
    FaultReason.RESERVED_IN_IRTE: "the IRTE has reserved bits set, or is posted",
    FaultReason.COMPATIBILITY_BLOCKED: "compatibility-format requests are blocked",
    FaultReason.SOURCE_REJECTED: "the IRTE does not accept this requester",
}


class VtdFault(Fault, frozen=True, kw_only=True):
    """A request which the unit blocked. ``index`` is the IRTE's, None where the fault has none (20h, 25h)."""

    reason: FaultReason
    index: int | None

    @property
    def why(self) -> str:
        """The rule that blocked the interrupt."""
        where = "" if self.index is None else f", index {self.index:#x}"
        return f"{self.reason:x}h: {_WHY[self.reason]}{where}"

    def frcd(self) -> tuple[int, int]:
        """The fault recording register, low and high quadword, as hardware fills it."""
        # An index beyond 16 bits (21h) has no place in FI, and the manual does not say what is recorded: its
        # low half.
        fault_info = 0 if self.index is None else self.index & 0xFFFF
        raw = Frcd(f=1, fr=self.reason, sid=self.requester, fi=fault_info).encode()
        return raw & (1 << 64) - 1, raw >> 64

    def record(self) -> tuple[int, int]:
        """:meth:`frcd`."""
        return self.frcd()


class Registers(msgspec.Struct, frozen=True):
    """The unit's state that decides translations.

    ``ires`` and ``cfis`` are those bits of GSTS; ``base``, ``entries`` and ``eime`` are what SIRTP latched
    from IRTA, ``entries`` without those beyond the host address width (§5.1.3 makes them fault like those
    beyond the table).
    """

    ires: bool = False
    cfis: bool = False
    base: int = 0
    entries: int = 2
    eime: bool = False


def latch(registers: Registers, irta: int, host_address_width: int) -> Registers:
    """``registers`` after SIRTP latched the IRTA value ``irta``."""
    # Reserved bits 10:4 are not checked: hardware drops them at the write.
    fields = Irta.decode(irta)
    base = fields.base_63_12 << 12
    addressable = max(0, (1 << host_address_width) - base) // IRTE_SIZE
    return msgspec.structs.replace(
        registers, base=base, entries=min(2 << fields.s, addressable), eime=bool(fields.eime)
    )


def interrupt_index(message: Message) -> int:
    """The index a remappable-format message asks for (§5.1.3); it may exceed 16 bits.

    The handle, plus data[15:0] with SHV=1. Meaningless where the request has reserved bits set (20h).
    """
    address = message.address
    handle = address >> 5 & 0x7FFF | (address & 4) << 13
    return handle + message.data if address & 8 else handle


def cookie(message: Message) -> Cookie:
    """The index of the IRTE this message uses, or UNINDEXED where it can use none."""
    if not (is_interrupt(message.address) and message.address & 0x10):
        return UNINDEXED
    return min(interrupt_index(message), UNINDEXED)


def remap(registers: Registers, request: Request, read: Callable[[int, int], bytes]) -> Message | Fault:
    """What the unit makes of ``request`` (§5.1.4). ``read(gpa, size)`` reads guest memory.

    The order of the checks is the manual's: faults of the request itself come before the entry is read.
    """
    message, requester = request.message, request.requester
    if not registers.ires:
        return unremapped(request)
    if not is_interrupt(message.address):
        return NotAnInterrupt(requester=requester, recorded=False, message=message)
    if not message.address & 0x10:
        if registers.cfis and not registers.eime:
            return message
        return _fault(requester, FaultReason.COMPATIBILITY_BLOCKED, None)
    if message.address & 8 and message.data >> 16:
        return _fault(requester, FaultReason.RESERVED_IN_REQUEST, None)
    index = interrupt_index(message)
    # The sum is not wrapped to 16 bits: 21h is defined as an index above the largest allowed.
    if index >= registers.entries:
        return _fault(requester, FaultReason.INDEX_TOO_HIGH, index)
    try:
        entry = read(registers.base + index * IRTE_SIZE, IRTE_SIZE)
    except GuestMemoryError:
        return _fault(requester, FaultReason.TABLE_UNREADABLE, index)
    outcome = remap_entry(entry, requester, registers.eime)
    if isinstance(outcome, Message):
        return outcome
    return VtdFault(requester=requester, recorded=not entry[0] & 2, reason=outcome, index=index)


def _fault(requester: int, reason: FaultReason, index: int | None) -> VtdFault:
    return VtdFault(requester=requester, recorded=True, reason=reason, index=index)


#: Bits of DST that are reserved without EIME: the xAPIC id is in 47:40.
_RESERVED_IN_XAPIC_DST = 0xFFFF00FF << 32


# Remembered because a vector that is caught again and again mostly finds its entry as it was.
@functools.lru_cache(maxsize=4096)
def remap_entry(entry: bytes, requester: int, eime: bool) -> Message | FaultReason:
    """What the 16 bytes of an IRTE make of a request from ``requester``."""
    raw = int.from_bytes(entry, "little")
    irte = Irte.decode(raw)
    if not irte.p:
        return FaultReason.NOT_PRESENT
    # IM is reserved while CAP.PI is clear. Delivery modes 3 and 6 are reserved values of a field, which the
    # list of 24h's causes does not name: they go through, and no APIC takes them.
    if irte.im or raw & Irte.reserved or (not eime and raw & _RESERVED_IN_XAPIC_DST):
        return FaultReason.RESERVED_IN_IRTE
    if not source_accepted(irte, requester):
        return FaultReason.SOURCE_REJECTED
    return remapped(
        destination=irte.dst if eime else irte.dst >> 8,
        dm=irte.dm,
        rh=irte.rh,
        vector=irte.v,
        delivery_mode=irte.dlm,
        tm=irte.tm,
    )


#: The requester id bits that count, by SQ.
_SQ_MASK = (0xFFFF, 0xFFFB, 0xFFF9, 0xFFF8)


def source_accepted(irte: Irte, requester: int) -> bool:
    """Whether the entry's SVT, SQ and SID let ``requester`` use it (§9.9)."""
    match irte.svt:
        case 0:
            return True
        case 1:
            return not (requester ^ irte.sid) & _SQ_MASK[irte.sq]
        case 2:
            # Start bus in SID[15:8], end bus in SID[7:0].
            return irte.sid >> 8 <= requester >> 8 <= irte.sid & 0xFF
        case _:
            # Reserved, so blocked; the manual leaves the code open between 24h and 26h.
            return False


def entry(index: int) -> Scope:
    """The scope of one IRTE."""
    if not 0 <= index < UNINDEXED:
        raise SpecError(f"IIDX {index:#x}", "must fit 16 bits")
    return Scope(index, index)


def entries(index: int, mask: int) -> Scope:
    """The scope of 2^``mask`` IRTEs about ``index`` (IIDX and IM of an ``iec_inv_dsc``)."""
    if not 0 <= index < UNINDEXED:
        raise SpecError(f"IIDX {index:#x}", "must fit 16 bits")
    if not 0 <= mask < 32:
        raise SpecError(f"IM {mask:#x}", "must fit 5 bits")
    # As for address masks elsewhere in the manual, the low IM bits of IIDX are taken not to count.
    first = index >> mask << mask
    return Scope(first, min(first + (1 << mask), UNINDEXED) - 1)


def invalidation_scope(low: int, high: int) -> Scope | None:
    """What a 128-bit invalidation descriptor invalidates; None where it is not about interrupts.

    Raises :class:`~irqrouter.errors.SpecError` for an ``iec_inv_dsc`` with reserved bits set (hardware: IQE).
    """
    if low & 0xF != 4 or low >> 9 & 7:
        return None
    descriptor = InterruptEntryCacheInvalidate.decode(low | high << 64, strict=True)
    return entries(descriptor.iidx, descriptor.im) if descriptor.g else EVERYTHING
