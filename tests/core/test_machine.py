"""The table, exhaustively: every state with every event."""

import itertools

import pytest

from irqrouter.core.machine import TABLE, Event, IllegalTransitionError, Row, State, step
from irqrouter.core.routes import RouteTable
from irqrouter.core.vectors import Vector, Vectors
from irqrouter.x86.msi import Message, Request

A, D, M, R = State.ASSIGNED, State.DEASSIGNED, State.MASKED, State.REMOVED

#: What must happen, told independently of the table: the next state, None where the pair is illegal.
NEXT = {
    Event.INVALIDATED: {A: D, D: D, M: M, R: None},
    Event.WIDENED: {A: A, D: D, M: M, R: None},
    Event.ROUTE_MISSED: {A: D, D: None, M: None, R: None},
    Event.MASKED: {A: M, D: M, M: M, R: None},
    Event.UNMASKED: {A: A, D: D, M: D, R: None},
    Event.PROGRAMMED: {A: D, D: D, M: M, R: None},
    Event.REMOVED: {A: R, D: R, M: R, R: None},
    Event.ROUTE_REFUSED: {A: D, D: D, M: M, R: None},
    Event.CAUGHT: {A: None, D: D, M: None, R: None},
    Event.FAULT_CAUGHT: {A: None, D: D, M: None, R: None},
    Event.ASSIGNED: {A: None, D: A, M: None, R: None},
}
PAIRS = list(itertools.product(State, Event))


def make_vector(state: State) -> tuple[Vectors, Vector]:
    vectors = Vectors(RouteTable(24, 4096))
    vector = vectors.add(Request(Message(0xFEE00000, 0x41), 0x18), 5, None, masked=False)
    vector.state = state
    return vectors, vector


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_machine_every_pair_goes_where_it_must_or_raises_and_changes_nothing(state: State, event: Event) -> None:
    vectors, vector = make_vector(state)
    generation = vector.generation
    following = NEXT[event][state]
    if following is None:
        with pytest.raises(IllegalTransitionError, match=event.value):
            vectors.happen(vector, event)
        assert (vector.state, vector.generation) == (state, generation)
    else:
        vectors.happen(vector, event)
        assert vector.state is following


@pytest.mark.parametrize(("state", "event"), list(TABLE))
def test_machine_leaving_assigned_always_deassigns(state: State, event: Event) -> None:
    row = step(state, event)
    assert row.deassign == (state is A and row.state is not A)


@pytest.mark.parametrize(("state", "event"), list(TABLE))
def test_machine_every_change_of_what_a_vector_is_renews_the_generation(state: State, event: Event) -> None:
    row = step(state, event)
    changes = event in {Event.INVALIDATED, Event.WIDENED, Event.PROGRAMMED, Event.REMOVED} or row.state is not state
    # Outcomes of a decision, and the end of an invalidation that renewed it when it began: no changes.
    decided = event in {Event.CAUGHT, Event.FAULT_CAUGHT, Event.ASSIGNED, Event.ROUTE_MISSED}
    assert row.renews == (changes and not decided)


def test_machine_a_route_goes_only_with_its_vector() -> None:
    assert {pair for pair, row in TABLE.items() if row.drop_route} == {(state, Event.REMOVED) for state in (A, D, M)}


def test_machine_removed_is_final() -> None:
    assert not [event for state, event in TABLE if state is R]


def test_row_default_does_nothing() -> None:
    assert Row(D) == Row(D, renews=False, deassign=False, drop_route=False)


def test_generations_rise_across_vectors_and_never_restart() -> None:
    vectors = Vectors(RouteTable(24, 4096))
    seen = []
    for _ in range(3):
        vector = vectors.add(Request(Message(0xFEE00000, 0x41), 0), 0, None, masked=False)
        seen.append(vector.generation)
        vectors.happen(vector, Event.INVALIDATED)
        seen.append(vector.generation)
        vectors.happen(vector, Event.REMOVED)
        seen.append(vector.generation)
        vectors.forget(vector, bound=False)
    assert seen == sorted(set(seen))
