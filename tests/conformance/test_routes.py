"""The routing table: one write for a batch, none for nothing new, and what a refusal leaves."""

import errno

import pytest

from irqrouter.errors import IrqrouterError
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service.wire import SlotState
from tests.conformance.conftest import EXECUTORS
from tests.conformance.operations import (
    REFUSED_BY_KVM,
    added,
    arrives,
    assign,
    bind,
    bound,
    catch,
    fire,
    generation,
    pending,
    set_route,
    state,
    waits,
)
from tests.conformance.target import Background, Call, Target, V, delivered, holding, once, raise_line, seen
from tests.kvm.conftest import message


def writes(target: Target) -> int:
    return target.hooks.calls(Call.ROUTING)


# --- how often -------------------------------------------------------------------------------------------------------


def test_one_table_write_for_a_batch(target: Target) -> None:
    vectors = [added(target, index) for index in range(8)]
    before = writes(target)
    batch = [set_route(target, v, message(0, 0x40 + at)) for at, v in enumerate(vectors)]
    batch += [assign(target, v) for v in vectors]
    assert target.run(batch) == [0] * 16
    assert writes(target) == before + 1
    for at, v in enumerate(vectors):
        assert arrives(target, v) == {(0, 0x40 + at)}


def test_routes_and_assigns_may_alternate(target: Target) -> None:
    vectors = [added(target, index) for index in range(4)]
    batch = [
        op for at, v in enumerate(vectors) for op in (set_route(target, v, message(0, 0x40 + at)), assign(target, v))
    ]
    assert target.run(batch) == [0] * 8
    for at, v in enumerate(vectors):
        assert arrives(target, v) == {(0, 0x40 + at)}


def test_batch_that_only_routes_ends_with_the_write_a7(target: Target) -> None:
    first, second = bound(target, 5), bound(target, 6)
    before = writes(target)
    batch = [set_route(target, first, message(0, 0x51)), set_route(target, second, message(0, 0x52))]
    assert target.run(batch) == [0, 0]
    assert writes(target) == before + 1
    assert arrives(target, first) == {(0, 0x51)}
    assert arrives(target, second) == {(0, 0x52)}


def test_unchanged_table_is_not_written(target: Target) -> None:
    v = bound(target)
    before = writes(target)
    assert target.run([set_route(target, v, message(1, 0x41))]) == [0]
    target.invalidate(EVERYTHING)
    assert target.run([set_route(target, v, message(1, 0x41)), assign(target, v)]) == [0, 0]
    assert writes(target) == before
    assert arrives(target, v) == {(1, 0x41)}


def test_batch_without_routes_writes_no_table(target: Target) -> None:
    v = added(target)
    fire(target, v)
    before = writes(target)
    assert target.run([catch(target, v, message(1, 0x41))]) == [0]
    assert writes(target) == before


def test_stale_route_writes_no_table_a3(target: Target) -> None:
    v = bound(target)
    late = set_route(target, v, message(0, 0x66))
    target.invalidate(Scope(5, 5))
    bind(target, v, message(1, 0x42))
    before = writes(target)
    assert target.run([late]) == [errno.ESTALE]
    assert writes(target) == before
    assert arrives(target, v) == {(1, 0x42)}


def test_last_route_of_a_batch_counts(target: Target) -> None:
    v = added(target)
    batch = [set_route(target, v, message(0, 0x51)), set_route(target, v, message(0, 0x52)), assign(target, v)]
    assert target.run(batch) == [0, 0, 0]
    assert arrives(target, v) == {(0, 0x52)}


def test_verbs_write_no_table(target: Target) -> None:
    v = bound(target)
    before = writes(target)
    target.mask(v)
    target.unmask(v)
    target.program(v, seen(target, v).message)
    target.invalidate(EVERYTHING)
    assert writes(target) == before


# --- a refused table -------------------------------------------------------------------------------------------------


def test_refused_table_deassigns_what_it_would_have_changed_a7(target: Target) -> None:
    changing, resting = bound(target, 5), bound(target, 6, message(0, 0x52))
    old = generation(target, changing)
    assert target.run([set_route(target, changing, REFUSED_BY_KVM)]) == [errno.EINVAL]
    assert state(target, changing) is SlotState.DEASSIGNED
    assert generation(target, changing) > old
    assert seen(target, changing).refused == errno.EINVAL
    assert waits(target, changing)
    assert state(target, resting) is SlotState.ASSIGNED
    assert arrives(target, resting) == {(0, 0x52)}


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL])
def test_refused_table_fails_every_route_that_was_in_it(target: Target, code: int) -> None:
    live, new = bound(target, 5), added(target, 6)
    target.hooks.refuse(Call.ROUTING, code)
    batch = [set_route(target, live, message(0, 0x51)), set_route(target, new, message(0, 0x52))]
    assert target.run(batch) == [code, code]
    assert (state(target, live), state(target, new)) == (SlotState.DEASSIGNED, SlotState.DEASSIGNED)
    assert waits(target, live)
    assert waits(target, new)


def test_refused_table_fails_the_assign_that_needs_it(target: Target) -> None:
    v = added(target)
    fire(target, v)
    errnos = target.run([set_route(target, v, REFUSED_BY_KVM), assign(target, v)])
    assert errnos[0] == errno.EINVAL
    assert errnos[1] != 0
    assert state(target, v) is SlotState.DEASSIGNED
    assert pending(target, v) == 1
    assert delivered(target) == set()


def test_refused_table_does_not_fail_unchanged_routes(target: Target) -> None:
    unchanged, changing = bound(target, 5), bound(target, 6)
    batch = [set_route(target, unchanged, message(1, 0x41)), set_route(target, changing, REFUSED_BY_KVM)]
    assert target.run(batch) == [0, errno.EINVAL]
    assert arrives(target, unchanged) == {(1, 0x41)}
    assert state(target, changing) is SlotState.DEASSIGNED


def test_refused_route_does_not_fail_later_writes(target: Target) -> None:
    bad, good = added(target, 5), added(target, 6)
    assert target.run([set_route(target, bad, REFUSED_BY_KVM)]) == [errno.EINVAL]
    assert target.run([set_route(target, good, message(0, 0x52)), assign(target, good)]) == [0, 0]
    assert arrives(target, good) == {(0, 0x52)}
    assert target.run([set_route(target, bad, message(0, 0x51)), assign(target, bad)]) == [0, 0]
    assert arrives(target, bad) == {(0, 0x51)}


def test_refused_write_leaves_the_old_routes_live_until_the_deassign_a7(target: Target) -> None:
    v = bound(target)
    early: list[set[tuple[int, int]]] = []

    def event() -> None:
        fire(target, v)
        early.append(target.bench.guest.delivered())

    target.hooks.before(Call.DEASSIGN, event)
    assert target.run([set_route(target, v, REFUSED_BY_KVM)]) == [errno.EINVAL]
    assert early == [{(1, 0x41)}]


def test_same_route_as_before_after_a_refused_one_needs_no_write(target: Target) -> None:
    v = bound(target)
    assert target.run([set_route(target, v, REFUSED_BY_KVM)]) == [errno.EINVAL]
    before = writes(target)
    assert target.run([set_route(target, v, message(1, 0x41)), assign(target, v)]) == [0, 0]
    assert writes(target) == before
    assert arrives(target, v) == {(1, 0x41)}


def test_route_that_changes_while_a_table_is_being_written_i4(target: Target) -> None:
    v, other = added(target, 5), added(target, 6)
    first = [set_route(target, v, message(0, 0x51))]
    with holding(target, Call.ROUTING, lambda: target.set_foreign_routes({3: message(0, 0x33)})):
        target.invalidate(Scope(5, 5))  # waits for no table
        assert waits(target, v)
    assert target.run(first) == [errno.ESTALE]
    fire(target, other)
    assert target.run([catch(target, v, message(0, 0x52))]) == [0]
    assert delivered(target) == {(0, 0x52)}


# --- the VMM's own routes --------------------------------------------------------------------------------------------


def test_foreign_routes_are_merged_and_survive_other_writes(target: Target) -> None:
    v = bound(target)
    target.set_foreign_routes({2: message(0, 0x32), 5: message(1, 0x35)})
    assert arrives(target, v) == {(1, 0x41)}
    other = bound(target, 6, message(0, 0x52))
    target.invalidate(EVERYTHING)
    bind(target, v, message(0, 0x42))
    target.remove(other)
    for gsi, where in (2, (0, 0x32)), (5, (1, 0x35)):
        raise_line(target, gsi)
        assert delivered(target) == {where}


def test_foreign_routes_replace_those_before(target: Target) -> None:
    target.set_foreign_routes({2: message(0, 0x32), 5: message(1, 0x35)})
    target.set_foreign_routes({5: message(0, 0x36)})
    raise_line(target, 5)
    assert delivered(target) == {(0, 0x36)}
    raise_line(target, 2)
    assert delivered(target) == set()
    target.set_foreign_routes({})
    raise_line(target, 5)
    assert delivered(target) == set()


def test_foreign_routes_that_are_unchanged_are_not_written(target: Target) -> None:
    target.set_foreign_routes({2: message(0, 0x32)})
    before = writes(target)
    target.set_foreign_routes({2: message(0, 0x32)})
    assert writes(target) == before


def test_foreign_route_of_a_vectors_gsi_is_refused(target: Target) -> None:
    v = bound(target)
    target.set_foreign_routes({2: message(0, 0x32)})
    with pytest.raises(IrqrouterError):
        target.set_foreign_routes({3: message(0, 0x33), seen(target, v).gsi: message(0, 0x34)})
    assert arrives(target, v) == {(1, 0x41)}
    raise_line(target, 3)
    assert delivered(target) == set()
    raise_line(target, 2)
    assert delivered(target) == {(0, 0x32)}


def test_foreign_route_of_no_gsi_is_refused(target: Target) -> None:
    before = writes(target)
    with pytest.raises(IrqrouterError):
        target.set_foreign_routes({target.bench.guest.vm.routes_max: message(0, 0x33)})
    assert writes(target) == before


def test_foreign_routes_that_kvm_refuses_leave_those_before(target: Target) -> None:
    v = bound(target)
    target.set_foreign_routes({2: message(0, 0x32)})
    with pytest.raises(IrqrouterError):
        target.set_foreign_routes({2: message(0, 0x39), 3: REFUSED_BY_KVM})
    target.hooks.refuse(Call.ROUTING, errno.ENOMEM)
    with pytest.raises(IrqrouterError):
        target.set_foreign_routes({2: message(0, 0x39)})
    assert arrives(target, v) == {(1, 0x41)}
    bound(target, 6, message(0, 0x52))  # the table can be written
    raise_line(target, 2)
    assert delivered(target) == {(0, 0x32)}


def test_vector_takes_no_gsi_of_a_foreign_route(target: Target) -> None:
    gsi = seen(target, added(target)).gsi
    target.set_foreign_routes({gsi + 1: message(0, 0x33)})
    v = bound(target, 6)
    assert seen(target, v).gsi not in (gsi, gsi + 1)
    raise_line(target, gsi + 1)
    assert delivered(target) == {(0, 0x33)}


def test_gsi_of_a_removed_vector_has_no_route(target: Target) -> None:
    v = bound(target)
    gsi = seen(target, v).gsi
    target.remove(v)
    raise_line(target, gsi)
    assert delivered(target) == set()
    target.set_foreign_routes({gsi: message(0, 0x33)})
    raise_line(target, gsi)
    assert delivered(target) == {(0, 0x33)}


def test_late_route_never_reaches_the_next_owner_of_the_gsi_i5(target: Target) -> None:
    former = bound(target)
    gsi, late = seen(target, former).gsi, set_route(target, former, message(0, 0x66))
    target.remove(former)
    owner = bound(target, 6, message(1, 0x42))
    assert seen(target, owner).gsi == gsi
    assert target.run([late]) == [errno.ESTALE]
    assert arrives(target, owner) == {(1, 0x42)}
    gone = V(former.number, former.fd, None)
    fire(target, gone)
    assert delivered(target) == set()


# The table of the agent in Python is the executor's; its add() returns only when the write that is held here has ended.
@pytest.mark.parametrize("target", [*EXECUTORS, "agent-c"], indirect=True)
def test_gsi_of_a_foreign_route_is_not_free_before_kvm_has_let_it_go_i4(target: Target) -> None:
    """KVM may refuse the table without it, and then it is the VMM's as before."""
    gsi = seen(target, added(target)).gsi + 1
    target.set_foreign_routes({gsi: message(0, 0x33)})
    made: list[V] = []

    def replace() -> None:
        with pytest.raises(IrqrouterError):
            target.set_foreign_routes({})

    target.hooks.refuse(Call.ROUTING, errno.ENOMEM)
    adding = Background(lambda: made.append(added(target, 6)))
    with target.unwatched():
        with holding(target, Call.ROUTING, replace):
            adding.start()
            once(lambda: len(target.vectors()) == 2)
        adding.join()
    (v,) = made
    bind(target, v, message(0, 0x42))
    raise_line(target, gsi)
    assert delivered(target) == {(0, 0x33)}
    target.set_foreign_routes({})
    assert arrives(target, v) == {(0, 0x42)}


def test_gsi_of_an_irqfd_that_kvm_has_kept_is_no_other_vectors_i5(target: Target) -> None:
    former = bound(target)
    target.hooks.refuse(Call.DEASSIGN, errno.ENOMEM)
    with pytest.raises(IrqrouterError):
        target.remove(former)
    bound(target, 6, message(1, 0x42))
    fire(target, former)
    assert delivered(target) == set()
