import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irqrouter.errors import SpecError
from irqrouter.iommu import vtd
from irqrouter.iommu.fault import Fault, NotAnInterrupt
from irqrouter.iommu.vtd import FaultReason, Irte, VtdFault
from irqrouter.iommu_remap import VtdRemapper
from irqrouter.scope import EVERYTHING, UNINDEXED, Scope
from irqrouter.x86.msi import Message, Request
from tests.iommu.guest import MEMORY_SIZE, Guest, guest

TABLE = 0x4000
#: The requester of the golden words.
RID = 0x0018
#: The message of most golden words: SHV=1, index 5.
MSI = Message(0xFEE000B8, 0)
#: Golden word 1: vector 41h to APIC 3, xAPIC.
LOW, HIGH = 0x0000_0300_0041_0009, 0x0000_0000_0004_0018


def unit(guest: Guest, *, size: int = 0xF, eime: bool = False, base: int = TABLE) -> VtdRemapper:
    remapper = VtdRemapper(guest.memory)
    remapper.set_interrupt_remap_table(base | eime << 11 | size)
    remapper.set_remapping(True)
    return remapper


def write_irte(guest: Guest, index: int, low: int, high: int) -> None:
    guest.write(TABLE + 16 * index, low | high << 64, 16)


def fault(outcome: Message | Fault) -> VtdFault:
    assert isinstance(outcome, VtdFault), outcome
    return outcome


@pytest.mark.parametrize(
    ("low", "high", "eime", "rid", "expected"),
    [
        pytest.param(LOW, HIGH, False, RID, (0xFEE03008, 0x4041), id="1-xapic"),
        pytest.param(0x0000000300410009, HIGH, True, RID, (0xFEE03008, 0x4041), id="2-x2apic"),
        pytest.param(0x0001234500520009, 0x40300, True, 0x300, (0x00012300_FEE45008, 0x4052), id="3-id-above-8-bits"),
        pytest.param(LOW, HIGH, True, RID, (0x00000300_FEE00008, 0x4041), id="4-word-1-read-as-x2apic"),
        pytest.param(0x000100020031000D, 0x400A8, True, 0xA8, (0x00010000_FEE0200C, 0x4031), id="6-cluster-logical"),
        pytest.param(0x0000010000000081, HIGH, False, RID, (0xFEE01000, 0x4400), id="7-nmi"),
        pytest.param(0x0000FF000077002D, HIGH, False, RID, (0xFEEFF00C, 0x4177), id="8-lowest-priority"),
        pytest.param(0x0000050000610011, 0x4FF00, False, 0xFF00, (0xFEE05000, 0xC061), id="9-level-from-the-ioapic"),
        pytest.param(0x0000000000EE0003, HIGH, False, RID, (0xFEE00000, 0x40EE), id="10-fpd"),
        pytest.param(0x0000010000320009, 0x7F0F8, False, 0xF0F8, (0xFEE01008, 0x4032), id="11-sq3-first"),
        pytest.param(0x0000010000320009, 0x7F0F8, False, 0xF0FF, (0xFEE01008, 0x4032), id="11-sq3-last"),
        pytest.param(0x0000020000600009, 0x80204, False, 0x310, (0xFEE02008, 0x4060), id="12-bus-range"),
    ],
)
def test_golden_irte_delivers(low: int, high: int, eime: bool, rid: int, expected: tuple[int, int]) -> None:
    with guest() as g:
        write_irte(g, 5, low, high)
        assert unit(g, eime=eime).translate(Request(MSI, rid)) == Message(*expected)


@pytest.mark.parametrize(
    ("low", "high", "eime", "rid", "reason"),
    [
        pytest.param(0x0000000300410009, HIGH, False, RID, 0x24, id="5-dst-reserved-in-xapic"),
        pytest.param(0x0000010000320009, 0x7F0F8, False, 0xF0F7, 0x26, id="11-sq3-below"),
        pytest.param(0x0000020000600009, 0x80204, False, 0x510, 0x26, id="12-bus-above"),
        pytest.param(0x0000030000411009, HIGH, False, RID, 0x24, id="13-bit-12"),
        pytest.param(0x2345678000418001, 0x0000000100040018, True, RID, 0x24, id="14-posted"),
        pytest.param(0x0000004000F2C001, HIGH, True, RID, 0x24, id="15-posted-urgent"),
        pytest.param(LOW, HIGH, False, 0x300, 0x26, id="24-other-requester"),
    ],
)
def test_golden_irte_faults_and_is_recorded(low: int, high: int, eime: bool, rid: int, reason: int) -> None:
    with guest() as g:
        write_irte(g, 5, low, high)
        expected = VtdFault(requester=rid, recorded=True, reason=FaultReason(reason), index=5)
        assert unit(g, eime=eime).translate(Request(MSI, rid)) == expected


def test_golden_16_entry_not_present_faults_22h_and_fills_frcd() -> None:
    with guest() as g:
        found = fault(unit(g).translate(Request(Message(0xFEE24698, 0), RID)))
    assert (found.reason, found.index, found.recorded) == (FaultReason.NOT_PRESENT, 0x1234, True)
    assert found.frcd() == (0x1234000000000000, 0x8000002200000018)


def test_golden_17_fpd_in_an_absent_entry_blocks_without_a_record() -> None:
    with guest() as g:
        write_irte(g, 5, 2, 0)
        found = fault(unit(g).translate(Request(MSI, RID)))
    assert (found.reason, found.recorded) == (FaultReason.NOT_PRESENT, False)


@pytest.mark.parametrize(
    ("address", "data", "index"),
    [
        pytest.param(0xFEE00818, 2, 0x42, id="18-subhandle"),
        pytest.param(0xFEE0003C, 0, 0x8001, id="19-handle-bit-15"),
        pytest.param(0xFEEFFFF4, 0xDEADBEEF, 0xFFFF, id="20-no-subhandle-data-ignored"),
        pytest.param(0xFEE00050, 2, 2, id="37-ioapic"),
        pytest.param(0xFEE00210, 0x8009, 0x10, id="38-ioapic-level"),
        pytest.param(0xFEE00074, 0x8015, 0x8003, id="39-ioapic-index-bit-15"),
    ],
)
def test_golden_request_uses_the_index_and_carries_it_as_cookie(address: int, data: int, index: int) -> None:
    with guest() as g:
        remapper = unit(g, base=0)
        g.write(16 * index, LOW, 16)
        request = Request(Message(address, data), RID)
        assert remapper.translate(request) == Message(0xFEE03008, 0x4041)
        assert remapper.cookie(request) == index


def test_golden_21_index_sum_above_16_bits_faults_and_does_not_wrap() -> None:
    with guest() as g:
        write_irte(g, 0, LOW, HIGH)
        request = Request(Message(0xFEEFFFFC, 1), RID)
        found = fault(unit(g).translate(request))
        assert (found.reason, found.index) == (FaultReason.INDEX_TOO_HIGH, 0x10000)
        assert unit(g).cookie(request) == UNINDEXED


# What FI holds for 20h and 25h is left open by the manual: only the high quadword is compared.
def test_golden_22_reserved_data_with_a_subhandle_faults_20h() -> None:
    with guest() as g:
        found = fault(unit(g).translate(Request(Message(0xFEE000B8, 0x10000), RID)))
    assert found.reason == FaultReason.RESERVED_IN_REQUEST
    assert found.frcd()[1] == 0x8000002000000018


def test_golden_23_index_beyond_the_table_faults_21h() -> None:
    with guest() as g:
        found = fault(unit(g, size=7).translate(Request(Message(0xFEE02018, 0), RID)))
    assert found.frcd() == (0x0100000000000000, 0x8000002100000018)


def test_golden_24_rejected_source_fills_frcd() -> None:
    with guest() as g:
        write_irte(g, 5, LOW, HIGH)
        found = fault(unit(g).translate(Request(MSI, 0x300)))
    assert found.frcd() == (0x0005000000000000, 0x8000002600000300)


@pytest.mark.parametrize(
    ("ires", "cfis", "eime", "passes"),
    [
        pytest.param(True, False, False, False, id="25-blocked"),
        pytest.param(True, True, False, True, id="26-cfis"),
        pytest.param(True, True, True, False, id="27-eime-wins"),
        pytest.param(False, False, False, True, id="28-remapping-off"),
        pytest.param(False, False, True, True, id="28-remapping-off-x2apic"),
    ],
)
def test_golden_compatibility_request(ires: bool, cfis: bool, eime: bool, passes: bool) -> None:
    message = Message(0xFEE03000, 0x41)
    with guest() as g:
        remapper = unit(g, eime=eime)
        remapper.set_remapping(ires)
        remapper.set_compatibility_format(cfis)
        outcome = remapper.translate(Request(message, RID))
    if passes:
        assert outcome == message
    else:
        found = fault(outcome)
        assert (found.reason, found.index) == (FaultReason.COMPATIBILITY_BLOCKED, None)
        assert found.frcd()[1] == 0x8000002500000018


def test_golden_29_no_subhandle_no_validation_delivers() -> None:
    with guest() as g:
        write_irte(g, 0, 0x0000030000420001, 0)
        assert unit(g).translate(Request(Message(0xFEE00010, 0), RID)) == Message(0xFEE03000, 0x4042)


@pytest.mark.parametrize("eime", [False, True])
def test_golden_31_irta_is_decoded(eime: bool) -> None:
    registers = vtd.latch(vtd.Registers(), 0x1000000F | eime << 11, 52)
    assert registers == vtd.Registers(base=0x10000000, entries=65536, eime=eime)


@pytest.mark.parametrize(
    ("low", "scope"),
    [
        pytest.param(0x0000000000000004, EVERYTHING, id="32-global"),
        pytest.param(0x0000123400000014, Scope(0x1234, 0x1234), id="33-one"),
        pytest.param(0x0000004018000014, Scope(0x40, 0x47), id="34-eight"),
        pytest.param(0x0000FFFF80000014, Scope(0, 0xFFFF), id="16-bits-of-mask"),
        pytest.param(0x00001234F8000014, Scope(0, 0xFFFF), id="31-bits-of-mask"),
        pytest.param(0x0000000200000025, None, id="35-wait"),
        pytest.param(0x0000000000000001, None, id="context-cache"),
        pytest.param(0x0000000000000204, None, id="type-14h"),
    ],
)
def test_golden_descriptor_gives_its_scope(low: int, scope: Scope | None) -> None:
    with guest() as g:
        assert unit(g).descriptor(low, 0) == scope


@pytest.mark.parametrize("bit", [5, 8, 12, 26, 48, 63, 64, 127])
def test_descriptor_with_a_reserved_bit_raises(bit: int) -> None:
    raw = 4 | 1 << bit
    with pytest.raises(SpecError, match="reserved bits"):
        vtd.invalidation_scope(raw & (1 << 64) - 1, raw >> 64)


def test_golden_35_wait_descriptor_fields() -> None:
    wait = vtd.InvalidationWait.decode(0x0000000200000025 | 0x12345678 << 64)
    expected = vtd.InvalidationWait(status_address_63_2=0x12345678 >> 2, status_data=2, sw=1)
    assert wait == expected


SEVERAL = Irte(p=0, dlm=4, svt=1, sid=0x1234).encode() | 1 << 12


@pytest.mark.parametrize(
    ("message", "raw", "readable", "reason"),
    [
        # Each request breaks the rule it faults with and every later one.
        pytest.param(Message(0xFEEFFFEC, 0x10000), SEVERAL, False, 0x25, id="25h-before-20h"),
        pytest.param(Message(0xFEEFFFFC, 0x10001), SEVERAL, False, 0x20, id="20h-before-21h"),
        pytest.param(Message(0xFEEFFFFC, 0x0001), SEVERAL, False, 0x21, id="21h-before-23h"),
        pytest.param(MSI, SEVERAL, False, 0x23, id="23h"),
        pytest.param(MSI, SEVERAL, True, 0x22, id="22h-before-24h"),
        pytest.param(MSI, SEVERAL | 1, True, 0x24, id="24h-before-26h"),
        pytest.param(MSI, (SEVERAL | 1) & ~(1 << 12), True, 0x26, id="26h"),
    ],
)
def test_faults_come_in_the_manuals_order(message: Message, raw: int, readable: bool, reason: int) -> None:
    with guest() as g:
        write_irte(g, 5, raw & (1 << 64) - 1, raw >> 64)
        remapper = unit(g) if readable else unit(g, base=MEMORY_SIZE)
        assert fault(remapper.translate(Request(message, RID))).reason == FaultReason(reason)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [(0, 0x22), (1 | 1 << 12, 0x24), (Irte(p=1, svt=1, sid=0x1234).encode(), 0x26)],
)
@pytest.mark.parametrize("fpd", [0, 1])
def test_fpd_keeps_qualified_faults_unrecorded(raw: int, reason: int, fpd: int) -> None:
    with guest() as g:
        g.write(TABLE + 5 * 16, raw | fpd << 1, 16)
        found = fault(unit(g).translate(Request(MSI, RID)))
    assert (found.reason, found.recorded) == (FaultReason(reason), not fpd)


def test_fpd_does_not_touch_faults_before_the_entry_is_read() -> None:
    with guest() as g:
        g.write(TABLE + 5 * 16, 2, 16)
        for message in (Message(0xFEE03000, 0x41), Message(0xFEE000B8, 0x10000)):
            assert fault(unit(g).translate(Request(message, RID))).recorded


@pytest.mark.parametrize("eime", [False, True])
@pytest.mark.parametrize("bit", range(128))
def test_exactly_the_reserved_bits_of_an_irte_fault_24h(bit: int, eime: bool) -> None:
    masks = {False: 0xFFFF00FF_FF007000, True: 0x00000000_FF007000}
    reserved = masks[eime] | 0xFFFFFFFF_FFF00000 << 64 | 1 << 15
    with guest() as g:
        g.write(TABLE + 5 * 16, 1 | 1 << bit, 16)
        outcome = unit(g, eime=eime).translate(Request(MSI, RID))
    is_reserved = isinstance(outcome, VtdFault) and outcome.reason == FaultReason.RESERVED_IN_IRTE
    assert is_reserved == bool(reserved >> bit & 1)


def test_same_entry_follows_the_mode_that_sirtp_latched() -> None:
    with guest() as g:
        write_irte(g, 5, LOW, HIGH)
        remapper = unit(g)
        for eime, address in [(0, 0xFEE03008), (1, 0x00000300_FEE00008), (0, 0xFEE03008)]:
            remapper.set_interrupt_remap_table(TABLE | eime << 11 | 0xF)
            assert remapper.translate(Request(MSI, RID)) == Message(address, 0x4041)


def test_vector_of_the_rte_need_not_be_the_irtes() -> None:
    with guest() as g:
        write_irte(g, 0x10, LOW, HIGH)
        request = Request(Message(0xFEE00210, 0x8009), RID)
        assert unit(g).translate(request) == Message(0xFEE03008, 0x4041)


def accepts(svt: int, sq: int, sid: int, requester: int) -> bool:
    """Source validation, spelt out bit by bit."""
    if svt == 0:
        return True
    if svt == 1:
        ignored: set[int] = [set(), {2}, {1, 2}, {0, 1, 2}][sq]
        return all(sid >> bit & 1 == requester >> bit & 1 for bit in range(16) if bit not in ignored)
    if svt == 2:
        return requester // 256 in range(sid // 256, sid % 256 + 1)
    return False


@pytest.mark.parametrize("svt", range(4))
@pytest.mark.parametrize("sq", range(4))
@pytest.mark.parametrize("sid", [0x0018, 0x0204, 0x0402, 0xF0FF])
def test_source_validation_agrees_with_the_oracle(svt: int, sq: int, sid: int) -> None:
    irte = Irte(p=1, svt=svt, sq=sq, sid=sid)
    near = {sid ^ flip for flip in range(64)} | {bus << 8 | 0x18 for bus in range(256)}
    for requester in near | set(range(0, 1 << 16, 37)):
        assert vtd.source_accepted(irte, requester) == accepts(svt, sq, sid, requester), hex(requester)


# Which code a reserved SVT faults with is left open: only that it blocks.
def test_reserved_source_validation_type_blocks() -> None:
    with guest() as g:
        g.write(TABLE + 5 * 16, Irte(p=1, svt=3, sid=RID).encode(), 16)
        assert isinstance(unit(g).translate(Request(MSI, RID)), VtdFault)


@pytest.mark.parametrize("address", [0, 0xFED000B8, 0xFEF000B8, 0x1_FEE000B8, 0xFFFFFFFF_FEE000B8])
def test_write_elsewhere_is_no_interrupt_and_not_recorded(address: int) -> None:
    message = Message(address, 0)
    with guest() as g:
        remapper = unit(g)
        expected = NotAnInterrupt(requester=RID, recorded=False, message=message)
        assert remapper.translate(Request(message, RID)) == expected
        assert remapper.cookie(Request(message, RID)) == UNINDEXED


@pytest.mark.parametrize("base", [1 << 52, (1 << 64) - 4096])
def test_table_beyond_the_host_address_width_faults_21h(base: int) -> None:
    with guest() as g:
        assert fault(unit(g, base=base).translate(Request(MSI, RID))).reason == FaultReason.INDEX_TOO_HIGH


def test_table_reaching_beyond_the_host_address_width_is_cut_there() -> None:
    with guest() as g:
        remapper = unit(g, base=(1 << 52) - 4096)
        inside, outside = (Request(Message(0xFEE00010 | index << 5, 0), RID) for index in (255, 256))
        assert fault(remapper.translate(inside)).reason == FaultReason.TABLE_UNREADABLE
        assert fault(remapper.translate(outside)).reason == FaultReason.INDEX_TOO_HIGH


def test_memory_that_shrinks_under_the_table_faults_23h_and_comes_back() -> None:
    with guest() as g:
        write_irte(g, 5, LOW, HIGH)
        remapper = unit(g)
        request = Request(MSI, RID)
        assert remapper.translate(request) == Message(0xFEE03008, 0x4041)
        for size in (TABLE + 5 * 16 + 15, TABLE, 0):
            g.shrink(size)
            assert fault(remapper.translate(request)).reason == FaultReason.TABLE_UNREADABLE
        g.shrink(MEMORY_SIZE)
        write_irte(g, 5, LOW, HIGH)
        assert remapper.translate(request) == Message(0xFEE03008, 0x4041)


words64 = st.integers(0, (1 << 64) - 1)
requesters = st.integers(0, 0xFFFF)
messages = st.builds(
    Message,
    st.one_of(words64, st.integers(0xFEE00000, 0xFEEFFFFF), st.integers(0, 0x3FF).map(lambda n: 0xFEE00018 | n << 5)),
    st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFF)),
)


def check(outcome: Message | Fault) -> None:
    """What every outcome must be, whatever led to it."""
    if isinstance(outcome, Message):
        assert outcome.address & 0xFF_FFF00000 == 0xFEE00000
        assert outcome.data >> 16 == 0
    elif isinstance(outcome, VtdFault):
        low, high = outcome.frcd()
        assert (low & (1 << 48) - 1, high >> 63) == (0, 1)
    else:
        assert isinstance(outcome, NotAnInterrupt)
        assert not outcome.recorded
    assert outcome.describe()


@settings(max_examples=300)
@given(irta=words64, table=st.binary(min_size=64, max_size=256), message=messages, requester=requesters, data=st.data())
def test_hostile_table_never_raises(
    irta: int, table: bytes, message: Message, requester: int, data: st.DataObject
) -> None:
    with guest() as g:
        remapper = VtdRemapper(g.memory)
        base = data.draw(st.sampled_from([irta >> 12, 0, TABLE >> 12, (MEMORY_SIZE >> 12) - 1, (1 << 40) - 1]))
        g.write_bytes(MEMORY_SIZE - len(table), table)
        g.write_bytes(TABLE, table)
        remapper.set_interrupt_remap_table(base << 12 | irta & 0xFFF)
        remapper.set_remapping(True)
        request = Request(message, requester)
        check(remapper.translate(request))
        assert 0 <= remapper.cookie(request) <= UNINDEXED
        g.shrink(data.draw(st.integers(0, MEMORY_SIZE)))
        check(remapper.translate(request))


@given(fields=st.fixed_dictionaries({name: st.booleans() for name in ("p", "fpd", "tm", "rh", "dm")}), raw=st.data())
def test_valid_irte_delivers_its_fields(fields: dict[str, bool], raw: st.DataObject) -> None:
    eime = raw.draw(st.booleans())
    destination = raw.draw(st.integers(0, 0xFFFFFFFF if eime else 0xFF))
    vector, mode = raw.draw(st.integers(0, 255)), raw.draw(st.sampled_from([0, 1, 2, 4, 5, 7]))
    irte = Irte(
        p=1,
        tm=fields["tm"],
        rh=fields["rh"],
        dm=fields["dm"],
        fpd=fields["fpd"],
        dlm=mode,
        v=vector,
        dst=destination if eime else destination << 8,
    )
    address = 0xFEE << 20 | (destination & 0xFF) << 12 | fields["rh"] << 3 | fields["dm"] << 2
    expected = Message((destination & 0xFFFFFF00) << 32 | address, fields["tm"] << 15 | 1 << 14 | mode << 8 | vector)
    assert vtd.remap_entry(irte.encode().to_bytes(16, "little"), RID, eime) == expected


def test_torn_entry_gives_an_outcome_of_either_half_and_never_raises() -> None:
    old = (LOW, 0x40300)
    new = (0x0000050000420009, HIGH)
    for low in (old[0], new[0]):
        for high in (old[1], new[1]):
            for eime in (False, True):
                with guest() as g:
                    write_irte(g, 5, low, high)
                    outcome = unit(g, eime=eime).translate(Request(MSI, RID))
                check(outcome)
                if isinstance(outcome, Message):
                    assert outcome.data & 0xFF == low >> 16 & 0xFF
                else:
                    assert high == old[1]


@given(message=messages, requester=requesters)
def test_cookie_is_the_index_that_translate_uses(message: Message, requester: int) -> None:
    request = Request(message, requester)
    with guest() as g:
        remapper = unit(g)
        outcome, cookie = remapper.translate(request), remapper.cookie(request)
    index = outcome.index if isinstance(outcome, VtdFault) else None
    assert cookie == (UNINDEXED if index is None else min(index, UNINDEXED))


@given(index=st.integers(0, 0xFFFF), mask=st.integers(0, 31))
def test_entries_cover_the_index_and_a_power_of_two(index: int, mask: int) -> None:
    scope = vtd.entries(index, mask)
    assert index in scope
    assert scope.last - scope.first + 1 == min(1 << mask, 1 << 16)
    assert UNINDEXED not in scope


@pytest.mark.parametrize(("index", "mask"), [(-1, 0), (1 << 16, 0), (0, -1), (0, 32)])
def test_entries_out_of_range_raise(index: int, mask: int) -> None:
    with pytest.raises(SpecError):
        vtd.entries(index, mask)
