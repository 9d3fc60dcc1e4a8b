import pytest
from hypothesis import given
from hypothesis import strategies as st

from irqrouter.errors import SpecError
from irqrouter.x86.msi import (
    CompatibilityAddress,
    Message,
    bdf,
    checked,
    is_interrupt,
    remapped,
    with_extended_destination,
)


@pytest.mark.parametrize(
    "message",
    [Message(-1, 0), Message(1 << 64, 0), Message(0, -1), Message(0, 1 << 32)],
)
def test_checked_message_too_wide_raises(message: Message) -> None:
    with pytest.raises(SpecError, match="must fit"):
        checked(message)


def test_checked_message_that_fits_is_returned() -> None:
    message = Message((1 << 64) - 1, (1 << 32) - 1)
    assert checked(message) is message


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (0xFEE00000, True),
        (0xFEEFFFFF, True),
        (0xFEDFFFFF, False),
        (0xFEF00000, False),
        (0x1_FEE00000, False),
        (0, False),
    ],
)
def test_is_interrupt_only_within_the_interrupt_range(address: int, expected: bool) -> None:
    assert is_interrupt(address) == expected


@pytest.mark.parametrize(
    ("requester", "text"), [(0x0018, "00:03.0"), (0x00A0, "00:14.0"), (0xFF00, "ff:00.0"), (0xFFFF, "ff:1f.7")]
)
def test_bdf_writes_bus_device_function(requester: int, text: str) -> None:
    assert bdf(requester) == text


def test_golden_30_extended_destination_moves_to_the_high_dword() -> None:
    assert with_extended_destination(Message(0xFEE23020, 0x41)) == Message(0x00000100_FEE23000, 0x41)


@pytest.mark.parametrize("address", [0xFEE23030, 0x00000200_FEE23020, 0xFEE23000])
def test_extended_destination_leaves_other_messages_alone(address: int) -> None:
    assert with_extended_destination(Message(address, 0x41)) == Message(address, 0x41)


@given(destination=st.integers(0, 0x7FFF))
def test_extended_destination_keeps_the_15_bit_id(destination: int) -> None:
    address = 0xFEE00000 | (destination & 0xFF) << 12 | destination >> 8 << 5
    word = CompatibilityAddress.decode(with_extended_destination(Message(address, 0)).address)
    assert word.destination_31_8 << 8 | word.destination == destination
    assert word.ext_destination == 0


@pytest.mark.parametrize("destination", [-1, 1 << 32])
def test_remapped_destination_too_wide_raises(destination: int) -> None:
    with pytest.raises(SpecError, match="destination"):
        remapped(destination=destination, dm=0, rh=0, vector=0x41, delivery_mode=0, tm=0)


@given(destination=st.integers(0, 0xFFFFFFFF))
def test_remapped_high_dword_keeps_its_low_byte_0_as_kvm_demands(destination: int) -> None:
    message = remapped(destination=destination, dm=1, rh=1, vector=0xFF, delivery_mode=7, tm=1)
    assert message.address >> 32 == destination & 0xFFFFFF00
    assert message.address & 0xFFFFFFFF == 0xFEE0000C | (destination & 0xFF) << 12
    assert message.data == 0xC7FF
