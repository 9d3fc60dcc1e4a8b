"""``TRANSLATE``: the VMM has a remapping unit of its own, and the service asks."""

import threading
from collections.abc import Iterator

import pytest

from irqrouter.iommu.fault import Fault, RecordedFault
from irqrouter.scope import Scope
from irqrouter.service.wire import (
    IN_TRANSLATED,
    Command,
    Kind,
    Operation,
    RemapperKind,
    decode_operations,
)
from irqrouter.x86.msi import Message, Request
from tests.conformance.agents import AgentTarget
from tests.conformance.conftest import AGENTS, open_agent, require_kvm
from tests.conformance.operations import NOBODYS, RECORD, added, by_entry, generation
from tests.conformance.target import REQUESTER, Background, V, seen
from tests.kvm.conftest import message


@pytest.fixture(params=list(AGENTS))
def agent(request: pytest.FixtureRequest, nothing_leaks: None) -> Iterator[AgentTarget]:
    """Both agents, in a VMM that translates: entry 5 to vCPU 1, vector 41h; others are blocked."""
    name: str = request.param
    require_kvm(name)

    def translate(asked: Request) -> Message | Fault:
        if asked == Request(by_entry(5), REQUESTER):
            return message(1, 0x41)
        return RecordedFault(requester=asked.requester, recorded=True, low=RECORD[0], high=RECORD[1])

    with open_agent(name, translate=translate) as opened:
        yield opened


def translated(agent: AgentTarget, *operations: Operation) -> list[Operation]:
    """What the agent answers."""
    reply = agent.service.batch(operations, Command.TRANSLATE)
    assert not reply.errno
    return decode_operations(reply.payload, IN_TRANSLATED)


def miss(agent: AgentTarget, v: V) -> Operation:
    return Operation(Kind.MISS, v.number, generation(agent, v))


def test_greeting_says_so(agent: AgentTarget) -> None:
    hello = agent.service.session().hello
    assert hello is not None
    assert (hello.remapper, hello.host_address_width) == (RemapperKind.VMM, 0)


def test_miss_is_answered_with_update_or_fault_in_order(agent: AgentTarget) -> None:
    good, bad = added(agent, 5), added(agent, 6)
    to = message(1, 0x41)
    update = Operation(Kind.UPDATE, good.number, generation(agent, good), to.address, to.data)
    fault = Operation(Kind.FAULT, bad.number, generation(agent, bad), record=RECORD)
    assert translated(agent, miss(agent, bad), miss(agent, good), miss(agent, bad)) == [fault, update, fault]
    assert agent.faults == []  # the VMM records nothing yet


def test_miss_of_what_is_gone_or_not_at_that_generation_is_answered_with_miss(agent: AgentTarget) -> None:
    v, gone = added(agent, 5), added(agent, 5)
    asked = [miss(agent, gone), Operation(Kind.MISS, NOBODYS, 1), miss(agent, v)]
    agent.remove(gone)
    agent.invalidate(Scope(5, 5))
    found = translated(agent, *asked)
    assert [(op.kind, op.vector) for op in found] == [(Kind.MISS, op.vector) for op in asked]


def test_generation_is_sampled_before_the_vmm_looks_c1(agent: AgentTarget) -> None:
    v = added(agent, 5)
    before = generation(agent, v)
    looking, invalidated = threading.Event(), threading.Event()

    def looks(asked: Request) -> Message | Fault:
        looking.set()
        assert invalidated.wait(20)
        return message(1, 0x41)

    def moves() -> None:
        assert looking.wait(20)
        agent.verbs.invalidate(Scope(5, 5))
        invalidated.set()

    agent.translate = looks
    with Background(moves):
        (found,) = translated(agent, Operation(Kind.MISS, v.number, before))
    assert generation(agent, v) > before
    assert found.generation == before or found.kind is Kind.MISS


def test_cookie_is_the_vmms(agent: AgentTarget) -> None:
    assert seen(agent, added(agent, 5)).cookie == 5
    assert agent.invalidate(Scope(5, 5)) == 1
