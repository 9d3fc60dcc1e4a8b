"""Wide invalidations: many vectors are translated again by the service rather than deassigned by the agent."""

import errno
import threading
from collections.abc import Callable

import pytest

from irqrouter.errors import KernelError
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service.wire import (
    Code,
    Command,
    Feature,
    Frame,
    Kind,
    Operation,
    SlotState,
    WireError,
    decode_scope,
    encode,
    encode_operations,
    error_frame,
)
from irqrouter.x86.msi import Message
from tests.conformance.agents import MANY, AgentTarget
from tests.conformance.operations import (
    BROADCAST,
    REFUSED_BY_KVM,
    added,
    arrives,
    assign,
    bind,
    by_entry,
    catch,
    fire,
    generation,
    pending,
    set_route,
    state,
    waits,
)
from tests.conformance.service import SILENCE, Answer
from tests.conformance.target import Background, Call, V, delivered, holding, once, seen
from tests.kvm.conftest import message


def old(at: int) -> Message:
    """The route that vector ``at`` has at first."""
    return message(0, 0x40 + at)


def new(at: int) -> Message:
    """Another."""
    return message(1, 0x60 + at)


@pytest.fixture
def many(agent: AgentTarget) -> list[V]:
    """Assigned vectors, more than an agent deassigns without asking."""
    vectors = [added(agent, index) for index in range(MANY)]
    batch = [set_route(agent, v, old(at)) for at, v in enumerate(vectors)] + [assign(agent, v) for v in vectors]
    assert agent.run(batch) == [0] * 2 * MANY
    return vectors


def routes(agent: AgentTarget, vectors: list[V], to: Callable[[int], Message | None]) -> list[Operation]:
    """What the service says: ``to`` by the vector's place, None where that fails. At the page's generation."""
    return [
        Operation(Kind.SET_ROUTE, v.number, agent.slot(v).generation, route.address, route.data)
        for at, v in enumerate(vectors)
        if (route := to(at)) is not None
    ]


def answers(agent: AgentTarget, vectors: list[V], to: Callable[[int], Message | None]) -> None:
    """The service will answer every INVALIDATE that way."""
    agent.service.on_invalidate = lambda _: routes(agent, vectors, to)


def asked(agent: AgentTarget) -> int:
    """How many INVALIDATEs there were."""
    return len(agent.service.commands(Command.INVALIDATE))


def all_wait(agent: AgentTarget, vectors: list[V]) -> bool:
    """Whether all are deassigned, and none delivers by itself."""
    return all(state(agent, v) is SlotState.DEASSIGNED and waits(agent, v) for v in vectors)


def test_unchanged_are_left_alone(agent: AgentTarget, many: list[V]) -> None:
    answers(agent, many, old)
    before = [generation(agent, v) for v in many]
    calls = [agent.hooks.calls(call) for call in Call]
    assert agent.invalidate(EVERYTHING) == MANY
    assert [agent.hooks.calls(call) for call in Call] == calls
    assert decode_scope(agent.service.commands(Command.INVALIDATE)[-1].payload) == EVERYTHING
    for at, v in enumerate(many):
        assert state(agent, v) is SlotState.ASSIGNED
        assert generation(agent, v) > before[at]
        assert arrives(agent, v) == {(0, 0x40 + at)}


def test_changed_are_rerouted_by_one_write(agent: AgentTarget, many: list[V]) -> None:
    answers(agent, many, new)
    writes, deassigns = agent.hooks.calls(Call.ROUTING), agent.hooks.calls(Call.DEASSIGN)
    assert agent.invalidate(Scope(0, 0xFFFF)) == MANY
    assert agent.hooks.calls(Call.ROUTING) == writes + 1
    assert agent.hooks.calls(Call.DEASSIGN) == deassigns
    for at, v in enumerate(many):
        assert state(agent, v) is SlotState.ASSIGNED
        assert arrives(agent, v) == {(1, 0x60 + at)}


def test_vectors_are_renewed_before_the_service_is_asked(agent: AgentTarget, many: list[V]) -> None:
    before = [generation(agent, v) for v in many]
    seen_then: list[tuple[int, int]] = []

    def look(scope: Scope) -> Answer:
        seen_then.extend((agent.slot(v).generation, agent.slot(v).state & 0xF) for v in many)
        return routes(agent, many, old)

    agent.service.on_invalidate = look
    agent.invalidate(EVERYTHING)
    assert [then > was for (then, _), was in zip(seen_then, before, strict=True)] == [True] * MANY
    assert [state for _, state in seen_then] == [SlotState.ASSIGNED] * MANY  # and left so


def test_failed_and_stale_ones_are_deassigned_a3(agent: AgentTarget, many: list[V]) -> None:
    def some(scope: Scope) -> Answer:
        answer = routes(agent, many, lambda at: old(at) if at < 2 else new(at) if at < 6 else None)
        stale = [op for op in answer if op.vector in (many[4].number, many[5].number)]
        good = [op for op in answer if op not in stale]
        return [*good, *(Operation(op.kind, op.vector, op.generation - 1, op.address, op.data) for op in stale)]

    agent.service.on_invalidate = some
    agent.invalidate(EVERYTHING)
    for at in 0, 1:
        assert arrives(agent, many[at]) == {(0, 0x40 + at)}
    for at in 2, 3:
        assert arrives(agent, many[at]) == {(1, 0x60 + at)}
    assert all_wait(agent, many[4:])


def test_doorbell_is_rung_after_what_fails_was_deassigned(agent: AgentTarget, many: list[V]) -> None:
    def none(scope: Scope) -> Answer:
        agent.service.doorbell()  # for the new generations; the states come later
        return []

    agent.service.on_invalidate = none
    agent.invalidate(EVERYTHING)
    agent.service.await_doorbell()


def test_what_fails_is_deassigned_while_its_old_route_is_in_the_table_a7(agent: AgentTarget, many: list[V]) -> None:
    answers(agent, many, lambda at: old(at) if at else None)
    early: list[set[tuple[int, int]]] = []

    def event() -> None:
        fire(agent, many[0])
        early.append(agent.bench.guest.delivered())

    agent.hooks.before(Call.DEASSIGN, event)
    agent.invalidate(EVERYTHING)
    assert early == [{(0, 0x40)}]
    assert all_wait(agent, many[:1])


@pytest.mark.parametrize("code", [0, errno.ENOMEM])
def test_refused_write_deassigns_what_it_would_have_changed_a7(agent: AgentTarget, many: list[V], code: int) -> None:
    answers(agent, many, lambda at: old(at) if at < 4 else new(at) if at < 7 or code else REFUSED_BY_KVM)
    if code:
        agent.hooks.refuse(Call.ROUTING, code)
    agent.invalidate(EVERYTHING)
    for at in range(4):
        assert arrives(agent, many[at]) == {(0, 0x40 + at)}
    assert all_wait(agent, many[4:])


def test_without_a_reply_all_are_deassigned_and_nobody_is_asked_again_before_a_ping_b6(
    agent: AgentTarget, many: list[V]
) -> None:
    agent.service.on_invalidate = lambda _: SILENCE
    agent.service.on_ping = lambda: False
    assert agent.invalidate(EVERYTHING) == MANY
    assert all_wait(agent, many)
    assert asked(agent) == 1
    answers(agent, many, old)
    for _ in range(3):
        agent.invalidate(EVERYTHING)
    agent.service.await_that("PING", lambda: agent.service.commands(Command.PING))
    agent.invalidate(EVERYTHING)
    assert asked(agent) == 1
    (ping,) = agent.service.commands(Command.PING)
    agent.service.send_request_packet(encode(Frame(ping.id, ping.command, reply=True)))
    for v in many:
        bind(agent, v, old(0))
    once(lambda: agent.invalidate(EVERYTHING) and asked(agent) == 2)


def test_late_reply_is_never_carried_out_a3(agent: AgentTarget, many: list[V]) -> None:
    agent.service.on_invalidate = lambda _: SILENCE
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many)
    (late,) = agent.service.commands(Command.INVALIDATE)
    writes = agent.hooks.calls(Call.ROUTING)
    payload = encode_operations(routes(agent, many, new))  # at the present generations: it was not too late for these
    agent.service.send_request_packet(encode(Frame(late.id, late.command, payload, reply=True)))
    added(agent, 500)  # its reply comes behind that one
    assert agent.hooks.calls(Call.ROUTING) == writes
    assert agent.run([assign(agent, v) for v in many]) == [errno.ENXIO] * MANY


def test_error_reply_deassigns_all(agent: AgentTarget, many: list[V]) -> None:
    agent.service.on_invalidate = lambda _: WireError(Code.QUOTA, "INVALIDATE", "too many")
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many)
    assert len(agent.service.sessions) == 1


@pytest.mark.parametrize("kind", [Kind.CATCH, Kind.ASSIGN, Kind.PREPARE, Kind.UPDATE])
def test_operation_that_does_not_belong_into_the_reply_ends_the_connection(
    agent: AgentTarget, many: list[V], kind: Kind
) -> None:
    agent.service.on_invalidate = lambda _: [*routes(agent, many, new), Operation(kind, many[0].number, 1)]
    agent.connected = False
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many)
    agent.await_replay(2)


def test_service_that_dies_meanwhile(agent: AgentTarget, many: list[V]) -> None:
    def die(scope: Scope) -> Answer:
        agent.service.session().sock.shutdown(2)
        return SILENCE

    agent.service.on_invalidate = die
    agent.connected = False
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many)
    agent.await_replay(2)


def test_without_a_service_all_are_deassigned(agent: AgentTarget, many: list[V]) -> None:
    agent.disconnect()
    assert agent.invalidate(EVERYTHING) == MANY
    assert all_wait(agent, many)


def test_reply_in_two_frames_is_joined(agent: AgentTarget, many: list[V]) -> None:
    def in_two(scope: Scope) -> Answer:
        command = agent.service.current
        assert command is not None
        answer = routes(agent, many, new)
        for part, more in (answer[:3], True), (answer[3:], False):
            frame = Frame(command.id, command.command, encode_operations(part), reply=True, more=more)
            agent.service.send_request_packet(encode(frame))
        return SILENCE

    agent.service.on_invalidate = in_two
    writes = agent.hooks.calls(Call.ROUTING)
    agent.invalidate(EVERYTHING)
    assert agent.hooks.calls(Call.ROUTING) == writes + 1
    for at, v in enumerate(many):
        assert arrives(agent, v) == {(1, 0x60 + at)}


def test_error_frame_ends_a_reply_whatever_came_before_it(agent: AgentTarget, many: list[V]) -> None:
    def half(scope: Scope) -> Answer:
        command = agent.service.current
        assert command is not None
        payload = encode_operations(routes(agent, many[:4], new))
        agent.service.send_request_packet(encode(Frame(command.id, command.command, payload, reply=True, more=True)))
        error = error_frame(command.id, command.command, WireError(Code.QUOTA, "INVALIDATE", "too many"))
        agent.service.send_request_packet(encode(error))
        return SILENCE

    agent.service.on_invalidate = half
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many[4:])
    for v in many[:4]:  # whether these were carried out or not: never by the old route
        fire(agent, v)
        assert not {vector for _, vector in delivered(agent)} & set(range(0x40, 0x48))


def test_broadcast_is_deassigned_rather_than_rerouted_b7(agent: AgentTarget, many: list[V]) -> None:
    assert agent.run([set_route(agent, many[0], BROADCAST)]) == [0]
    answers(agent, many, new)
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many[:1])
    for at, v in enumerate(many[1:], 1):
        assert arrives(agent, v) == {(1, 0x60 + at)}


def test_what_was_injected_from_the_work_queue_is_deassigned_rather_than_rerouted_b7(
    agent: AgentTarget, many: list[V]
) -> None:
    agent.invalidate(Scope(0, 0))
    fire(agent, many[0])
    assert agent.run([set_route(agent, many[0], old(0)), assign(agent, many[0], delivering=True)]) == [0, 0]
    assert delivered(agent) == {(0, 0x40)}
    assert seen(agent, many[0]).discarded == 1
    answers(agent, many, new)
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many[:1])
    assert arrives(agent, many[1]) == {(1, 0x61)}


def test_masked_and_deassigned_ones_are_renewed_and_stay_so(agent: AgentTarget, many: list[V]) -> None:
    idle, masked = added(agent, 20), added(agent, 21)
    agent.mask(masked)
    before = generation(agent, idle), generation(agent, masked)
    answers(agent, [*many, idle, masked], new)
    agent.invalidate(EVERYTHING)
    assert generation(agent, idle) > before[0]
    assert generation(agent, masked) > before[1]
    assert (state(agent, idle), state(agent, masked)) == (SlotState.DEASSIGNED, SlotState.MASKED)
    assert waits(agent, idle)
    assert waits(agent, masked)
    assert arrives(agent, many[0]) == {(1, 0x60)}


@pytest.mark.parametrize("verb", ["mask", "invalidate", "program", "remove"])
def test_verb_while_the_service_is_being_asked(agent: AgentTarget, many: list[V], verb: str) -> None:
    def meanwhile(scope: Scope) -> Answer:
        answer = routes(agent, many, new)
        if verb == "mask":
            agent.verbs.mask(many[0].handle)
        elif verb == "program":
            agent.verbs.program(many[0].handle, by_entry(99))
        elif verb == "remove":
            agent.verbs.remove([many[0].handle])
        else:
            agent.verbs.invalidate(Scope(0, 0))
        return answer

    agent.service.on_invalidate = meanwhile
    agent.invalidate(EVERYTHING)
    assert waits(agent, many[0])
    assert arrives(agent, many[1]) == {(1, 0x61)}
    if verb != "remove":
        assert state(agent, many[0]) is (SlotState.MASKED if verb == "mask" else SlotState.DEASSIGNED)
        assert agent.run([assign(agent, many[0])]) == [errno.ESTALE if verb == "mask" else errno.ENXIO]


def test_removal_that_has_not_ended_is_waited_for_i2(agent: AgentTarget, many: list[V]) -> None:
    """KVM may still deliver by the old route: whoever removes it meanwhile has its deassign on the way."""
    happened: list[str] = []
    deassigning, going_on = threading.Event(), threading.Event()

    def deassign() -> None:
        deassigning.set()
        going_on.wait(0.2)  # long enough for an invalidation that does not wait
        happened.append("deassigned")

    def meanwhile(scope: Scope) -> Answer:
        agent.hooks.before(Call.DEASSIGN, deassign)
        removing.start()
        assert deassigning.wait(20)
        return routes(agent, many, new)

    removing = Background(lambda: agent.verbs.remove([many[0].handle]))
    agent.service.on_invalidate = meanwhile
    with agent.unwatched():
        agent.verbs.invalidate(EVERYTHING)
        happened.append("invalidated")
        going_on.set()
        removing.join()
    assert happened == ["deassigned", "invalidated"]
    assert waits(agent, many[0])
    assert arrives(agent, many[1]) == {(1, 0x61)}


def test_two_at_once_and_the_first_answer_last_a3(agent: AgentTarget, many: list[V]) -> None:
    commands: list[Frame] = []
    answered: list[Answer] = []

    def answer(scope: Scope) -> Answer:
        command = agent.service.current
        assert command is not None
        commands.append(command)
        if len(commands) == 1:
            answered.append(routes(agent, many, old))  # read before the guest's second change
            return SILENCE
        return routes(agent, many, new)

    agent.service.on_invalidate = answer
    with Background(lambda: agent.verbs.invalidate(EVERYTHING)):
        agent.service.await_that("the first INVALIDATE", lambda: asked(agent) == 1)
        agent.verbs.invalidate(EVERYTHING)
        if answered:  # else its deadline has passed already
            (first,) = answered
            assert isinstance(first, list)
            frame = Frame(commands[0].id, commands[0].command, encode_operations(first), reply=True)
            agent.service.send_request_packet(encode(frame))
    assert len(commands) == 2
    agent.check()
    for v in many:  # rerouted or deassigned, by whichever came last; but never by what was read before the second
        fire(agent, v)
        assert not {vector for _, vector in delivered(agent)} & set(range(0x40, 0x48))


def test_two_at_once_in_order(agent: AgentTarget, many: list[V]) -> None:
    answers(agent, many, new)
    with holding(agent, Call.ROUTING, lambda: agent.verbs.invalidate(EVERYTHING)):
        second = Background(lambda: agent.verbs.invalidate(EVERYTHING))
        second.start()
        once(lambda: seen(agent, many[0]).invalidations == 2)
    second.join()
    agent.check()
    for at, v in enumerate(many):
        fire(agent, v)
        assert delivered(agent) <= {(1, 0x60 + at)}
        if state(agent, v) is SlotState.DEASSIGNED:
            assert pending(agent, v) == 1


def test_event_while_the_service_is_being_asked_is_not_lost_i1(agent: AgentTarget, many: list[V]) -> None:
    def event(scope: Scope) -> Answer:
        for v in many:
            fire(agent, v)
        return routes(agent, many, new)

    agent.service.on_invalidate = event
    agent.invalidate(EVERYTHING)
    assert delivered(agent) == {(0, 0x40 + at) for at in range(MANY)}


def test_deassign_that_fails_in_a_wide_invalidation_is_told(agent: AgentTarget, many: list[V]) -> None:
    answers(agent, many, lambda at: old(at) if at else None)
    agent.hooks.refuse(Call.DEASSIGN, errno.ENOMEM)
    with pytest.raises(KernelError):
        agent.verbs.invalidate(EVERYTHING)
    agent.invalidate(EVERYTHING)
    assert all_wait(agent, many[:1])


def test_few_are_deassigned_without_asking(agent: AgentTarget, many: list[V]) -> None:
    agent.invalidate(Scope(3, 3))
    assert asked(agent) == 0
    assert all_wait(agent, many[3:4])
    fire(agent, many[3])
    assert agent.run([catch(agent, many[3], new(3))]) == [0]


@pytest.mark.parametrize("agent_features", [Feature.PREPARE], indirect=True)
def test_nobody_is_asked_who_has_not_agreed_to_it(agent: AgentTarget, many: list[V]) -> None:
    agent.invalidate(EVERYTHING)
    assert asked(agent) == 0
    assert all_wait(agent, many)


def test_registers_are_an_invalidation_of_everything(agent: AgentTarget, many: list[V]) -> None:
    before = [generation(agent, v) for v in many]
    agent.verbs.set_registers(0x1008, 1)
    agent.check()
    assert all_wait(agent, many)  # the service has said nothing
    assert all(generation(agent, v) > was for v, was in zip(many, before, strict=True))
    header = agent.service.page_header()
    assert (header.table, header.control) == (0x1008, 1)
