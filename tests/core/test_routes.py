import hypothesis.strategies as st
import pytest
from hypothesis import given

from irqrouter.core.routes import GsiExhaustedError, RouteTable, replaced_at_once
from irqrouter.errors import CallerError
from irqrouter.x86.msi import Message

X, Y = Message(0xFEE01000, 0x41), Message(0xFEE02000, 0x42)


def test_allocate_gives_the_lowest_free_above_the_pins_up_to_the_limit() -> None:
    table = RouteTable(24, 4096)
    assert [table.allocate() for _ in range(4072)] == list(range(24, 4096))
    with pytest.raises(GsiExhaustedError, match="all 4096 are in use"):
        table.allocate()
    table.free(100)
    table.free(30)
    assert [table.allocate(), table.allocate()] == [30, 100]


def test_set_what_the_kernel_has_is_no_change() -> None:
    table = RouteTable(24, 4096)
    assert not table.set(24, X)
    assert table.changes() == {24: X}
    table.accept(table.begin_write())
    assert table.set(24, X)
    assert not table.changes()
    assert not table.set(24, Y)
    assert table.set(24, X), "changed back before any write: nothing is due"
    assert not table.changes()


def test_refuse_forgets_sets_and_keeps_drops() -> None:
    table = RouteTable(24, 4096)
    table.set(24, X)
    table.set(25, X)
    table.accept(table.begin_write())
    table.set(24, Y)
    table.drop(25)
    table.set(26, Y)
    assert sorted(table.refuse(table.begin_write())) == [24, 26]
    assert table.changes() == {25: None}
    assert (table.accepted(24), table.accepted(25), table.accepted(26)) == (X, X, None)
    assert table.set(24, X)


def test_foreign_routes_never_meet_ours() -> None:
    table = RouteTable(24, 4096)
    table.set_foreign({3: X, 25: Y})
    assert [table.allocate(), table.allocate()] == [24, 26]
    with pytest.raises(CallerError, match="gsi 26: belongs to a vector"):
        table.set_foreign({26: X})
    with pytest.raises(CallerError, match="gsi 4096: must be below 4096"):
        table.set_foreign({4096: X})
    assert table.changes() == {3: X, 25: Y}
    table.accept(table.begin_write())
    table.set_foreign({3: Y})
    assert table.changes() == {3: Y, 25: None}
    assert table.allocate() == 27  # KVM has the route of 25 still
    table.accept(table.begin_write())
    assert table.allocate() == 25


@given(st.lists(st.tuples(st.sampled_from(["set", "drop", "accept", "refuse"]), st.integers(24, 28), st.booleans())))
def test_table_any_history_changes_are_exactly_wanted_minus_accepted(history: list[tuple[str, int, bool]]) -> None:
    table = RouteTable(24, 32)
    wanted: dict[int, Message] = {}
    accepted: dict[int, Message] = {}
    for what, gsi, first in history:
        route = X if first else Y
        if what == "set":
            wanted[gsi] = route
            table.set(gsi, route)
        elif what == "drop":
            wanted.pop(gsi, None)
            table.drop(gsi)
        elif what == "accept":
            table.accept(table.begin_write())
            accepted = dict(wanted)
        else:
            table.refuse(table.begin_write())
            wanted = {g: accepted[g] for g in wanted if g in accepted}
        assert table.changes() == {
            g: wanted.get(g) for g in wanted.keys() | accepted.keys() if wanted.get(g) != accepted.get(g)
        }
        assert {g: table.accepted(g) for g in range(24, 32) if table.accepted(g)} == accepted


def test_accept_of_a_snapshot_leaves_what_was_wanted_during_the_write() -> None:
    table = RouteTable(24, 4096)
    table.set(24, X)
    table.set(25, X)
    written = table.begin_write()
    table.set(24, Y)
    table.drop(25)
    table.accept(written)
    assert (table.has(24), table.has(25)) == (False, False)
    assert table.changes() == {24: Y, 25: None}


def test_refuse_of_a_snapshot_keeps_what_was_wanted_during_the_write() -> None:
    table = RouteTable(24, 4096)
    table.set(24, X)
    written = table.begin_write()
    table.set(24, Y)
    assert table.refuse(written) == []
    assert table.changes() == {24: Y}


def test_certain_is_the_accepted_route_unless_another_may_be_on_its_way() -> None:
    table = RouteTable(24, 4096)
    table.set(24, X)
    assert (table.wanted(24), table.certain(24)) == (X, None)
    table.accept(table.begin_write())
    assert table.certain(24) == X
    table.set(24, Y)
    assert (table.wanted(24), table.certain(24)) == (Y, None)
    written = table.begin_write()
    table.set(24, X)
    assert table.certain(24) is None, "the kernel may have Y by now"
    table.accept(written)
    assert table.certain(24) is None


@pytest.mark.parametrize(
    ("other", "at_once"),
    [
        (Y, True),
        (Message(0xFEE02000 | 1 << 2, 0x42), False),  # logical
        (Message(0xFEEFF000, 0x42), False),  # xAPIC's broadcast
        (Message(0xFFFFFF00_FEEFF000, 0x42), False),  # x2APIC's
        (Message(0x00000100_FEE02000, 0x42), True),  # one id above 8 bits
    ],
)
def test_replaced_at_once_needs_exactly_one_destination_before_and_after(other: Message, *, at_once: bool) -> None:
    assert replaced_at_once(X, other) is at_once
    assert replaced_at_once(other, X) is at_once


def test_set_during_a_write_is_never_taken_for_what_the_kernel_has() -> None:
    table = RouteTable(24, 4096)
    table.set(24, X)
    table.accept(table.begin_write())
    table.drop(24)
    written = table.begin_write()
    assert not table.set(24, X), "the kernel had it, and is about to lose it"
    table.accept(written)
    assert table.changes() == {24: X}
