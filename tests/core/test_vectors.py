import errno

import pytest

from irqrouter.core.machine import Event, State
from irqrouter.core.ops import Assign, Catch, CatchFault, Deassign, DropRoute, SetRoute
from irqrouter.core.routes import GsiExhaustedError, RouteTable
from irqrouter.core.vectors import Vector, VectorGoneError, Vectors, decide, route
from irqrouter.iommu.vtd import FaultReason, VtdFault
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.x86.msi import Message, Request

X = Message(0xFEE01000, 0x4041)
REQUEST = Request(Message(0xFEE000B8, 0), 0x18)


@pytest.fixture
def vectors() -> Vectors:
    return Vectors(RouteTable(24, 4096))


def add(vectors: Vectors, cookie: int = 5, *, masked: bool = False) -> Vector:
    return vectors.add(REQUEST, cookie, None, masked=masked)


def test_decide_on_a_message_catches_it() -> None:
    assert decide(3, 7, X) == Catch(3, 7, X)


def test_route_after_a_catch_is_that_of_the_same_generation() -> None:
    assert route(Catch(3, 7, X)) == SetRoute(3, 7, X)


def test_decide_on_a_fault_only_catches_it() -> None:
    fault = VtdFault(requester=0x18, recorded=True, reason=FaultReason(0x22), index=5)
    assert decide(3, 7, fault) == CatchFault(3, 7, fault)


def test_refusal_of_what_was_decided_before_a_change_is_stale(vectors: Vectors) -> None:
    vector = add(vectors)
    old = vector.generation
    vectors.happen(vector, Event.INVALIDATED)
    for op in (SetRoute(vector.id, old, X), Catch(vector.id, old, X), Assign(vector.id, old)):
        assert vectors.refusal(vector, op) == errno.ESTALE
        assert vectors.refusal(None, op) == errno.ESTALE, "removed meanwhile"


def test_refusal_masked_vector_nothing_is_done_to_it(vectors: Vectors) -> None:
    vector = add(vectors, masked=True)
    for op in (
        SetRoute(vector.id, vector.generation, X),
        Catch(vector.id, vector.generation, X),
        Assign(vector.id, vector.generation),
    ):
        assert vectors.refusal(vector, op) == errno.ESTALE


def test_refusal_assigned_vector_only_its_route_may_change(vectors: Vectors) -> None:
    vector = add(vectors)
    vectors.happen(vector, Event.ASSIGNED)
    generation = vector.generation
    assert vectors.refusal(vector, Catch(vector.id, generation, X)) == errno.EALREADY
    assert vectors.refusal(vector, Assign(vector.id, generation)) == errno.EALREADY
    assert vectors.refusal(vector, SetRoute(vector.id, generation, X)) == 0


def test_refusal_assign_needs_the_route_of_its_own_generation(vectors: Vectors) -> None:
    vector = add(vectors)
    assert vectors.refusal(vector, Assign(vector.id, vector.generation)) == errno.ENXIO
    vector.accepted_generation = vector.generation
    assert vectors.refusal(vector, Assign(vector.id, vector.generation)) == 0
    vectors.happen(vector, Event.INVALIDATED)
    assert vectors.refusal(vector, Assign(vector.id, vector.generation)) == errno.ENXIO


def test_matching_follows_a_reprogrammed_vector_at_once(vectors: Vectors) -> None:
    vector = add(vectors, 5)
    vectors.program(vector, REQUEST, 6)
    assert vectors.matching(Scope(5, 5)) == []
    assert vectors.matching(Scope(6, 6)) == [vector]
    assert vectors.matching(EVERYTHING) == [vector]


def test_forgotten_vector_is_gone_and_its_gsi_free_but_never_its_id(vectors: Vectors) -> None:
    vector = add(vectors)
    vectors.happen(vector, Event.REMOVED)
    vectors.forget(vector, bound=False)
    assert (vectors.find(vector.id), vectors.routed_at(vector.gsi), list(vectors)) == (None, None, [])
    with pytest.raises(VectorGoneError, match="vector 1: was removed"):
        vectors.known(vector)
    other = add(vectors)
    assert (other.gsi, other.id, other.state) == (vector.gsi, 2, State.DEASSIGNED)


def test_may_stay_needs_a_route_decided_since_and_nothing_on_its_way_by_the_one_before(vectors: Vectors) -> None:
    vector = add(vectors)
    other = Message(0xFEE02000, 0x4042)
    since = vector.generation

    def routed(route: Message) -> None:
        vectors.routes.set(vector.gsi, route)
        vector.routed_generation = vector.generation

    assert not vectors.may_stay(vector, since, X), "no route at all"
    routed(other)
    assert vectors.may_stay(vector, since, X)
    assert not vectors.may_stay(vector, since + 1, X), "decided before"
    assert not vectors.may_stay(vector, since, None), "nobody knows what KVM goes by"
    vector.deferred = True
    assert not vectors.may_stay(vector, since, X), "B7"
    assert vectors.may_stay(vector, since, other), "nothing changes"
    vector.deferred = False
    assert not vectors.may_stay(vector, since, Message(X.address | 1 << 2, X.data)), "B7"


def test_vector_is_born_with_its_first_generation(vectors: Vectors) -> None:
    vector = add(vectors)
    born = vector.generation
    vectors.happen(vector, Event.WIDENED)
    assert (vector.born, vector.generation) == (born, born + 1)
    assert add(vectors).born == born + 2


def test_count_is_what_matches(vectors: Vectors) -> None:
    for cookie in (5, 5, 6):
        add(vectors, cookie)
    assert [vectors.count(scope) for scope in (Scope(5, 5), Scope(6, 9), EVERYTHING, Scope(9, 9))] == [2, 1, 3, 0]


def test_add_up_to_the_last_gsi_then_a_typed_error_and_nothing_changed(vectors: Vectors) -> None:
    for _ in range(4096 - 24):
        add(vectors)
    with pytest.raises(GsiExhaustedError):
        add(vectors)
    assert len(list(vectors)) == 4072


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (Deassign(3), "deassign vector 3"),
        (SetRoute(3, 9, X), "route vector 3 to FEE01000/00004041 (generation 9)"),
        (DropRoute(3), "drop the route of vector 3"),
        (Catch(3, 9, X), "catch vector 3, deliver FEE01000/00004041 (generation 9)"),
        (Assign(3, 9), "assign vector 3 (generation 9)"),
        (Assign(3, 9, delivering=True), "assign vector 3, delivering what is pending (generation 9)"),
    ],
)
def test_ops_describe_themselves(op: Deassign | SetRoute | DropRoute | Catch | CatchFault | Assign, words: str) -> None:
    assert op.describe() == words
