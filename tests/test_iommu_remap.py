import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irqrouter.errors import SpecError
from irqrouter.iommu_remap import (
    EVERYTHING,
    UNINDEXED,
    AmdviRemapper,
    NoRemapping,
    Remapper,
    Scope,
    VtdRemapper,
    device,
    entries,
    entry,
)
from irqrouter.x86.msi import Message, Request
from tests.iommu.guest import guest

MSI = Message(0xFEE000B8, 0)
RID = 0x18


def test_no_remapping_passes_messages_unchanged_and_is_named_by_global_invalidations_only() -> None:
    remapper: Remapper = NoRemapping()
    request = Request(Message(0x00012300_FEE45008, 0x4052), RID)
    assert remapper.translate(request) is request.message
    assert remapper.cookie(request) == UNINDEXED


def test_units_pass_messages_unchanged_until_the_guest_turns_remapping_on() -> None:
    with guest() as g:
        remappers: list[Remapper] = [VtdRemapper(g.memory), AmdviRemapper(g.memory)]
        assert [remapper.translate(Request(MSI, RID)) for remapper in remappers] == [MSI, MSI]


def test_every_register_change_makes_everything_stale() -> None:
    with guest() as g:
        intel, amd = VtdRemapper(g.memory), AmdviRemapper(g.memory)
        scopes = [
            intel.set_interrupt_remap_table(0x1000000F),
            intel.set_remapping(True),
            intel.set_compatibility_format(True),
            amd.set_control(1),
            amd.set_device_table(0x1000),
        ]
    assert scopes == [EVERYTHING] * 5


def test_vtd_cookie_is_the_index_and_does_not_depend_on_registers() -> None:
    requests = [
        Request(MSI, RID),
        Request(Message(0xFEE03000, 0x41), RID),
        Request(Message(0xFEEFFFFC, 1), RID),
    ]
    with guest() as g:
        remapper = VtdRemapper(g.memory)
        before = [remapper.cookie(request) for request in requests]
        remapper.set_interrupt_remap_table(0x1000080F)
        remapper.set_remapping(True)
        after = [remapper.cookie(request) for request in requests]
    assert before == after == [5, UNINDEXED, UNINDEXED]


@pytest.mark.parametrize("requester", [-1, 1 << 16])
def test_cookie_of_a_requester_that_no_device_can_have_raises(requester: int) -> None:
    with guest() as g:
        remappers: list[Remapper] = [VtdRemapper(g.memory), AmdviRemapper(g.memory), NoRemapping()]
        for remapper in remappers:
            with pytest.raises(SpecError, match="must fit 16 bits"):
                remapper.cookie(Request(MSI, requester))


@given(index=st.integers(0, 0xFFFF), other=st.integers(0, 0xFFFF))
def test_scope_of_an_entry_names_the_cookie_of_its_requests_and_no_other(index: int, other: int) -> None:
    address = 0xFEE00010 | (index & 0x7FFF) << 5 | index >> 15 << 2
    with guest() as g:
        cookie = VtdRemapper(g.memory).cookie(Request(Message(address, 0xDEAD), RID))
    assert cookie in entry(index)
    assert (cookie in entry(other)) == (index == other)
    assert cookie in entries(index, 4)
    assert cookie in EVERYTHING


@given(requester=st.integers(0, 0xFFFF), other=st.integers(0, 0xFFFF))
def test_scope_of_a_device_names_the_cookie_of_its_requests_and_no_other(requester: int, other: int) -> None:
    with guest() as g:
        cookie = AmdviRemapper(g.memory).cookie(Request(MSI, requester))
    assert cookie in device(requester)
    assert (cookie in device(other)) == (requester == other)


def test_a_guests_descriptor_and_command_name_the_cookies_they_make_stale() -> None:
    with guest() as g:
        assert VtdRemapper(g.memory).descriptor(0x0000004018000014, 0) == Scope(0x40, 0x47)
        assert AmdviRemapper(g.memory).command(0x50000000000000A0, 0) == Scope(0xA0, 0xA0)


def test_entry_rewritten_by_the_guest_is_seen_by_the_next_translation() -> None:
    with guest() as g:
        remapper = VtdRemapper(g.memory)
        remapper.set_interrupt_remap_table(0x4000)
        remapper.set_remapping(True)
        request = Request(Message(0xFEE00010, 0), RID)
        for vector in (0x41, 0x42, 0x41, 0x43):
            g.write(0x4000, 1 | vector << 16, 16)
            assert remapper.translate(request) == Message(0xFEE00000, 0x4000 | vector)


@pytest.mark.timeout(30)
def test_translation_beside_register_changes_uses_one_state_throughout() -> None:
    # A small xAPIC table in one place and an x2APIC table elsewhere: any mix of base, size and mode would show as a
    # third outcome.
    expected = {Message(0xFEE03000, 0x4041), Message(0x00000400_FEE00000, 0x4042)}
    seen: set[object] = set()
    done = threading.Event()
    with guest() as g:
        g.write(0x4000 + 16, 0x0000030000410001, 16)
        g.write(0x8000 + 16, 0x0000040000420001, 16)
        remapper = VtdRemapper(g.memory)
        remapper.set_interrupt_remap_table(0x4000)
        remapper.set_remapping(True)
        request = Request(Message(0xFEE00030, 0), RID)

        def change_registers() -> None:
            for _ in range(2_000):
                remapper.set_interrupt_remap_table(0x8000 | 1 << 11 | 7)
                remapper.set_interrupt_remap_table(0x4000)
            done.set()

        changer = threading.Thread(target=change_registers)
        changer.start()
        while not done.is_set():
            seen.add(remapper.translate(request))
        changer.join()
        for irta in (0x8000 | 1 << 11 | 7, 0x4000):  # each alone, whatever the threads' luck was
            remapper.set_interrupt_remap_table(irta)
            seen.add(remapper.translate(request))
    assert seen == expected


@pytest.mark.timeout(30)
def test_register_changes_from_several_threads_lose_none() -> None:
    with guest() as g:
        g.write(0x4000, 0x0000030000410001, 16)
        for _ in range(100):
            remapper = VtdRemapper(g.memory)
            changes = [
                threading.Thread(target=remapper.set_interrupt_remap_table, args=(0x4000,)),
                threading.Thread(target=remapper.set_remapping, args=(True,)),
            ]
            for change in changes:
                change.start()
            for change in changes:
                change.join()
            assert remapper.translate(Request(Message(0xFEE00010, 0), RID)) == Message(0xFEE03000, 0x4041)
