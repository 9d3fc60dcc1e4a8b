"""The side with a service, in parts: what is measured, and what a fault record becomes. Whole runs: tests/cli."""

from collections.abc import Iterator

import pytest

from irqrouter.errors import CallerError
from irqrouter.iommu.vtd import cookie
from irqrouter.iommu_remap import entry
from irqrouter.proof.board import Board
from irqrouter.proof.c_agent import Timed
from irqrouter.proof.driver import SLOTS
from irqrouter.proof.machine import SimulatedMachine
from irqrouter.proof.served import AgentKind, Invalidations, ThroughAgent, _recorder, _without_a_cpu_ns, attached
from irqrouter.proof.service import ServiceProcess
from irqrouter.scope import Scope
from irqrouter.x86.msi import Message


@pytest.fixture
def board() -> Iterator[Board]:
    with Board.create(4) as made:
        yield made


def test_invalidations_of_which_there_are_none_take_no_time() -> None:
    times = Invalidations()
    assert (len(times), times.median_us(), times.longest_us(), times.longest_wait_us()) == (0, 0, 0, 0)
    assert times.held_up_longer_than_us(0) == 0


def test_invalidations_are_summed_up() -> None:
    times = Invalidations()
    for ns in (1000, 5000, 70_000_000):
        times.add(Timed(1, ns, 0), without_a_cpu_ns=0)
    assert (len(times), times.median_us(), times.longest_us()) == (3, 5.0, 70_000.0)


def test_time_without_a_cpu_is_not_held_against_the_service() -> None:
    times = Invalidations()
    for waited_ns, without_a_cpu_ns in ((0, 9_000_000), (50_000_000, 0), (80_000_000, 20_000_000)):
        times.add(Timed(1, 90_000_000, waited_ns), without_a_cpu_ns=without_a_cpu_ns)
    assert times.longest_wait_us() == 80_000
    assert [times.held_up_longer_than_us(limit) for limit in (0, 49_999, 50_000, 59_999, 60_000)] == [2, 2, 1, 1, 0]


def test_time_without_a_cpu_is_the_threads_own() -> None:
    before = _without_a_cpu_ns()
    assert 0 <= before <= _without_a_cpu_ns()


def test_fault_record_counts_for_the_vector_whose_entry_it_names(board: Board) -> None:
    record = _recorder(board)
    for index in (0, 2 * SLOTS, 2 * SLOTS + 1):
        record("whoever", (index << 48, 0x8000_0022_0000_0018))
    assert [board.history(vector).faults() for vector in range(4)] == [1, 0, 2, 0]


class FakeAgent:
    """Answers what :class:`ThroughAgent` asks of an agent in these tests."""

    def __init__(self) -> None:
        self.programmed: list[Message] = []

    def add(self, eventfd: int, message: Message, *, requester: int, masked: bool = False) -> str:
        return f"handle of {eventfd}"

    def program(self, vector: str, message: Message) -> None:
        self.programmed.append(message)


def test_verbs_through_an_agent_are_measured_and_follow_the_message() -> None:
    agent = FakeAgent()
    scopes: list[Scope] = []

    def timed(scope: Scope) -> Timed:
        scopes.append(scope)
        return Timed(3, 42_000, 0)

    through: ThroughAgent[str] = ThroughAgent(agent, timed)  # type: ignore[arg-type]
    assert through.invalidate(entry(5)) == 3
    assert (scopes, through.invalidations.longest_us()) == ([entry(5)], 42.0)
    first, second = Message(0xFEE000B8, 0), Message(0xFEE000B8, 1)
    held = through.add(7, first, requester=0x18)
    assert (held.handle, held.cookie) == ("handle of 7", cookie(first))
    through.program(held, second)
    assert (held.cookie, agent.programmed) == (cookie(second), [second])


@pytest.mark.asyncio
async def test_simulated_machine_cannot_be_served(board: Board) -> None:
    with SimulatedMachine(1) as machine, ServiceProcess() as service:
        with pytest.raises(CallerError, match="needs /dev/kvm"):
            async with attached(machine, board, service, AgentKind.C):
                pass
        assert not service.pid
