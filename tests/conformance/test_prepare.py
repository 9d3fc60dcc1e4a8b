"""``PREPARE``: a decision that stands, served by the agent alone."""

import errno
from collections.abc import Callable, Iterator

import pytest

from irqrouter.scope import Scope
from irqrouter.service.wire import Feature, Kind, Operation, SlotState
from irqrouter.x86.msi import Message
from tests.conformance.agents import AgentTarget
from tests.conformance.conftest import PREPARING, open_agent, require_kvm
from tests.conformance.operations import (
    REFUSED_BY_KVM,
    added,
    arrives,
    bound,
    by_entry,
    catch,
    fire,
    generation,
    pending,
    state,
    waits,
)
from tests.conformance.target import V, delivered, once, seen
from tests.kvm.conftest import message


@pytest.fixture(params=PREPARING)
def agent(request: pytest.FixtureRequest, nothing_leaks: None) -> Iterator[AgentTarget]:
    """The agents that offer it."""
    name: str = request.param
    require_kvm(name)
    with open_agent(name) as opened:
        hello = opened.service.session().hello
        assert hello is not None
        assert Feature.PREPARE in hello.features
        yield opened


def prepare(agent: AgentTarget, v: V, to: Message, at: int | None = None) -> Operation:
    """At generation ``at``, or the vector's present one."""
    return Operation(Kind.PREPARE, v.number, generation(agent, v) if at is None else at, to.address, to.data)


def served(agent: AgentTarget, v: V, to: tuple[int, int]) -> None:
    """One event is delivered, without the service."""
    fire(agent, v)
    once(lambda: pending(agent, v) == 0)
    found: set[tuple[int, int]] = set()

    def arrived() -> bool:
        found.update(delivered(agent))
        return bool(found)

    once(arrived)
    assert found == {to}


def is_assigned_by_itself(agent: AgentTarget, v: V, to: tuple[int, int]) -> None:
    """The first event is caught, and one of the next, when the route is there, has KVM deliver from then on."""
    served(agent, v, to)
    assert seen(agent, v).caught == 1
    while state(agent, v) is not SlotState.ASSIGNED:
        served(agent, v, to)
    assert arrives(agent, v) == {to}
    once(lambda: not delivered(agent))


def test_prepared_vector_is_caught_then_routed_then_assigned(agent: AgentTarget) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    assert agent.prepared(v)
    assert state(agent, v) is SlotState.DEASSIGNED
    assert delivered(agent) == set()
    is_assigned_by_itself(agent, v, (1, 0x41))
    assert agent.slot(v).last_catch_ns > 0
    assert seen(agent, v).refused == 0
    assert seen(agent, v).stale == 0


def test_event_that_is_pending_already_is_served(agent: AgentTarget) -> None:
    v = added(agent)
    fire(agent, v, 3)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    once(lambda: pending(agent, v) == 0)
    once(lambda: seen(agent, v).caught == 1)
    assert delivered(agent) == {(1, 0x41)}


def test_prepared_vector_is_served_without_a_service(agent: AgentTarget) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    agent.disconnect()
    is_assigned_by_itself(agent, v, (1, 0x41))
    agent.reconnect()
    assert state(agent, v) is SlotState.ASSIGNED


def test_decision_stands_over_a_reconnection(agent: AgentTarget) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    agent.disconnect()
    agent.reconnect()
    assert agent.prepared(v)
    is_assigned_by_itself(agent, v, (1, 0x41))


VERBS: dict[str, Callable[[AgentTarget, V], object]] = {
    "invalidate": lambda agent, v: agent.invalidate(Scope(5, 5)),
    "mask": lambda agent, v: agent.mask(v),
    "program": lambda agent, v: agent.program(v, by_entry(9)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_decision_ends_with_the_generation(agent: AgentTarget, verb: str) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    agent.service.doorbell()
    VERBS[verb](agent, v)
    assert not agent.prepared(v)
    agent.service.await_doorbell()
    assert waits(agent, v)
    if verb == "mask":
        agent.unmask(v)
        assert not agent.prepared(v)
        assert delivered(agent) == set()
    assert agent.run([catch(agent, v, message(0, 0x42))]) == [0]
    assert delivered(agent) == {(0, 0x42)}


def test_no_event_after_invalidate_is_served_by_the_old_decision_i2(agent: AgentTarget) -> None:
    v = added(agent)
    for _ in range(50):
        assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
        agent.invalidate(Scope(5, 5))
        assert waits(agent, v)
        assert agent.run([catch(agent, v, message(0, 0x42))]) == [0]
        assert delivered(agent) == {(0, 0x42)}


def test_removed_while_prepared(agent: AgentTarget) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    agent.remove(v)
    assert waits(agent, v)


def test_prepare_is_refused_as_the_others_are(agent: AgentTarget) -> None:
    v, assigned, masked = added(agent, 5), bound(agent, 6), added(agent, 7, masked=True)
    to = message(0, 0x66)
    operations = [
        prepare(agent, v, to, generation(agent, v) + 1),
        prepare(agent, assigned, to),
        prepare(agent, masked, to),
        Operation(Kind.PREPARE, 4000, 1, to.address, to.data),
    ]
    assert agent.run(operations) == [errno.ESTALE, errno.EALREADY, errno.ESTALE, errno.ESTALE]
    assert waits(agent, v)
    assert arrives(agent, assigned) == {(1, 0x41)}
    assert waits(agent, masked)


def test_error_in_serving_ends_the_decision_and_loses_nothing(agent: AgentTarget) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, REFUSED_BY_KVM)]) == [0]
    agent.service.doorbell()
    fire(agent, v)
    agent.service.await_doorbell()
    once(lambda: not agent.prepared(v))
    once(lambda: seen(agent, v).refused == errno.EINVAL)
    agent.check()
    assert state(agent, v) is SlotState.DEASSIGNED
    assert pending(agent, v) > 0
    assert agent.run([catch(agent, v, message(0, 0x42))]) == [0]
    assert delivered(agent) == {(0, 0x42)}


def test_second_decision_replaces_the_first(agent: AgentTarget) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    assert agent.run([prepare(agent, v, message(0, 0x42))]) == [0]
    served(agent, v, (0, 0x42))


def test_catch_of_a_prepared_vector_competes_for_the_event_and_never_doubles_it_i3(agent: AgentTarget) -> None:
    v = added(agent)
    assert agent.run([prepare(agent, v, message(1, 0x41))]) == [0]
    fire(agent, v)
    result = agent.run([catch(agent, v, message(0, 0x42))])
    once(lambda: pending(agent, v) == 0)
    found: set[tuple[int, int]] = set()

    def arrived() -> bool:
        found.update(delivered(agent))
        return bool(found)

    once(arrived)
    assert found == ({(0, 0x42)} if result == [0] else {(1, 0x41)})
