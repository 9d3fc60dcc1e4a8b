import pytest
from hypothesis import given
from hypothesis import strategies as st

from irqrouter.errors import SpecError
from irqrouter.x86.ioapic import RemappableRte, Rte, message
from irqrouter.x86.msi import Message


@pytest.mark.parametrize(
    ("rte", "expected"),
    [
        pytest.param(0x0005000000000002, (0xFEE00050, 0x0002), id="37"),
        pytest.param(0x002100000000A009, (0xFEE00210, 0x8009), id="38-level-active-low"),
        pytest.param(0x000700000001A815, (0xFEE00074, 0x8015), id="39-index-bit-15"),
        pytest.param(0x0300000000000041, (0xFEE03000, 0x0041), id="compatibility"),
        pytest.param(0x0302000000000941, (0xFEE03024, 0x0141), id="extended-destination-logical"),
    ],
)
def test_golden_rte_makes_its_message(rte: int, expected: tuple[int, int]) -> None:
    assert message(rte) == Message(*expected)


def test_golden_39_is_masked_and_names_index_8003h() -> None:
    rte = RemappableRte.decode(0x000700000001A815, strict=True)
    assert (rte.mask, rte.index_15 << 15 | rte.index_14_0, rte.tm, rte.polarity, rte.vector) == (1, 0x8003, 1, 1, 0x15)


def test_compatibility_rte_is_decoded() -> None:
    rte = Rte.decode(0x0300000000018931)
    assert rte == Rte(destination=3, mask=1, tm=1, dm=1, delivery_mode=1, vector=0x31)


@given(rte=st.integers(0, (1 << 64) - 1))
def test_message_carries_the_wired_bits_and_only_those(rte: int) -> None:
    word = Rte.decode(rte)
    sent = message(rte)
    assert sent.address == 0xFEE00000 + (rte >> 48) * 16 + 4 * word.dm
    assert sent.data == word.vector + 256 * word.delivery_mode + 32768 * word.tm


@pytest.mark.parametrize("rte", [-1, 1 << 64])
def test_rte_too_wide_raises(rte: int) -> None:
    with pytest.raises(SpecError, match="must fit 64 bits"):
        message(rte)
