"""``irqrouter decode``: any interrupt word, explained field by field, and what it results in."""

import argparse
import sys
from collections.abc import Callable

import msgspec

from irqrouter.bits import FieldValue, Word
from irqrouter.errors import IrqrouterError, SpecError
from irqrouter.iommu import amdvi, vtd
from irqrouter.scope import Scope
from irqrouter.x86 import ioapic, msi
from irqrouter.x86.msi import CompatibilityAddress, CompatibilityData, Message, bdf
from irqrouter.xen_gsi import CallbackIrq, CallbackIrqIntx, decode_callback

_EXAMPLES = """\
words are hexadecimal, with or without 0x; 128-bit words are two, low quadword first

examples:
  irqrouter decode msi FEE000B8 0                                    a remappable MSI: which table entry it names
  irqrouter decode irte 0000030000410009 0000000000040018            a VT-d table entry and what it delivers
  irqrouter decode irte 0001234500520009 40300 --eime --requester 03:00.0
  irqrouter decode rte 002100000000A009                              an I/OAPIC pin
  irqrouter decode descriptor 0000004018000014                       a VT-d invalidation descriptor
  irqrouter decode dte 2000000012345013                              the interrupt half of an AMD-Vi device entry
  irqrouter decode amd-irte 12345601 0A00000000000042 --xt           a 128-bit AMD-Vi table entry
  irqrouter decode command 50000000000000A0                          an AMD-Vi command
  irqrouter decode callback 0200000000000093                         a Xen callback
"""


class Section(msgspec.Struct, frozen=True):
    """One word of the explanation."""

    title: str
    fields: list[FieldValue]


class Explanation(msgspec.Struct, frozen=True):
    """What the command prints: the words, and what they result in. ``--json`` prints it as it is."""

    sections: list[Section]
    result: list[str]


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add ``decode`` and its kinds of words to the command line."""
    parser = subparsers.add_parser(
        "decode",
        help="explain an MSI, a table entry, a redirection table entry, an invalidation or a callback",
        description="Explain a hardware word field by field, and say what it results in.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, explain: Callable[[argparse.Namespace], Explanation], about: str) -> argparse.ArgumentParser:
        added = kinds.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(explain=explain)
        return added

    added = kind("msi", _msi, "an MSI's address and data")
    added.add_argument("address", metavar="ADDRESS", help="the address, 64-bit if it has a high dword")
    added.add_argument("data", metavar="DATA")

    added = kind("irte", _irte, "a VT-d interrupt remapping table entry")
    _two_words(added)
    added.add_argument("--eime", action="store_true", help="the table is in x2APIC mode (IRTA.EIME)")
    added.add_argument("--requester", metavar="BB:DD.F", help="who asks; by default whom the entry accepts")

    added = kind("irta", _irta, "VT-d's Interrupt Remapping Table Address register")
    added.add_argument("value", metavar="VALUE")

    added = kind("descriptor", _descriptor, "a VT-d invalidation descriptor, 128 bits")
    _word_and_high(added)

    added = kind("frcd", _frcd, "a VT-d Fault Recording register of an interrupt-remapping fault")
    _two_words(added)

    added = kind("dte", _dte, "an AMD-Vi device table entry: its interrupt half (bits 191:128) or all of it")
    added.add_argument("words", metavar="WORD", nargs="+", help="one quadword, or four, lowest first")

    added = kind("amd-irte", _amd_irte, "an AMD-Vi interrupt remapping table entry, 32 or 128 bits")
    added.add_argument("low", metavar="LOW", help="the 32-bit entry, or the low quadword")
    added.add_argument("high", metavar="HIGH", nargs="?", help="the high quadword of a 128-bit entry")
    added.add_argument("--xt", action="store_true", help="32-bit destinations (Control.XTEn)")

    added = kind("command", _command, "an AMD-Vi command, 128 bits")
    _word_and_high(added)

    added = kind("event", _event, "an AMD-Vi event log entry of an interrupt")
    _two_words(added)

    added = kind("rte", _rte, "an I/OAPIC redirection table entry")
    added.add_argument("value", metavar="VALUE")

    added = kind("callback", _callback, "Xen's HVM_PARAM_CALLBACK_IRQ")
    added.add_argument("value", metavar="VALUE")
    added.add_argument("--gsis", metavar="N", default="24", help="how many GSIs the guest has (decimal, 24)")


def run(args: argparse.Namespace) -> int:
    """Print the explanation; 0, or 2 with one line on stderr for words that are none."""
    explain: Callable[[argparse.Namespace], Explanation] = args.explain
    try:
        explanation = explain(args)
    except IrqrouterError as error:
        print(f"irqrouter decode {args.kind}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(explanation)).decode())
    else:
        print(_plain(explanation))
    return 0


def _plain(explanation: Explanation) -> str:
    lines: list[str] = []
    for section in explanation.sections:
        lines.append(section.title)
        widest = max(len(field.name) for field in section.fields)
        lines.extend(
            f"  {field.bits:>7}  {field.name:<{widest}}  {field.value:>#10x}  {field.meaning}"
            for field in section.fields
        )
    lines.extend(f"=> {line}" for line in explanation.result)
    return "\n".join(lines)


def _two_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("low", metavar="LOW", help="bits 63:0")
    parser.add_argument("high", metavar="HIGH", help="bits 127:64")


def _word_and_high(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("low", metavar="LOW", help="bits 63:0")
    parser.add_argument("high", metavar="HIGH", nargs="?", default="0", help="bits 127:64 (0)")


def _number(name: str, text: str, width: int) -> int:
    try:
        value = int(text, 16)
    except ValueError:
        raise SpecError(f"{name} {text!r}", "is not a hexadecimal number") from None
    if value < 0 or value >> width:
        raise SpecError(f"{name} {text}", f"must fit {width} bits")
    return value


def _quadwords(args: argparse.Namespace) -> tuple[int, int]:
    return _number("LOW", args.low, 64), _number("HIGH", args.high, 64)


def _section(title: str, word: type[Word], raw: int) -> Section:
    return Section(f"{title} {raw:0{word.width // 4}X}", word.explain(raw))


def _delivery(message: Message) -> str:
    address = CompatibilityAddress.decode(message.address)
    data = CompatibilityData.decode(message.data)
    destination = address.destination_31_8 << 8 | address.destination
    return (
        f"{message.describe()}: vector {data.vector:#x} to APIC {destination:#x}"
        f" ({msi.DESTINATION_MODES[address.dm]}), {msi.DELIVERY_MODES[data.delivery_mode] or 'reserved mode'},"
        f" {msi.TRIGGER_MODES[data.tm]}"
    )


def _msi(args: argparse.Namespace) -> Explanation:
    message = Message(_number("ADDRESS", args.address, 64), _number("DATA", args.data, 32))
    if not msi.is_interrupt(message.address & 0xFFFFFFFF):
        fields = [_section("address", CompatibilityAddress, message.address)]
        return Explanation(fields, ["no interrupt: not addressed to FEEx_xxxxh"])
    if not message.address & 0x10:
        sections = [
            _section("address, compatibility format", CompatibilityAddress, message.address),
            _section("data", CompatibilityData, message.data),
        ]
        result = [f"without remapping: {_delivery(message)}"]
        extended = msi.with_extended_destination(message)
        if extended != message:
            result.append(f"with KVM_FEATURE_MSI_EXT_DEST_ID: {_delivery(extended)}")
        result.append("VT-d: passes with CFIS=1 and EIME=0, otherwise fault 25h")
        return Explanation(sections, [*result, _amd_index(message)])
    if message.address >> 32:
        raise SpecError(f"ADDRESS {args.address}", "a remappable request has no high dword")
    sections = [_section("address, remappable format", vtd.RemappableAddress, message.address)]
    if not message.address & 8:
        result = [f"VT-d: IRTE {vtd.interrupt_index(message):#x}; the data is ignored"]
    else:
        sections.append(_section("data", vtd.RemappableData, message.data))
        index = vtd.interrupt_index(message)
        if message.data >> 16:
            result = ["VT-d: fault 20h"]
        else:
            result = [f"VT-d: IRTE {index:#x}" if index < 1 << 16 else f"VT-d: index {index:#x}: fault 21h"]
    return Explanation(sections, [*result, _amd_index(message)])


def _amd_index(message: Message) -> str:
    kind, index = message.data >> 8 & 7, message.data & 0x7FF
    if kind <= 1:
        return f"AMD-Vi: index {index:#x} of the requester's table"
    name = msi.DELIVERY_MODES[kind] or f"reserved type {kind}"
    return f"AMD-Vi: {name}; with DM=1 and 2048-entry tables, index {index:#x} of the requester's table"


def _irte(args: argparse.Namespace) -> Explanation:
    low, high = _quadwords(args)
    raw = low | high << 64
    irte = vtd.Irte.decode(raw)
    word, title = (vtd.PostedIrte, "posted IRTE") if irte.im else (vtd.Irte, "remapped IRTE")
    # The start bus of a bus range is in the same bits as the bus of a requester id.
    requester = irte.sid if args.requester is None else _requester(args.requester)
    if args.requester is None and irte.svt == 2:
        requester &= 0xFF00
    outcome = vtd.remap_entry(raw.to_bytes(vtd.IRTE_SIZE, "little"), requester, args.eime)
    sections = [_section(title, word, raw)]
    mode = "EIME=1" if args.eime else "EIME=0"
    if isinstance(outcome, Message):
        return Explanation(sections, [f"{mode}, from {bdf(requester)}: {_delivery(outcome)}"])
    fault = vtd.VtdFault(requester=requester, recorded=not irte.fpd, reason=outcome, index=None)
    return Explanation(sections, [f"{mode}, from {fault.describe()}"])


def _requester(text: str) -> int:
    bus, _, rest = text.partition(":")
    device, _, function = rest.partition(".")
    try:
        parts = int(bus, 16), int(device, 16), int(function, 16)
    except ValueError:
        raise SpecError(f"requester {text!r}", "must be written bus:device.function, as 00:03.0") from None
    if not (0 <= parts[0] < 256 and 0 <= parts[1] < 32 and 0 <= parts[2] < 8):
        raise SpecError(f"requester {text!r}", "must lie within ff:1f.7")
    return parts[0] << 8 | parts[1] << 3 | parts[2]


def _irta(args: argparse.Namespace) -> Explanation:
    raw = _number("VALUE", args.value, 64)
    irta = vtd.Irta.decode(raw)
    mode = "x2APIC" if irta.eime else "xAPIC"
    result = f"{2 << irta.s} entries at {irta.base_63_12 << 12:#x}, {mode} mode"
    return Explanation([_section("IRTA", vtd.Irta, raw)], [result])


def _scope(scope: Scope | None) -> str:
    return "no interrupt translation becomes stale" if scope is None else f"makes stale: {scope.describe()}"


def _descriptor(args: argparse.Namespace) -> Explanation:
    low, high = _quadwords(args)
    raw = low | high << 64
    kind = (low >> 9 & 7) << 4 | low & 0xF
    match kind:
        case 4:
            section = _section("iec_inv_dsc", vtd.InterruptEntryCacheInvalidate, raw)
        case 5:
            section = _section("inv_wait_dsc", vtd.InvalidationWait, raw)
        case _:
            return Explanation([], [f"descriptor type {kind:#x}: not about interrupts"])
    try:
        return Explanation([section], [_scope(vtd.invalidation_scope(low, high))])
    except SpecError as error:
        return Explanation([section], [f"{error.rule}: FSTS.IQE"])


def _frcd(args: argparse.Namespace) -> Explanation:
    low, high = _quadwords(args)
    raw = low | high << 64
    frcd = vtd.Frcd.decode(raw)
    section = _section("FRCD", vtd.Frcd, raw)
    if not frcd.f:
        return Explanation([section], ["holds no record"])
    try:
        reason = vtd.FaultReason(frcd.fr)
    except ValueError:
        return Explanation([section], [f"{bdf(frcd.sid)}: {frcd.fr:x}h is no interrupt-remapping fault of ours"])
    fault = vtd.VtdFault(requester=frcd.sid, recorded=True, reason=reason, index=frcd.fi)
    return Explanation([section], [fault.describe()])


def _dte(args: argparse.Namespace) -> Explanation:
    words = [_number("WORD", text, 64) for text in args.words]
    if len(words) not in {1, 4}:
        raise SpecError("DTE", f"has one quadword (bits 191:128) or four here, not {len(words)}")
    raw = sum(word << 64 * at for at, word in enumerate(words)) if len(words) == 4 else words[0] << 128
    dte = amdvi.Dte.decode(raw)
    return Explanation([_section("DTE", amdvi.Dte, raw)], [_dte_result(raw, dte)])


def _dte_result(raw: int, dte: amdvi.Dte) -> str:
    if not dte.iv:
        return "interrupts pass unmapped"
    if raw & amdvi.Dte.reserved:
        return "interrupts are aborted: reserved bits are set"
    passed = [name for name, bit in (("NMI", dte.nmi_pass), ("INIT", dte.init_pass), ("ExtINT", dte.eint_pass)) if bit]
    others = f"; {', '.join(passed)} pass" if passed else ""
    match dte.int_ctl:
        case 0:
            return f"fixed interrupts are aborted{others}"
        case 1:
            return f"fixed interrupts pass unmapped{others}"
        case 2 if dte.int_tab_len > 11:
            return f"fixed interrupts are aborted: IntTabLen is above 11{others}"
        case 2:
            root = dte.int_table_root_51_6 << 6
            return f"fixed interrupts go through {1 << dte.int_tab_len} entries at {root:#x}{others}"
        case _:
            return f"fixed interrupts are aborted: IntCtl is reserved{others}"


def _amd_irte(args: argparse.Namespace) -> Explanation:
    word: type[Word]
    if args.high is None:
        raw, size, word = _number("LOW", args.low, 32), 4, amdvi.Irte
    else:
        low, high = _quadwords(args)
        raw, size = low | high << 64, 16
        word = amdvi.IrteGaGuest if low & 0x80 else amdvi.IrteGa
    outcome = amdvi.remap_entry(raw.to_bytes(size, "little"), args.xt)
    sections = [_section(f"{size * 8}-bit IRTE", word, raw)]
    if isinstance(outcome, Message):
        return Explanation(sections, [_delivery(outcome)])
    logged = "" if not raw & 2 else " (SupIOPF: not logged)"
    return Explanation(sections, [f"aborted: {outcome.text}{logged}"])


def _command(args: argparse.Namespace) -> Explanation:
    low, high = _quadwords(args)
    opcode = low >> 60
    word: type[Word] = amdvi.CompletionWait if opcode == 1 else amdvi.DeviceCommand
    if opcode not in {1, 2, 5, 8}:
        return Explanation([], [f"command {opcode:#x}: not about interrupts"])
    section = _section("command", word, low | high << 64)
    try:
        return Explanation([section], [_scope(amdvi.invalidation_scope(low, high))])
    except SpecError as error:
        return Explanation([section], [f"{error.rule}: ILLEGAL_COMMAND_ERROR"])


def _event(args: argparse.Namespace) -> Explanation:
    low, high = _quadwords(args)
    raw = low | high << 64
    event = amdvi.Event.decode(raw)
    what = "interrupt request" if event.i else "DMA"
    return Explanation(
        [_section("event", amdvi.Event, raw)], [f"{what} of {bdf(event.device_id)} at {event.address:#x}"]
    )


def _rte(args: argparse.Namespace) -> Explanation:
    raw = _number("VALUE", args.value, 64)
    message = ioapic.message(raw)
    sends = "masked; unmasked it would send" if raw & 1 << 16 else "sends"
    word: type[Word]
    if raw & 1 << 48:
        word, then = ioapic.RemappableRte, f"VT-d: IRTE {vtd.interrupt_index(message):#x}"
    else:
        word, then = ioapic.Rte, f"without remapping: {_delivery(message)}"
    return Explanation([_section("RTE", word, raw)], [f"{sends} {message.describe()}", then, _amd_index(message)])


def _callback(args: argparse.Namespace) -> Explanation:
    raw = _number("VALUE", args.value, 64)
    if not args.gsis.isdecimal():
        raise SpecError(f"--gsis {args.gsis!r}", "must be a decimal number")
    word = CallbackIrqIntx if raw >> 56 == 1 else CallbackIrq
    result = decode_callback(raw, gsis=int(args.gsis)).describe()
    return Explanation([_section("HVM_PARAM_CALLBACK_IRQ", word, raw)], [result])
