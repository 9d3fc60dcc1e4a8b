import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irqrouter.errors import SpecError
from irqrouter.iommu import amdvi
from irqrouter.iommu.amdvi import AmdviFault, Cause, CompletionWait, Dte, Event
from irqrouter.iommu.fault import Fault, NotAnInterrupt
from irqrouter.iommu_remap import AmdviRemapper
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.x86.msi import Message, Request
from tests.iommu.guest import MEMORY_SIZE, Guest, guest

DEVICES = 0x2000
#: Where the golden words' interrupt table (12345000h there) lies in the tests' memory.
ROOT = 0x45000
#: The requester of the golden words.
RID = 0x0018
MSI = Message(0xFEE00000, 5)

ENABLE, GA, XT, LARGE = 1, 1 << 17, 1 << 50, 1 << 43

#: Golden DTE 40: IV, 512 entries, remap.
DTE_40 = 0x2000000000000013 | ROOT
#: Golden DTE 42: and INIT, ExtINT, NMI, LINT0, LINT1 pass.
DTE_42 = 0xE700000000000013 | ROOT
IG = 1 << 5


def unit(guest: Guest, control: int = 0, *, dte: int = DTE_40, domain: int = 0) -> AmdviRemapper:
    remapper = AmdviRemapper(guest.memory)
    remapper.set_device_table(DEVICES)
    remapper.set_control(ENABLE | control)
    guest.write(DEVICES + RID * 32, domain << 64 | dte << 128, 32)
    return remapper


def fault(outcome: Message | Fault) -> AmdviFault:
    assert isinstance(outcome, AmdviFault), outcome
    return outcome


def cause(outcome: Message | Fault) -> Cause:
    return fault(outcome).cause


@pytest.mark.parametrize(
    ("half", "length", "passes"),
    [
        pytest.param(0x2000000012345013, 9, (0, 0, 0, 0, 0), id="40"),
        pytest.param(0x2000000012345017, 11, (0, 0, 0, 0, 0), id="41"),
        pytest.param(0xE700000012345013, 9, (1, 1, 1, 1, 1), id="42"),
    ],
)
def test_golden_dte_is_decoded(half: int, length: int, passes: tuple[int, ...]) -> None:
    dte = Dte.decode(half << 128, strict=True)
    found = (dte.init_pass, dte.eint_pass, dte.nmi_pass, dte.lint0_pass, dte.lint1_pass)
    assert (dte.iv, dte.int_ctl, dte.int_tab_len, dte.int_table_root_51_6 << 6) == (1, 2, length, 0x12345000)
    assert found == passes


# The event of IntCtl=00 is left open: only that it blocks.
def test_golden_43_valid_dte_without_a_table_aborts() -> None:
    with guest() as g:
        assert cause(unit(g, dte=1).translate(Request(MSI, RID))) == Cause.INT_CTL_ABORT


@pytest.mark.parametrize(
    ("irte", "expected"),
    [
        pytest.param(0x00410301, (0xFEE03000, 0x4041), id="44"),
        pytest.param(0x00410345, (0xFEE03004, 0x4141), id="45-arbitrated-logical"),
    ],
)
def test_golden_32_bit_irte_delivers(irte: int, expected: tuple[int, int]) -> None:
    with guest() as g:
        g.write(ROOT + 5 * 4, irte, 4)
        assert unit(g).translate(Request(MSI, RID)) == Message(*expected)


@pytest.mark.parametrize(
    ("control", "low", "high", "expected"),
    [
        pytest.param(GA, 0x301, 0x41, (0xFEE03000, 0x4041), id="49"),
        pytest.param(
            GA | XT, 0x12345601, 0x0A00000000000042, (0x0A123400_FEE56000, 0x4042), id="50-32-bit-destination"
        ),
        pytest.param(GA, 0x12345 << 8 | 0x41, 0x41, (0xFEE45004, 0x4041), id="51-8-bit-destination"),
    ],
)
def test_golden_128_bit_irte_delivers(control: int, low: int, high: int, expected: tuple[int, int]) -> None:
    with guest() as g:
        g.write(ROOT + 5 * 16, low | high << 64, 16)
        assert unit(g, control).translate(Request(MSI, RID)) == Message(*expected)


def test_xten_without_gaen_changes_nothing() -> None:
    with guest() as g:
        g.write(ROOT + 5 * 4, 0x00410301, 4)
        assert unit(g, XT).translate(Request(MSI, RID)) == Message(0xFEE03000, 0x4041)


@pytest.mark.parametrize(
    ("irte", "expected", "event"),
    [
        pytest.param(0xFFFFFFFE, Cause.NOT_ENABLED, None, id="46-marker-of-a-free-entry"),
        pytest.param(0x00410311, Cause.INT_TYPE, (0x2098000000000018, 0xFEE00000), id="47"),
        pytest.param(0x00000000, Cause.NOT_ENABLED, (0x2008000000000018, 0xFEE00000), id="48"),
    ],
)
def test_golden_32_bit_irte_aborts(irte: int, expected: Cause, event: tuple[int, int] | None) -> None:
    message = Message(0xFEE00000, 5)
    with guest() as g:
        g.write(ROOT + 5 * 4, irte, 4)
        found = fault(unit(g).translate(Request(message, RID)))
    assert (found.cause, found.recorded) == (expected, event is not None)
    if event:
        assert found.event() == event


@pytest.mark.parametrize("control", [GA, GA | XT, GA | XT | 1 << 25])
def test_golden_52_guest_mode_entry_is_a_reserved_bit_without_gam(control: int) -> None:
    with guest() as g:
        g.write(ROOT + 5 * 16, 0x00001234000005C5 | 0x0000000012345041 << 64, 16)
        found = fault(unit(g, control).translate(Request(MSI, RID)))
    assert (found.cause, found.recorded) == (Cause.GUEST_MODE, True)
    assert found.event() == (0x2098000000000018, 0xFEE00000)


@pytest.mark.parametrize(
    ("kind", "with_none", "with_all"),
    [(2, True, True), (3, False, False), (4, False, True), (5, False, True), (6, False, False), (7, False, True)],
)
def test_golden_53_54_other_types_pass_by_the_bits_of_the_dte(kind: int, with_none: bool, with_all: bool) -> None:
    message = Message(0xFEE00000, kind << 8)
    with guest() as g:
        for dte, passes in ((DTE_40, with_none), (DTE_42, with_all)):
            outcome = unit(g, dte=dte).translate(Request(message, RID))
            if passes:
                assert outcome == message
            else:
                found = fault(outcome)
                assert (found.cause, found.recorded, found.event()) == (Cause.TYPE_NOT_PASSED, False, None)


@pytest.mark.parametrize("bit", [56, 57, 58])
def test_each_pass_bit_passes_its_own_type_only(bit: int) -> None:
    kinds = {56: 5, 57: 7, 58: 4}
    with guest() as g:
        remapper = unit(g, dte=DTE_40 | 1 << bit)
        passed = [
            kind
            for kind in range(2, 8)
            if remapper.translate(Request(Message(0xFEE00000, kind << 8), RID)) == Message(0xFEE00000, kind << 8)
        ]
    assert passed == sorted({2, kinds[bit]})


# That DM=1 marks an index in 2048-entry mode has one source, so only indices that any rule gives are compared.
def test_index_with_one_type_bit_is_found_in_either_table_size() -> None:
    with guest() as g:
        g.write(ROOT + 0x105 * 4, 0x00410301, 4)
        for control, dte in ((0, DTE_40), (LARGE, 0x2000000000000017 | ROOT)):
            outcome = unit(g, control, dte=dte).translate(Request(Message(0xFEE00000, 0x105), RID))
            assert outcome == Message(0xFEE03000, 0x4041)


@pytest.mark.parametrize("length", range(16))
def test_int_tab_len_bounds_the_index(length: int) -> None:
    dte = DTE_40 & ~0x1E | length << 1
    with guest() as g:
        g.write_bytes(ROOT, (0x00410301).to_bytes(4, "little") * 512)
        remapper = unit(g, dte=dte)
        for index in (0, 1, 2, 5, 255, 256, 511):
            outcome = remapper.translate(Request(Message(0xFEE00000, index), RID))
            if length > 11:
                assert cause(outcome) == Cause.INT_TAB_LEN
                assert fault(outcome).event() == (0x1008000000000018, 0xFEE00000)
            elif index < 1 << length:
                assert outcome == Message(0xFEE03000, 0x4041)
            else:
                assert cause(outcome) == Cause.BEYOND_INTERRUPT_TABLE
                assert fault(outcome).event() == (0x2008000000000018, 0xFEE00000)


@pytest.mark.parametrize(
    ("low", "high", "scope"),
    [
        pytest.param(0x50000000000000A0, 0, Scope(0xA0, 0xA0), id="56-interrupt-table"),
        pytest.param(0x20000000000000A0, 0, Scope(0xA0, 0xA0), id="device-entry"),
        pytest.param(0x8000000000000000, 0, EVERYTHING, id="all"),
        pytest.param(0x1000000000001001, 0x1234, None, id="57-completion-wait"),
        pytest.param(0x3000000000000000, 0x7FFFFFFFFFFFF001, None, id="pages"),
    ],
)
def test_golden_command_gives_its_scope(low: int, high: int, scope: Scope | None) -> None:
    with guest() as g:
        assert unit(g).command(low, high) == scope


@pytest.mark.parametrize("bit", [16, 59, 64, 127])
@pytest.mark.parametrize("opcode", [2, 5])
def test_device_command_with_a_reserved_bit_raises(opcode: int, bit: int) -> None:
    raw = opcode << 60 | 1 << bit
    with pytest.raises(SpecError, match="reserved bits"):
        amdvi.invalidation_scope(raw & (1 << 64) - 1, raw >> 64)


def test_golden_57_completion_wait_fields() -> None:
    wait = CompletionWait.decode(0x1000000000001001 | 0xABCD << 64, strict=True)
    assert wait == CompletionWait(s=1, store_address_51_3=0x1000 >> 3, store_data=0xABCD)


def test_golden_58_reserved_bits_in_the_dte_are_an_illegal_entry() -> None:
    with guest() as g:
        found = fault(unit(g, dte=DTE_40 | 1 << 52 | IG).translate(Request(MSI, RID)))
    assert (found.cause, found.recorded) == (Cause.DTE_RESERVED, True)
    assert found.event() == (0x1088000000000018, 0xFEE00000)


def test_golden_59_unreadable_device_table_is_a_hardware_error() -> None:
    with guest() as g:
        remapper = unit(g)
        remapper.set_device_table(0x0001_0000_0000)
        found = fault(remapper.translate(Request(MSI, RID)))
    assert (found.cause, found.recorded) == (Cause.DTE_UNREADABLE, True)
    assert found.event() == (0x3008000000000018, 0x0001_0000_0000 + RID * 32)


@pytest.mark.parametrize("bit", range(128))
def test_exactly_the_reserved_bits_of_the_upper_dte_are_illegal(bit: int) -> None:
    reserved = 0xF << 52 | 1 << 59 | ((1 << 54) - 1) << 64
    with guest() as g:
        remapper = unit(g)
        g.write(DEVICES + RID * 32, (1 | 1 << bit) << 128, 32)
        outcome = remapper.translate(Request(MSI, RID))
    is_illegal = isinstance(outcome, AmdviFault) and outcome.cause == Cause.DTE_RESERVED
    assert is_illegal == bool(reserved >> bit & 1)


def test_dma_half_of_the_dte_does_not_matter() -> None:
    with guest() as g:
        g.write(ROOT + 5 * 4, 0x00410301, 4)
        remapper = unit(g)
        g.write(DEVICES + RID * 32, DTE_40 << 128 | (1 << 128) - 1, 32)
        assert remapper.translate(Request(MSI, RID)) == Message(0xFEE03000, 0x4041)


@pytest.mark.parametrize("half", [0, DTE_40 & ~1, 0xFFFFFFFFFFFFFFFE])
def test_iv_clear_passes_unchanged_whatever_else_is_set(half: int) -> None:
    message = Message(0xFEE03000, 0x4441)
    with guest() as g:
        assert unit(g, dte=half).translate(Request(message, RID)) == message


def test_int_ctl_01_passes_unchanged_and_11_is_illegal() -> None:
    with guest() as g:
        assert unit(g, dte=0x1000000000000013 | ROOT).translate(Request(MSI, RID)) == MSI
        outcome = unit(g, dte=0x3000000000000013 | ROOT).translate(Request(MSI, RID))
    assert cause(outcome) == Cause.INT_CTL_RESERVED
    assert fault(outcome).event() == (0x1088000000000018, 0xFEE00000)


def test_disabled_unit_passes_unchanged() -> None:
    message = Message(0xFEE03000, 0x4041)
    with guest() as g:
        remapper = unit(g)
        remapper.set_control(GA | XT)
        assert remapper.translate(Request(message, RID)) == message


def test_requester_beyond_the_device_table_aborts() -> None:
    with guest() as g:
        remapper = unit(g)
        for size, devices in ((0, 128), (1, 256)):
            remapper.set_device_table(DEVICES | size)
            # The last entry is all zero there: IV=0 passes.
            assert remapper.translate(Request(MSI, devices - 1)) == MSI
            assert cause(remapper.translate(Request(MSI, devices))) == Cause.BEYOND_DEVICE_TABLE


@pytest.mark.parametrize(
    ("irte", "ga", "expected"),
    [
        # Each entry breaks the rule it faults with and every later one.
        pytest.param(0x01000090, False, Cause.NOT_ENABLED, id="RemapEn"),
        pytest.param(0x01000091, False, Cause.GUEST_MODE, id="GuestMode"),
        pytest.param(0x01000011, False, Cause.INT_TYPE, id="IntType"),
        pytest.param(0x01000001, False, Cause.IRTE_RESERVED, id="reserved"),
        pytest.param(1 << 32 | 0x90, True, Cause.NOT_ENABLED, id="GA-RemapEn"),
        pytest.param(1 << 32 | 0x91, True, Cause.GUEST_MODE, id="GA-GuestMode"),
        pytest.param(1 << 32 | 0x11, True, Cause.INT_TYPE, id="GA-IntType"),
        pytest.param(1 << 32 | 0x01, True, Cause.IRTE_RESERVED, id="GA-reserved"),
        pytest.param(1 << 72 | 0x01, True, Cause.IRTE_RESERVED, id="GA-reserved-high"),
    ],
)
@pytest.mark.parametrize("quiet", ["", "IG", "SupIOPF"])
def test_entry_faults_come_in_order_and_are_suppressed(irte: int, ga: bool, expected: Cause, quiet: str) -> None:
    with guest() as g:
        size = 16 if ga else 4
        g.write(ROOT + 5 * size, irte | (2 if quiet == "SupIOPF" else 0), size)
        remapper = unit(g, GA if ga else 0, dte=DTE_40 | (IG if quiet == "IG" else 0), domain=7)
        found = fault(remapper.translate(Request(MSI, RID)))
    assert (found.cause, found.recorded, found.index) == (expected, not quiet, 5)
    event = found.event()
    assert event is not None
    assert Event.decode(event[0] | event[1] << 64).domain == 7


def test_ig_suppresses_an_index_beyond_the_table_but_not_broken_tables() -> None:
    with guest() as g:
        short = DTE_40 & ~0x1E | IG
        assert not fault(unit(g, dte=short).translate(Request(MSI, RID))).recorded
        broken = DTE_40 | 0x1E | IG
        assert fault(unit(g, dte=broken).translate(Request(MSI, RID))).recorded
        # The event of an unreadable IRTE is left open: only that it is recorded.
        elsewhere = 0x2000000100000013 | IG
        found = fault(unit(g, dte=elsewhere).translate(Request(MSI, RID)))
        assert (found.cause, found.recorded) == (Cause.IRTE_UNREADABLE, True)


@pytest.mark.parametrize("address", [0, 0xFED00000, 0xFEF00000, 0x1_FEE00000])
def test_write_elsewhere_is_no_interrupt_and_not_recorded(address: int) -> None:
    message = Message(address, 5)
    with guest() as g:
        expected = NotAnInterrupt(requester=RID, recorded=False, message=message)
        assert unit(g).translate(Request(message, RID)) == expected


def test_memory_that_shrinks_under_the_tables_faults() -> None:
    with guest() as g:
        g.write(ROOT + 5 * 4, 0x00410301, 4)
        remapper = unit(g)
        g.shrink(ROOT + 5 * 4 + 3)
        assert cause(remapper.translate(Request(MSI, RID))) == Cause.IRTE_UNREADABLE
        g.shrink(DEVICES + RID * 32 + 31)
        assert cause(remapper.translate(Request(MSI, RID))) == Cause.DTE_UNREADABLE


words64 = st.integers(0, (1 << 64) - 1)
halves = st.builds(
    lambda root, length, control, rest: root << 12 | length << 1 | control << 60 | rest,
    st.sampled_from([ROOT >> 12, (MEMORY_SIZE >> 12) - 1, MEMORY_SIZE >> 12, (1 << 40) - 1]),
    st.integers(0, 15),
    st.integers(0, 3),
    st.sampled_from([1, 0, 1 | IG, 1 | 7 << 56]),
)
messages = st.builds(
    Message,
    st.one_of(words64, st.integers(0xFEE00000, 0xFEEFFFFF)),
    st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 64)),
)


def check(outcome: Message | Fault, request: Request) -> None:
    """What every outcome must be, whatever led to it."""
    if isinstance(outcome, Message):
        assert outcome == request.message or outcome.address & 0xFF_FFF00000 == 0xFEE00000
        assert outcome.data >> 32 == 0
    elif isinstance(outcome, AmdviFault):
        event = outcome.event()
        assert event is not None or not outcome.recorded
        if event is not None:
            assert event[0] & 0xFFFF == request.requester
            assert event[0] >> 51 & 1
    else:
        assert isinstance(outcome, NotAnInterrupt)
        assert not outcome.recorded
    assert outcome.describe()


@settings(max_examples=300)
@given(
    control=st.one_of(words64, st.sampled_from([1, 1 | GA, 1 | GA | XT, 1 | LARGE])),
    base=st.one_of(words64, st.sampled_from([DEVICES, MEMORY_SIZE - 4096, MEMORY_SIZE, DEVICES | 0x1FF])),
    half=st.one_of(words64, halves),
    table=st.binary(min_size=16, max_size=256),
    message=messages,
    requester=st.integers(0, 0xFFFF),
    left=st.integers(0, MEMORY_SIZE),
)
def test_hostile_tables_never_raise(
    control: int, base: int, half: int, table: bytes, message: Message, requester: int, left: int
) -> None:
    with guest() as g:
        remapper = unit(g, control, dte=half)
        remapper.set_device_table(base)
        g.write_bytes(ROOT, table)
        g.write_bytes(MEMORY_SIZE - len(table), table)
        for request in (Request(message, requester), Request(message, RID)):
            check(remapper.translate(request), request)
            assert remapper.cookie(request) == request.requester
        g.shrink(left)
        check(remapper.translate(Request(message, RID)), Request(message, RID))


@given(
    destination=st.integers(0, 0xFFFFFFFF),
    vector=st.integers(0, 255),
    dm=st.integers(0, 1),
    int_type=st.integers(0, 1),
    xt_en=st.booleans(),
)
def test_valid_128_bit_irte_delivers_its_fields(
    destination: int, vector: int, dm: int, int_type: int, xt_en: bool
) -> None:
    irte = amdvi.IrteGa(
        destination_31_24=destination >> 24,
        destination_23_8=destination >> 8 & 0xFFFF,
        destination_7_0=destination & 0xFF,
        vector=vector,
        dm=dm,
        int_type=int_type,
        remap_en=1,
    )
    high = (destination & 0xFFFFFF00) << 32 if xt_en else 0
    expected = Message(high | 0xFEE << 20 | (destination & 0xFF) << 12 | dm << 2, 1 << 14 | int_type << 8 | vector)
    assert amdvi.remap_entry(irte.encode().to_bytes(16, "little"), xt_en) == expected


def test_torn_128_bit_entry_gives_an_outcome_and_never_raises() -> None:
    old, new = (0x301, 0x41), (0x501, 0x42)
    for low in (old[0], new[0], 0):
        for high in (old[1], new[1], (1 << 64) - 1):
            with guest() as g:
                g.write(ROOT + 5 * 16, low | high << 64, 16)
                outcome = unit(g, GA).translate(Request(MSI, RID))
            check(outcome, Request(MSI, RID))


@pytest.mark.parametrize("requester", [-1, 1 << 16])
def test_device_scope_out_of_range_raises(requester: int) -> None:
    with pytest.raises(SpecError):
        amdvi.device(requester)
