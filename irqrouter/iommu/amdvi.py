"""Interrupt remapping as an AMD-Vi unit does it: tables, checks and events to the bit, without state or I/O.

Names are those of the AMD I/O Virtualization Technology (IOMMU) Specification, publication 48882. Where its text
leaves room, the comment at the spot says which reading is taken.
"""

import enum
import functools
from collections.abc import Callable
from typing import Annotated, ClassVar

import msgspec

from irqrouter.bits import Word, bits
from irqrouter.errors import GuestMemoryError
from irqrouter.iommu.fault import Fault, NotAnInterrupt, unremapped
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.x86.msi import DESTINATION_MODES, Message, Request, checked_requester, is_interrupt, remapped

DTE_SIZE = 32


class Control(Word, frozen=True, kw_only=True):
    """IOMMU Control Register, offset 18h: the bits that decide interrupt translations."""

    width: ClassVar[int] = 64
    xt_en: Annotated[int, bits(50, 50, "32-bit destinations in 128-bit entries")] = 0
    num_int_remap_mode: Annotated[int, bits(44, 43, "table size", ("512 entries", "2048 entries"))] = 0
    ga_en: Annotated[int, bits(17, 17, "128-bit interrupt remapping entries")] = 0
    iommu_en: Annotated[int, bits(0, 0, "translation enabled")] = 0


class DeviceTableBase(Word, frozen=True, kw_only=True):
    """Device Table Base Address Register, offset 0."""

    width: ClassVar[int] = 64
    base_51_12: Annotated[int, bits(51, 12, "table address bits 51:12")] = 0
    size: Annotated[int, bits(8, 0, "the table takes (size+1) * 4 KiB")] = 0


class Dte(Word, frozen=True, kw_only=True):
    """Device Table Entry, with the fields that concern interrupts.

    The bits that later revisions define for features which we do not offer (GAM, HPT, virtual IOMMU) are reserved.
    """

    width: ClassVar[int] = 256
    attributes: Annotated[int, bits(255, 246, "memory attributes")] = 0
    lint1_pass: Annotated[int, bits(191, 191, "LINT1 passes")] = 0
    lint0_pass: Annotated[int, bits(190, 190, "LINT0 passes")] = 0
    int_ctl: Annotated[int, bits(189, 188, "fixed, arbitrated", ("target abort", "unmapped", "remapped"))] = 0
    nmi_pass: Annotated[int, bits(186, 186, "NMI passes")] = 0
    eint_pass: Annotated[int, bits(185, 185, "ExtINT passes")] = 0
    init_pass: Annotated[int, bits(184, 184, "INIT passes")] = 0
    int_table_root_51_6: Annotated[int, bits(179, 134, "interrupt table address bits 51:6")] = 0
    ig: Annotated[int, bits(133, 133, "1: interrupt page faults are not logged")] = 0
    int_tab_len: Annotated[int, bits(132, 129, "the interrupt table has 2^len entries, len at most 11")] = 0
    iv: Annotated[int, bits(128, 128, "interrupt map valid; 0: interrupts pass unmapped")] = 0
    dma_127_80: Annotated[int, bits(127, 80, "DMA translation")] = 0
    domain_id: Annotated[int, bits(79, 64, "domain id")] = 0
    dma_63_0: Annotated[int, bits(63, 0, "DMA translation")] = 0


_INT_TYPES = ("fixed", "arbitrated")


class Irte(Word, frozen=True, kw_only=True):
    """The 32-bit Interrupt Remapping Table Entry (Control.GAEn=0)."""

    width: ClassVar[int] = 32
    vector: Annotated[int, bits(23, 16, "vector")] = 0
    destination: Annotated[int, bits(15, 8, "destination APIC id")] = 0
    guest_mode: Annotated[int, bits(7, 7, "must be 0")] = 0
    dm: Annotated[int, bits(6, 6, "destination mode", DESTINATION_MODES)] = 0
    rq_eoi: Annotated[int, bits(5, 5, "request EOI: level")] = 0
    int_type: Annotated[int, bits(4, 2, "type", _INT_TYPES)] = 0
    sup_iopf: Annotated[int, bits(1, 1, "page faults are not logged")] = 0
    remap_en: Annotated[int, bits(0, 0, "remapping enabled")] = 0


class IrteGa(Word, frozen=True, kw_only=True):
    """The 128-bit Interrupt Remapping Table Entry (Control.GAEn=1) that remaps."""

    width: ClassVar[int] = 128
    destination_31_24: Annotated[int, bits(127, 120, "destination bits 31:24, with XTEn")] = 0
    vector: Annotated[int, bits(71, 64, "vector")] = 0
    destination_23_8: Annotated[int, bits(31, 16, "destination bits 23:8, with XTEn")] = 0
    destination_7_0: Annotated[int, bits(15, 8, "destination bits 7:0")] = 0
    guest_mode: Annotated[int, bits(7, 7, "0: remapped; 1: guest virtual APIC")] = 0
    dm: Annotated[int, bits(6, 6, "destination mode", DESTINATION_MODES)] = 0
    rq_eoi: Annotated[int, bits(5, 5, "request EOI: level")] = 0
    int_type: Annotated[int, bits(4, 2, "type", _INT_TYPES)] = 0
    sup_iopf: Annotated[int, bits(1, 1, "page faults are not logged")] = 0
    remap_en: Annotated[int, bits(0, 0, "remapping enabled")] = 0


class IrteGaGuest(Word, frozen=True, kw_only=True):
    """The 128-bit Interrupt Remapping Table Entry with GuestMode=1: needs GAMSup, which we do not offer."""

    width: ClassVar[int] = 128
    destination_31_24: Annotated[int, bits(127, 120, "destination bits 31:24")] = 0
    virtual_apic_root_51_12: Annotated[int, bits(115, 76, "virtual APIC page address bits 51:12")] = 0
    vector: Annotated[int, bits(71, 64, "vector")] = 0
    ga_tag: Annotated[int, bits(63, 32, "GATag")] = 0
    destination_23_0: Annotated[int, bits(31, 8, "destination bits 23:0")] = 0
    guest_mode: Annotated[int, bits(7, 7, "0: remapped; 1: guest virtual APIC")] = 1
    is_run: Annotated[int, bits(6, 6, "the virtual processor runs")] = 0
    ga_log_intr: Annotated[int, bits(2, 2, "log to the guest virtual APIC log")] = 0
    sup_iopf: Annotated[int, bits(1, 1, "page faults are not logged")] = 0
    remap_en: Annotated[int, bits(0, 0, "remapping enabled")] = 0


_EVENTS = (
    "",
    "ILLEGAL_DEV_TABLE_ENTRY",
    "IO_PAGE_FAULT",
    "DEV_TAB_HARDWARE_ERROR",
    "PAGE_TAB_HARDWARE_ERROR",
    "ILLEGAL_COMMAND_ERROR",
    "COMMAND_HARDWARE_ERROR",
    "IOTLB_INV_TIMEOUT",
    "INVALID_DEVICE_REQUEST",
)


class Event(Word, frozen=True, kw_only=True):
    """An event log entry, as far as interrupt remapping fills it."""

    width: ClassVar[int] = 128
    address: Annotated[int, bits(127, 64, "the request's address, or the table entry's")] = 0
    code: Annotated[int, bits(63, 60, "event", _EVENTS)] = 0
    type: Annotated[int, bits(58, 57, "type of a hardware error")] = 0
    tr: Annotated[int, bits(56, 56, "translation request")] = 0
    rz: Annotated[int, bits(55, 55, "a reserved bit was set")] = 0
    pe: Annotated[int, bits(54, 54, "permission denied")] = 0
    rw: Annotated[int, bits(53, 53, "write")] = 0
    pr: Annotated[int, bits(52, 52, "the entry was present")] = 0
    i: Annotated[int, bits(51, 51, "interrupt request")] = 0
    domain: Annotated[int, bits(47, 32, "domain id")] = 0
    device_id: Annotated[int, bits(15, 0, "device id")] = 0


_OPCODES = (
    "",
    "COMPLETION_WAIT",
    "INVALIDATE_DEVTAB_ENTRY",
    "INVALIDATE_IOMMU_PAGES",
    "INVALIDATE_IOTLB_PAGES",
    "INVALIDATE_INTERRUPT_TABLE",
    "PREFETCH_IOMMU_PAGES",
    "COMPLETE_PPR_REQUEST",
    "INVALIDATE_IOMMU_ALL",
)


class DeviceCommand(Word, frozen=True, kw_only=True):
    """A command that names a device: INVALIDATE_DEVTAB_ENTRY, INVALIDATE_INTERRUPT_TABLE."""

    width: ClassVar[int] = 128
    opcode: Annotated[int, bits(63, 60, "command", _OPCODES)] = 0
    device_id: Annotated[int, bits(15, 0, "device id")] = 0


class CompletionWait(Word, frozen=True, kw_only=True):
    """The COMPLETION_WAIT command."""

    width: ClassVar[int] = 128
    store_data: Annotated[int, bits(127, 64, "store data")] = 0
    opcode: Annotated[int, bits(63, 60, "command", _OPCODES)] = 1
    store_address_51_3: Annotated[int, bits(51, 3, "store address bits 51:3")] = 0
    f: Annotated[int, bits(2, 2, "flush queue")] = 0
    i: Annotated[int, bits(1, 1, "interrupt")] = 0
    s: Annotated[int, bits(0, 0, "store")] = 0


class EventCode(enum.IntEnum):
    """Event log codes that interrupts can raise."""

    ILLEGAL_DEV_TABLE_ENTRY = 1
    IO_PAGE_FAULT = 2
    DEV_TAB_HARDWARE_ERROR = 3
    PAGE_TAB_HARDWARE_ERROR = 4


class Cause(enum.Enum):
    """Why an interrupt is aborted: what it is, and the event's code, PR and RZ (no code: hardware logs nothing)."""

    BEYOND_DEVICE_TABLE = ("the device table has no such entry", EventCode.IO_PAGE_FAULT, 0, 0)
    DTE_UNREADABLE = ("the DTE cannot be read", EventCode.DEV_TAB_HARDWARE_ERROR, 0, 0)
    DTE_RESERVED = ("reserved bits are set in the DTE", EventCode.ILLEGAL_DEV_TABLE_ENTRY, 0, 1)
    TYPE_NOT_PASSED = ("the DTE does not pass this interrupt type", None, 0, 0)
    # The event of IntCtl=00 is left open; "interrupt request aborted" is among the causes of IO_PAGE_FAULT.
    INT_CTL_ABORT = ("DTE.IntCtl aborts interrupts", EventCode.IO_PAGE_FAULT, 0, 0)
    INT_CTL_RESERVED = ("DTE.IntCtl is reserved", EventCode.ILLEGAL_DEV_TABLE_ENTRY, 0, 1)
    INT_TAB_LEN = ("DTE.IntTabLen is above 11", EventCode.ILLEGAL_DEV_TABLE_ENTRY, 0, 0)
    BEYOND_INTERRUPT_TABLE = ("the interrupt table has no such entry", EventCode.IO_PAGE_FAULT, 0, 0)
    # The event of an unreadable IRTE is left open too; this is what the code is for.
    IRTE_UNREADABLE = ("the IRTE cannot be read", EventCode.PAGE_TAB_HARDWARE_ERROR, 0, 0)
    NOT_ENABLED = ("IRTE.RemapEn is 0", EventCode.IO_PAGE_FAULT, 0, 0)
    GUEST_MODE = ("IRTE.GuestMode is set without GAM", EventCode.IO_PAGE_FAULT, 1, 1)
    INT_TYPE = ("IRTE.IntType is reserved", EventCode.IO_PAGE_FAULT, 1, 1)
    IRTE_RESERVED = ("reserved bits are set in the IRTE", EventCode.IO_PAGE_FAULT, 1, 1)

    def __init__(self, text: str, code: EventCode | None, pr: int, rz: int) -> None:
        self.text = text
        self.code = code
        self.pr = pr
        self.rz = rz


class AmdviFault(Fault, frozen=True, kw_only=True):
    """A request which the unit target-aborted.

    ``address`` is what the event shows: the request's, or that of the table entry that could not be read.
    ``index`` is the IRTE's, None where the request did not get that far.
    """

    cause: Cause
    address: int
    domain: int = 0
    index: int | None = None

    @property
    def why(self) -> str:
        """The rule that blocked the interrupt."""
        where = "" if self.index is None else f", index {self.index:#x}"
        return f"{self.cause.text}{where}"

    def event(self) -> tuple[int, int] | None:
        """The event log entry, low and high quadword; None for an abort that hardware logs nothing of."""
        if self.cause.code is None:
            return None
        entry = Event(
            code=self.cause.code,
            rz=self.cause.rz,
            pr=self.cause.pr,
            i=1,
            domain=self.domain,
            device_id=self.requester,
            address=self.address,
        )
        raw = entry.encode()
        return raw & (1 << 64) - 1, raw >> 64

    def record(self) -> tuple[int, int] | None:
        """:meth:`event`."""
        return self.event()


class Registers(msgspec.Struct, frozen=True):
    """The unit's state that decides translations: bits of the Control register, and the device table."""

    iommu_en: bool = False
    ga_en: bool = False
    xt_en: bool = False
    large_tables: bool = False
    device_table: int = 0
    devices: int = 4096 // DTE_SIZE


def with_control(registers: Registers, value: int) -> Registers:
    """``registers`` after a write to the Control register."""
    control = Control.decode(value)
    return msgspec.structs.replace(
        registers,
        iommu_en=bool(control.iommu_en),
        ga_en=bool(control.ga_en),
        xt_en=bool(control.xt_en and control.ga_en),
        large_tables=control.num_int_remap_mode == 1,
    )


def with_device_table(registers: Registers, value: int) -> Registers:
    """``registers`` after a write to the Device Table Base Address register."""
    table = DeviceTableBase.decode(value)
    return msgspec.structs.replace(
        registers, device_table=table.base_51_12 << 12, devices=(table.size + 1) * 4096 // DTE_SIZE
    )


def remap(registers: Registers, request: Request, read: Callable[[int, int], bytes]) -> Message | Fault:
    """What the unit makes of ``request``. ``read(gpa, size)`` reads guest memory."""
    message, requester = request.message, request.requester
    if not registers.iommu_en:
        return unremapped(request)
    if not is_interrupt(message.address):
        return NotAnInterrupt(requester=requester, recorded=False, message=message)
    if requester >= registers.devices:
        return _aborted(request, Cause.BEYOND_DEVICE_TABLE)
    gpa = registers.device_table + requester * DTE_SIZE
    try:
        dte = _decode_dte(read(gpa, DTE_SIZE))
    except GuestMemoryError:
        return _aborted(request, Cause.DTE_UNREADABLE, address=gpa)
    # IV alone governs interrupts; V (bit 0) is about DMA.
    if dte is None:
        return message
    if isinstance(dte, Cause):
        return _aborted(request, dte)
    kind = message.data >> 8 & 7
    # With 2048-entry tables the type bits belong to the index, and software sets DM to say so (the only source is
    # drivers/iommu/amd/iommu.c:fill_msi_msg).
    if kind > 1 and not (registers.large_tables and message.address & 4):
        return message if _passes(dte, kind) else _aborted(request, Cause.TYPE_NOT_PASSED)
    match dte.int_ctl:
        case 0:
            return _aborted(request, Cause.INT_CTL_ABORT, dte)
        case 1:
            return message
        case 2:
            return _look_up(registers, request, dte, read)
        case _:
            return _aborted(request, Cause.INT_CTL_RESERVED)


def _passes(dte: Dte, kind: int) -> bool:
    match kind:
        case 2:  # SMI: no bit of the DTE holds these back
            return True
        case 4:
            return bool(dte.nmi_pass)
        case 5:
            return bool(dte.init_pass)
        case 7:
            return bool(dte.eint_pass)
        case _:
            return False


def _look_up(
    registers: Registers, request: Request, dte: Dte, read: Callable[[int, int], bytes]
) -> Message | AmdviFault:
    if dte.int_tab_len > 11:
        return _aborted(request, Cause.INT_TAB_LEN)
    index = request.message.data & 0x7FF
    if index >> dte.int_tab_len:
        return _aborted(request, Cause.BEYOND_INTERRUPT_TABLE, dte, index)
    size = 16 if registers.ga_en else 4
    gpa = (dte.int_table_root_51_6 << 6) + index * size
    try:
        entry = read(gpa, size)
    except GuestMemoryError:
        return _aborted(request, Cause.IRTE_UNREADABLE, dte, index, address=gpa)
    outcome = remap_entry(entry, registers.xt_en)
    if isinstance(outcome, Message):
        return outcome
    return _aborted(request, outcome, dte, index, suppressed=bool(entry[0] & 2))


def _aborted(
    request: Request,
    cause: Cause,
    dte: Dte | None = None,
    index: int | None = None,
    *,
    address: int | None = None,
    suppressed: bool = False,
) -> AmdviFault:
    # IG and SupIOPF are about page faults; errors in the tables themselves are always logged.
    quiet = cause.code == EventCode.IO_PAGE_FAULT and (suppressed or (dte is not None and bool(dte.ig)))
    return AmdviFault(
        requester=request.requester,
        recorded=cause.code is not None and not quiet,
        cause=cause,
        address=request.message.address if address is None else address,
        domain=dte.domain_id if dte else 0,
        index=index,
    )


# Both are remembered because a vector that is caught again and again mostly finds its entries as they were.


@functools.lru_cache(maxsize=4096)
def _decode_dte(entry: bytes) -> Dte | Cause | None:
    """The entry, None where it leaves interrupts alone."""
    raw = int.from_bytes(entry, "little")
    dte = Dte.decode(raw)
    if not dte.iv:
        return None
    # The lower half is DMA's: its errors are not errors of an interrupt.
    return Cause.DTE_RESERVED if raw & Dte.reserved else dte


@functools.lru_cache(maxsize=4096)
def remap_entry(entry: bytes, xt_en: bool) -> Message | Cause:
    """What an IRTE makes of a request: 4 bytes, or 16 with GAEn."""
    raw = int.from_bytes(entry, "little")
    irte = IrteGa.decode(raw) if len(entry) == 16 else Irte.decode(raw)
    # Guests mark free entries with anything and RemapEn=0: nothing else counts then.
    if not irte.remap_en:
        return Cause.NOT_ENABLED
    if irte.guest_mode:
        return Cause.GUEST_MODE
    if irte.int_type > 1:
        return Cause.INT_TYPE
    if raw & irte.reserved:
        return Cause.IRTE_RESERVED
    if isinstance(irte, Irte):
        destination = irte.destination
    elif xt_en:
        destination = irte.destination_31_24 << 24 | irte.destination_23_8 << 8 | irte.destination_7_0
    else:
        destination = irte.destination_7_0
    # RqEoi is HyperTransport's level interrupt. That it becomes the trigger mode is a reading, not the manual's word.
    return remapped(
        destination=destination,
        dm=irte.dm,
        rh=0,
        vector=irte.vector,
        delivery_mode=irte.int_type,
        tm=irte.rq_eoi,
    )


def device(requester: int) -> Scope:
    """The scope of one device: AMD-Vi invalidates a device's whole interrupt table."""
    checked_requester(requester)
    return Scope(requester, requester)


def invalidation_scope(low: int, high: int) -> Scope | None:
    """What a 128-bit command makes stale; None where it is not about interrupts.

    Raises :class:`~irqrouter.errors.SpecError` for reserved bits set (hardware: ILLEGAL_COMMAND_ERROR).
    """
    match low >> 60:
        case 2 | 5:  # INVALIDATE_DEVTAB_ENTRY, INVALIDATE_INTERRUPT_TABLE
            return device(DeviceCommand.decode(low | high << 64, strict=True).device_id)
        case 8:  # INVALIDATE_IOMMU_ALL
            return EVERYTHING
        case _:
            return None
