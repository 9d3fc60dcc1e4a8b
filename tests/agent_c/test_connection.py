"""Services come and go; what the agent knows stays."""

import os
import time
from pathlib import Path

import pytest

from irqrouter.core.machine import State
from irqrouter.iommu.fault import Fault, RecordedFault
from irqrouter.iommu_remap import EVERYTHING, entry
from irqrouter.scope import Scope
from irqrouter.service import wire
from irqrouter.service.wire import Command, Kind, Operation, RemapperKind, SlotState
from irqrouter.x86.msi import Message, Request
from tests.agent_c.fake import FakeService, Session, eventually
from tests.agent_c.world import REQUESTER, World, remappable, to


def test_reconnects_and_tells_everything_again(world: World, session: Session) -> None:
    vectors = world.add(session, to(0x31), None, to(0x33))
    world.agent.mask(vectors[2][0])
    generations = [session.generation(vector.id) for vector, _ in vectors]
    session.close()
    eventually(lambda: not world.agent.connected)
    session = world.accept()
    session.welcome()
    frame, added = session.expect_add()
    assert added == [wire.Added(vector.id, vector.born, new=False) for vector, _ in vectors]
    assert world.states(session, vectors) == [SlotState.ASSIGNED, SlotState.DEASSIGNED, SlotState.MASKED]
    assert [session.generation(vector.id) for vector, _ in vectors] == generations  # they never restart
    session.reply_operations(frame, [])
    assert world.agent.wait_connected(10)
    assert world.agent.stats().connections == 2
    os.eventfd_write(vectors[0][1], 1)
    assert world.arrived() == [(0, 0x31)]  # assigned all the while


def test_c3_a_decision_that_stands_is_served_without_a_service(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    session.run(session.op(Kind.PREPARE, vector.id, to(0x34)))
    session.close()
    world.service.close()
    eventually(lambda: not world.agent.connected)
    os.eventfd_write(fd, 1)
    assert world.next_arrived() == [(0, 0x34)]
    eventually(lambda: world.status(vector).route == to(0x34))
    os.eventfd_write(fd, 1)
    assert world.next_arrived() == [(0, 0x34)]
    eventually(lambda: world.status(vector).state is State.ASSIGNED)
    # And what does not stand waits.
    assert world.agent.invalidate(EVERYTHING) == 1
    os.eventfd_write(fd, 1)
    assert world.pending(fd) == 1
    assert world.arrived() == []


def test_invalidations_need_no_service(world: World, session: Session) -> None:
    vectors = world.add(session, *[to(0x30 + n) for n in range(8)])
    session.close()
    eventually(lambda: not world.agent.connected)
    assert world.agent.invalidate(EVERYTHING) == 8
    assert {status.state for status in world.agent.vectors()} == {State.DEASSIGNED}
    assert world.agent.stats().fallbacks == 1
    for _, fd in vectors:
        os.eventfd_write(fd, 1)
    assert world.arrived() == []


def test_what_is_added_meanwhile_is_told_then(world: World) -> None:
    session = world.accept()
    first = world.agent.add_all([world.source(n) for n in range(300)])
    session.welcome()
    frame, added = session.expect_add()
    assert len(added) == 240
    frame_2, added_2 = session.expect_add()
    later = world.agent.add_all([world.source(400)])  # the service does not know everything yet
    session.reply_operations(frame, [])
    session.reply_operations(frame_2, [])
    frame, added_3 = session.expect_add()
    assert not world.agent.connected
    session.reply_operations(frame, [])
    assert world.agent.wait_connected(10)
    assert [each.vector for each in added + added_2 + added_3] == [vector.id for vector in first + later]
    assert not any(each.new for each in added + added_2 + added_3)


def test_a_service_that_does_not_take_the_replay_is_left_and_tried_again(world: World) -> None:
    world.agent.add(world.eventfd(), remappable(0), requester=REQUESTER)
    session = world.accept()
    session.welcome()
    frame, _ = session.expect_add()
    session.refuse(frame, wire.WireError(wire.Code.DESCRIPTOR, "vector 0", "is another VM's", errno=16))
    assert session.ended()
    session = world.accept()
    session.welcome()
    frame, _ = session.expect_add()
    session.reply_operations(frame, [])
    assert world.agent.wait_connected(10)


@pytest.mark.parametrize("which", ["request", "batch"])
def test_either_socket_ends_the_connection(world: World, session: Session, which: str) -> None:
    getattr(session, which).close()
    if which == "batch":
        assert session.ended()
    world.attach()


def test_an_old_doorbell_is_not_the_new_one(world: World, session: Session) -> None:
    """A service that was stopped while it was replaced must not take what rings for its successor."""
    world.add_one(session)
    old = os.dup(session.doorbell)
    world.eventfds.append(old)
    session.close()
    session = world.accept()
    session.welcome()
    frame, _ = session.expect_add()
    session.reply_operations(frame, [])
    assert world.agent.wait_connected(10)
    assert session.rung()
    try:
        os.eventfd_read(old)
    except BlockingIOError:
        pass
    world.agent.invalidate(entry(0))
    assert session.rung()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(old)


def test_replies_that_do_not_fit_wait_for_room(world: World, session: Session) -> None:
    """The service sends batches and reads no answers: the agent reads no more of them until it does."""
    vector, _ = world.add_one(session)
    session.batch.setblocking(False)
    sent = 0
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            session.send_batch([session.op(Kind.SET_ROUTE, vector.id, to(0x31))])
            sent += 1
        except BlockingIOError:
            break
    session.batch.settimeout(10)
    for number in range(1, sent + 1):
        packet, *_ = session.batch.recvmsg(wire.FRAME_MAX)
        assert wire.decode(packet).id == number
    assert session.run(session.op(Kind.SET_ROUTE, vector.id, to(0x32))) == [0]


def test_closing_leaves_nothing_bound(tmp_path: Path, nothing_leaks: None) -> None:
    with World(tmp_path) as world:
        session = world.attach()
        vectors = world.add(session, to(0x31), to(0x32))
        world.agent.close()
        world.agent.close()
        for _, fd in vectors:
            os.eventfd_write(fd, 1)
        assert world.arrived() == []
        assert [world.pending(fd) for _, fd in vectors] == [1, 1]
        assert session.ended()


def test_c1_the_vmm_translates_under_the_generation_that_was_asked_for(tmp_path: Path) -> None:
    asked: list[Request] = []
    outcomes: list[Message | Fault] = []

    def translate(request: Request) -> Message | Fault:
        asked.append(request)
        return outcomes.pop(0)

    with World(
        tmp_path, remapper=RemapperKind.VMM, translate=translate, cookie=lambda request: request.requester
    ) as world:
        session = world.attach()
        assert (session.hello.remapper, session.hello.host_address_width) == (RemapperKind.VMM, 0)
        vector, _ = world.add_one(session)
        assert session.slot(vector.id).cookie == REQUESTER
        outcomes[:] = [to(0x41), RecordedFault(requester=REQUESTER, recorded=True, low=7, high=1 << 127 - 64)]
        generation = session.generation(vector.id)
        gone = Operation(Kind.MISS, 99, 1)
        answers = session.translate(
            Operation(Kind.MISS, vector.id, generation), gone, Operation(Kind.MISS, vector.id, generation)
        )
        assert answers == [
            Operation(Kind.UPDATE, vector.id, generation, to(0x41).address, to(0x41).data),
            gone,
            Operation(Kind.FAULT, vector.id, generation, record=(7, 1 << 63)),
        ]
        assert asked == [Request(remappable(0), REQUESTER)] * 2
        assert world.agent.invalidate(Scope(REQUESTER, REQUESTER)) == 1
        old = Operation(Kind.MISS, vector.id, generation)
        assert session.translate(old) == [old]
        assert len(asked) == 2
        # A wide invalidation is never asked for: the VMM would have to answer while it waits.
        vectors = world.add(session, *[to(0x50 + n) for n in range(8)], first=1)
        assert world.agent.invalidate(EVERYTHING) == 9
        assert session.silent()
        assert set(world.states(session, vectors)) == {SlotState.DEASSIGNED}


def _thread_cpu_ns(name: str) -> int:
    """The CPU time of this process' thread of that name."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text("ascii").strip() == name:
            return int((task / "schedstat").read_text("ascii").split()[0])
    raise AssertionError(name)


def test_a_service_that_leaves_all_commands_unanswered_but_pings_costs_no_cpu(tmp_path: Path) -> None:
    with World(tmp_path, deadline_s=0.001) as world:
        session = world.attach()
        vectors = world.add(session, *[to(0x30 + n) for n in range(5)])
        unanswered = 0
        while True:
            assert world.agent.invalidate(EVERYTHING) == 5
            session.expect(Command.INVALIDATE)
            unanswered += 1
            if unanswered == wire.UNANSWERED_MAX:
                break
            ping, _ = session.expect(Command.PING)
            session.reply(ping)
            eventually(lambda: not world.agent.stats().breaker_open)
            operations = [session.op(Kind.SET_ROUTE, vector.id, to(0x30 + vector.id)) for vector, _ in vectors]
            operations += [session.op(Kind.ASSIGN, vector.id) for vector, _ in vectors]
            assert set(session.run(*operations)) == {0}
        before = _thread_cpu_ns("irqrouter")
        assert session.silent(0.3)  # one more would be too many
        assert _thread_cpu_ns("irqrouter") - before < 100_000_000


def test_waits_for_a_service_that_is_not_there(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        world.service.close()
        assert not world.agent.wait_connected(0.05)
        world.path.unlink()
        world.service = FakeService(world.path)
        world.attach()
        assert any("no service" in text for text in world.said)
        world.service.close()


def test_a_service_that_does_not_answer_add_holds_it_up_for_a_bounded_time(world: World, session: Session) -> None:
    """And is told again: it may have decided meanwhile, and wait for that to be carried out, which is never done."""
    began = time.monotonic()
    vector = world.agent.add_all([world.source(1)])[0]
    assert 1 < time.monotonic() - began < 5
    assert session.state(vector.id) == SlotState.DEASSIGNED
    session.expect_add()
    assert session.ended()
    session = world.accept()
    session.welcome()
    frame, added = session.expect_add()
    assert added == [wire.Added(vector.id, vector.born, new=False)]
    session.reply_operations(frame, [])
    assert world.agent.wait_connected(10)
    assert world.agent.stats().timeouts == 1
