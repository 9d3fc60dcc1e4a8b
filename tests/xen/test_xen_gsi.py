import pytest
from hypothesis import given
from hypothesis import strategies as st

from irqrouter.errors import SpecError
from irqrouter.xen_gsi import (
    Callback,
    GsiCallback,
    IntxCallback,
    NoCallback,
    VectorCallback,
    decode_callback,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(0, NoCallback(), id="zero"),
        pytest.param(9, GsiCallback(9), id="gsi"),
        pytest.param(1, GsiCallback(1), id="gsi-1"),
        pytest.param(23, GsiCallback(23), id="last-gsi"),
        pytest.param(24, NoCallback(), id="gsi-beyond-the-last"),
        pytest.param(0x0123456789ABCD09, IntxCallback(25, 1), id="intx-ignores-the-rest"),
        pytest.param(0x00FF_FFFF_FFFF_FF09, GsiCallback(9), id="gsi-is-the-low-byte"),
        pytest.param(0x100, NoCallback(), id="gsi-truncated-to-0"),
        pytest.param(0x0100_0000_0000_1800, IntxCallback(3, 0), id="inta-of-device-3"),
        pytest.param(0x0100_0000_0000_1F03, IntxCallback(3, 3), id="function-ignored"),
        pytest.param(0x0100_FFFF_FFFF_F8FF, IntxCallback(31, 3), id="domain-and-bus-ignored"),
        pytest.param(0x0100_0000_0000_0000, IntxCallback(0, 0), id="intx-of-device-0"),
        pytest.param(0x0200_0000_0000_0093, VectorCallback(0x93), id="vector"),
        pytest.param(0x02FF_FFFF_FFFF_FFF3, VectorCallback(0xF3), id="vector-is-the-low-byte"),
        pytest.param(0x0300_0000_0000_0009, NoCallback(), id="unknown-type"),
        pytest.param(0xFF00_0000_0000_0009, NoCallback(), id="last-type"),
    ],
)
def test_callback_word_is_decoded_as_xen_does(value: int, expected: Callback) -> None:
    assert decode_callback(value, gsis=24) == expected


def test_number_of_gsis_bounds_the_gsi() -> None:
    assert decode_callback(47, gsis=48) == GsiCallback(47)
    assert decode_callback(47, gsis=47) == NoCallback()


@given(value=st.integers(0, (1 << 64) - 1), gsis=st.integers(0, 4096))
def test_any_word_decodes_and_describes_itself(value: int, gsis: int) -> None:
    callback = decode_callback(value, gsis=gsis)
    assert callback.describe()
    if isinstance(callback, GsiCallback):
        assert 0 < callback.gsi < min(gsis, 256)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_word_beyond_64_bits_raises(value: int) -> None:
    with pytest.raises(SpecError):
        decode_callback(value, gsis=24)
