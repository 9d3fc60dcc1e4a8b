from typing import Annotated, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irqrouter import xen_gsi
from irqrouter.bits import FieldValue, Word, bits
from irqrouter.errors import InternalError, SpecError
from irqrouter.iommu import amdvi, vtd
from irqrouter.x86 import ioapic, msi

WORDS = [
    kind
    for module in (msi, ioapic, vtd, amdvi, xen_gsi)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Word) and kind is not Word and kind.__module__ == module.__name__
]


class Sample(Word, frozen=True, kw_only=True):
    width: ClassVar[int] = 32
    top: Annotated[int, bits(31, 24, "the top")] = 0
    mode: Annotated[int, bits(5, 4, "mode", ("off", "on", "", "auto"))] = 0
    enabled: Annotated[int, bits(0, 0, "enabled")] = 0


def test_words_found_include_every_model() -> None:
    assert {vtd.Irte, amdvi.IrteGa, ioapic.Rte, msi.CompatibilityData, xen_gsi.CallbackIrq} <= set(WORDS)


def test_decode_known_word_gives_fields() -> None:
    assert Sample.decode(0xAB000031) == Sample(top=0xAB, mode=3, enabled=1)


def test_encode_known_fields_gives_word() -> None:
    assert Sample(top=0xAB, mode=3, enabled=1).encode() == 0xAB000031


def test_layout_is_high_bit_first_and_reserved_is_the_rest() -> None:
    assert list(Sample.layout) == ["top", "mode", "enabled"]
    assert Sample.reserved == 0x00FFFFCE


@pytest.mark.parametrize("kind", WORDS, ids=lambda kind: f"{kind.__module__.split('.')[-1]}.{kind.__name__}")
@settings(max_examples=30)
@given(data=st.data())
def test_every_word_round_trips_all_but_reserved_bits(kind: type[Word], data: st.DataObject) -> None:
    raw = data.draw(st.integers(0, (1 << kind.width) - 1))
    word = kind.decode(raw)
    assert word.encode() == raw & ~kind.reserved
    assert kind.decode(word.encode(), strict=True) == word


@pytest.mark.parametrize("kind", WORDS, ids=lambda kind: f"{kind.__module__.split('.')[-1]}.{kind.__name__}")
def test_every_word_claims_no_bit_twice(kind: type[Word]) -> None:
    claimed = [bit for field in kind.layout.values() for bit in range(field.low, field.high + 1)]
    assert len(set(claimed)) == len(claimed)
    assert kind.reserved == (1 << kind.width) - 1 - sum(1 << bit for bit in claimed)


@pytest.mark.parametrize("raw", [-1, 1 << 32])
def test_decode_word_too_wide_raises(raw: int) -> None:
    with pytest.raises(SpecError, match=r"Sample .*: must fit 32 bits"):
        Sample.decode(raw)


@pytest.mark.parametrize("value", [-1, 4, 1 << 40])
def test_field_too_wide_raises_and_names_the_field(value: int) -> None:
    with pytest.raises(SpecError, match=r"Sample\.mode .*: must fit bits 5:4"):
        Sample(mode=value)


def test_decode_reserved_bit_raises_only_when_strict() -> None:
    assert Sample.decode(0x2) == Sample()
    with pytest.raises(SpecError, match="reserved bits 0x2 must be 0"):
        Sample.decode(0x2, strict=True)


def test_misspelt_field_is_seen_by_the_type_checker_and_raises() -> None:
    with pytest.raises(TypeError, match="enable"):
        Sample(enable=1)  # type: ignore[call-arg]


def test_word_is_frozen() -> None:
    word = Sample()
    with pytest.raises(AttributeError):
        word.top = 1  # type: ignore[misc]


def test_explain_names_values_and_set_reserved_bits() -> None:
    assert Sample.explain(0x01000021 | 1 << 8) == [
        FieldValue("31:24", "top", 1, "the top"),
        FieldValue("5:4", "mode", 2, "mode: reserved"),
        FieldValue("0", "enabled", 1, "enabled"),
        FieldValue("8", "reserved", 1, "must be 0"),
    ]


def test_declaring_overlapping_fields_raises() -> None:
    with pytest.raises(InternalError, match=r"Overlapping\.b: bits 4:0 are not below bit 4"):

        class Overlapping(Word, frozen=True, kw_only=True):
            width: ClassVar[int] = 32
            a: Annotated[int, bits(7, 4)] = 0
            b: Annotated[int, bits(4, 0)] = 0


def test_declaring_a_field_above_the_word_raises() -> None:
    with pytest.raises(InternalError, match="are not below bit 32"):

        class TooHigh(Word, frozen=True, kw_only=True):
            width: ClassVar[int] = 32
            a: Annotated[int, bits(32, 30)] = 0
