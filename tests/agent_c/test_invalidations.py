"""Invalidations: narrow ones on their own, wide ones with the service's help, and when that does not come."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from irqrouter.iommu_remap import EVERYTHING, entries, entry
from irqrouter.proof.c_agent import CVector
from irqrouter.scope import Scope
from irqrouter.service import wire
from irqrouter.service.wire import Command, Frame, Kind, Operation, SlotState
from irqrouter.x86.msi import Message
from tests.agent_c.fake import Session, eventually
from tests.agent_c.world import World, remappable, to

ASSIGNED, DEASSIGNED = SlotState.ASSIGNED, SlotState.DEASSIGNED
BROADCAST = Message(0xFEEFF000, 0x4055)
LOGICAL = Message(0xFEE01004, 0x4056)


def _assigned(world: World, session: Session, count: int = 8) -> list[tuple[CVector, int]]:
    vectors = world.add(session, *[to(0x30 + n) for n in range(count)])
    assert set(world.states(session, vectors)) == {ASSIGNED}
    return vectors


def _asked(session: Session) -> Frame:
    frame, _ = session.expect(Command.INVALIDATE)
    return frame


def _routes(session: Session, vectors: list[tuple[CVector, int]], base: int) -> list[Operation]:
    return [session.op(Kind.SET_ROUTE, vector.id, to(base + vector.id)) for vector, _ in vectors]


def _where(world: World, vectors: list[tuple[CVector, int]]) -> list[int]:
    for _, fd in vectors:
        os.eventfd_write(fd, 1)
    return [vector for _, vector in world.arrived()]


def test_a_narrow_invalidation_asks_nobody(world: World, session: Session) -> None:
    vectors = _assigned(world, session)
    before = session.generation(vectors[2][0].id)
    session.rung()
    assert world.agent.invalidate(entry(2)) == 1
    assert world.agent.invalidate(entry(100)) == 0
    assert session.silent()
    assert session.rung()
    slot = session.slot(vectors[2][0].id)
    assert (slot.state, slot.invalidations) == (DEASSIGNED, 1)
    assert slot.generation > before
    assert _where(world, vectors) == [0x30, 0x31, 0x33, 0x34, 0x35, 0x36, 0x37]
    assert world.pending(vectors[2][1]) == 1
    assert world.agent.stats().deassigns == 1


@pytest.mark.parametrize("mask", [1, 2, 6, 7, 16])
def test_ranges_touch_what_is_in_them(world: World, session: Session, mask: int) -> None:
    cookies = [0, 1, 2, 3, 4, 63, 64, 127, 128, 0xFFFF]
    sources = [world.source(cookie & 0x7FFF) for cookie in cookies]
    adding = world.background(world.agent.add_all, sources)
    frame, _ = session.expect_add()
    session.reply_operations(frame, [])
    vectors = adding.result(10)
    world.agent.program(vectors[-1], Message(0xFEEFFFF4, 0))  # FFFFh: the index's bit 15 is the address's bit 2
    scope = entries(0, mask)
    assert world.agent.invalidate(scope) == sum(cookie in scope for cookie in cookies)


def test_messages_without_an_entry_are_touched_by_a_global_invalidation_alone(world: World, session: Session) -> None:
    vector, _ = world.add_one(session)
    for message in (Message(0xFEE00000, 0x4031), Message(0x1000, 0), Message(0xFEEFFFFC, 1), Message(1 << 40, 0)):
        world.agent.program(vector, message)
        assert session.slot(vector.id).cookie == 0x10000
        assert world.agent.invalidate(Scope(0, 0xFFFF)) == 0
        assert world.agent.invalidate(EVERYTHING) == 1
    world.agent.program(vector, Message(0xFEE00018 | 5 << 5, 3))  # a subhandle is added
    assert session.slot(vector.id).cookie == 8


def test_a_wide_invalidation_is_one_table_write(world: World, session: Session) -> None:
    vectors = _assigned(world, session)
    invalidating = world.background(world.agent.invalidate, EVERYTHING)
    frame = _asked(session)
    assert wire.decode_scope(frame.payload) == EVERYTHING
    assert set(world.states(session, vectors)) == {ASSIGNED}
    session.reply_operations(frame, _routes(session, vectors, 0x50))
    assert invalidating.result(10) == 8
    assert set(world.states(session, vectors)) == {ASSIGNED}
    assert _where(world, vectors) == list(range(0x50, 0x58))
    stats = world.agent.stats()
    assert (stats.table_writes, stats.deassigns, stats.wide, stats.wide_served) == (2, 0, 1, 1)


def test_i2_what_got_no_route_is_deassigned(world: World, session: Session) -> None:
    vectors = _assigned(world, session)
    invalidating = world.background(world.agent.invalidate, EVERYTHING)
    frame = _asked(session)
    operations = _routes(session, vectors, 0x50)
    stale = operations[3]
    operations[3] = Operation(Kind.SET_ROUTE, stale.vector, stale.generation - 1, stale.address, stale.data)
    session.reply(frame, wire.encode_operations(operations[:4]), more=True)
    session.reply_operations(frame, operations[4:7])
    assert invalidating.result(10) == 8
    assert [vector.id for vector, _ in vectors if session.state(vector.id) == DEASSIGNED] == [3, 7]
    assert _where(world, vectors) == [0x50, 0x51, 0x52, 0x54, 0x55, 0x56]
    assert [world.pending(fd) for _, fd in vectors] == [0, 0, 0, 1, 0, 0, 0, 1]


def test_b7_a_table_write_is_no_drain_for_what_kvm_defers(world: World, session: Session) -> None:
    routes = [BROADCAST, LOGICAL, *[to(0x30 + n) for n in range(2, 8)]]
    vectors = world.add(session, *routes)
    # Vector 2 was assigned with an event pending.
    world.agent.invalidate(entry(2))
    os.eventfd_write(vectors[2][1], 1)
    session.run(session.op(Kind.SET_ROUTE, 2, to(0x32)), session.op(Kind.ASSIGN, 2, flag=True))
    world.next_arrived()
    invalidating = world.background(world.agent.invalidate, EVERYTHING)
    frame = _asked(session)
    operations = _routes(session, vectors, 0x50)
    operations[3] = session.op(Kind.SET_ROUTE, 3, BROADCAST)
    session.reply_operations(frame, operations)
    assert invalidating.result(10) == 8
    assert world.states(session, vectors) == [DEASSIGNED] * 4 + [ASSIGNED] * 4
    # Where the message stays as it is there is nothing to drain.
    world.add(session, *[BROADCAST] * 5, first=20)
    invalidating = world.background(world.agent.invalidate, entries(16, 4))
    frame = _asked(session)
    session.reply_operations(frame, [session.op(Kind.SET_ROUTE, n, BROADCAST) for n in range(8, 13)])
    assert invalidating.result(10) == 5
    assert {session.state(n) for n in range(8, 13)} == {ASSIGNED}


def test_a7_a_table_that_is_refused_deassigns_them_all(world: World, session: Session) -> None:
    vectors = _assigned(world, session)
    invalidating = world.background(world.agent.invalidate, EVERYTHING)
    frame = _asked(session)
    operations = _routes(session, vectors, 0x50)
    operations[5] = session.op(Kind.SET_ROUTE, 5, Message(0xFEE00000 | 1 << 32, 0x4050))
    session.reply_operations(frame, operations)
    assert invalidating.result(10) == 8
    assert set(world.states(session, vectors)) == {DEASSIGNED}
    assert _where(world, vectors) == []


@pytest.mark.parametrize("second_first", [False, True])
def test_a3_c7_two_vcpus_each_find_their_own_reply(world: World, session: Session, second_first: bool) -> None:
    """Whoever returns knows that no route from before its own invalidation is live."""
    vectors = _assigned(world, session)
    first = world.background(world.agent.invalidate, EVERYTHING)
    frame_1 = _asked(session)
    routes_1 = _routes(session, vectors, 0x50)
    second = world.background(world.agent.invalidate, EVERYTHING)
    frame_2 = _asked(session)
    routes_2 = _routes(session, vectors, 0x60)
    if second_first:
        session.reply_operations(frame_2, routes_2)
        assert second.result(10) == 8
        assert set(world.states(session, vectors)) == {ASSIGNED}
        session.reply_operations(frame_1, routes_1)  # stale, every one; but KVM has newer routes already
        assert first.result(10) == 8
        assert set(world.states(session, vectors)) == {ASSIGNED}
        assert _where(world, vectors) == list(range(0x60, 0x68))
    else:
        session.reply_operations(frame_1, routes_1)  # stale, every one: the first must deassign before it returns
        assert first.result(10) == 8
        assert set(world.states(session, vectors)) == {DEASSIGNED}
        session.reply_operations(frame_2, routes_2)
        assert second.result(10) == 8
        assert _where(world, vectors) == []


def test_a_narrow_invalidation_meanwhile_wins(world: World, session: Session) -> None:
    vectors = _assigned(world, session)
    wide = world.background(world.agent.invalidate, EVERYTHING)
    frame = _asked(session)
    routes = _routes(session, vectors, 0x50)
    assert world.agent.invalidate(entry(4)) == 1
    assert session.state(4) == DEASSIGNED
    session.reply_operations(frame, routes)
    assert wide.result(10) == 8
    assert world.states(session, vectors) == [ASSIGNED] * 4 + [DEASSIGNED] + [ASSIGNED] * 3


@pytest.mark.parametrize("again", [Command.INVALIDATE, 0])
def test_b6_a_deadline_opens_the_breaker_and_a_ping_closes_it(tmp_path: Path, again: int) -> None:
    with World(tmp_path, deadline_s=0.05) as world:
        session = world.attach()
        vectors = _assigned(world, session)
        began = time.monotonic()
        assert world.agent.invalidate(EVERYTHING) == 8
        assert time.monotonic() - began >= 0.05
        assert set(world.states(session, vectors)) == {DEASSIGNED}
        late = _asked(session)
        ping, _ = session.expect(Command.PING)
        stats = world.agent.stats()
        assert (stats.timeouts, stats.fallbacks, stats.breaker_open) == (1, 1, 1)
        # The next one does not ask.
        errnos = session.run(
            *_routes(session, vectors, 0x40), *[session.op(Kind.ASSIGN, vector.id) for vector, _ in vectors]
        )
        assert set(errnos) == {0}
        assert world.agent.invalidate(EVERYTHING) == 8
        assert session.silent()
        # A3: what comes late is never carried out, though it is of the vectors' generation.
        session.run(*_routes(session, vectors, 0x40))
        session.reply_operations(late, _routes(session, vectors, 0x50))
        eventually(lambda: world.agent.stats().late == 1)
        assert [status.route for status in world.agent.vectors()] == [to(0x40 + n) for n in range(8)]
        session.reply(ping)
        eventually(lambda: not world.agent.stats().breaker_open, "a closed breaker")
        errnos = session.run(*[session.op(Kind.ASSIGN, vector.id) for vector, _ in vectors])
        assert set(errnos) == {0}
        invalidating = world.background(world.agent.invalidate, EVERYTHING)
        frame = _asked(session)
        assert frame.id != late.id
        session.reply_operations(frame, _routes(session, vectors, 0x50))
        assert invalidating.result(10) == 8
        # A second answer to what was answered late is no answer to anything; nor is one to no command.
        session.reply(Frame(late.id, again))
        assert session.ended()


def test_b5_a_service_that_never_reads_stops_nobody(tmp_path: Path) -> None:
    with World(tmp_path, deadline_s=0.02) as world:
        session = world.attach()
        vectors = _assigned(world, session)
        longest, scopes = 0, [EVERYTHING, *[entry(n) for n in range(8)]]
        for n in range(3000):
            longest = max(longest, world.agent.invalidate_timed(scopes[n % 9])[1])
            if n % 500 == 0:
                world.agent.mask(vectors[0][0])
                world.agent.unmask(vectors[0][0])
        assert longest < 2_000_000_000
        stats = world.agent.stats()
        assert (stats.wide, stats.timeouts, stats.breaker_open) == (1, 1, 1)
        began = time.monotonic()
        added = world.agent.add_all([world.source(100 + n) for n in range(10)])
        assert time.monotonic() - began < 2
        assert {session.state(vector.id) for vector in added} == {DEASSIGNED}


def test_a_connection_that_ends_meanwhile_ends_the_wait(world: World, session: Session) -> None:
    vectors = _assigned(world, session)
    began = time.monotonic()
    invalidating = world.background(world.agent.invalidate, EVERYTHING)
    _asked(session)
    states = [world.status(vector).state.value for vector, _ in vectors]
    session.close()
    assert invalidating.result(10) == 8
    assert time.monotonic() - began < 4
    assert states == ["assigned"] * 8
    assert {world.status(vector).state.value for vector, _ in vectors} == {"deassigned"}
    assert world.agent.stats().timeouts == 0


def test_a_reply_may_be_about_more_vectors_than_were_there(world: World, session: Session) -> None:
    """The service goes by the page, and others have come under these cookies since it was asked."""
    vectors = _assigned(world, session)
    others = world.add(session, *[None] * 12, first=100)
    invalidating = world.background(world.agent.invalidate, entries(0, 3))
    frame = _asked(session)
    for vector, _ in others:
        world.agent.program(vector, remappable(vector.id % 8))
    bound = [session.op(Kind.ASSIGN, vector.id) for vector, _ in others]
    assert set(session.run(*_routes(session, others, 0x70), *bound)) == {0}
    session.reply_operations(frame, _routes(session, others, 0x70) + _routes(session, vectors, 0x50))
    assert invalidating.result(10) == 8
    assert _where(world, vectors) == list(range(0x50, 0x58))
    assert world.agent.stats().malformed == 0


def test_an_error_in_reply_deassigns(world: World, session: Session) -> None:
    vectors = _assigned(world, session)
    invalidating = world.background(world.agent.invalidate, EVERYTHING)
    session.refuse(_asked(session), wire.WireError(wire.Code.QUOTA, "VM", "asks too often"))
    assert invalidating.result(10) == 8
    assert set(world.states(session, vectors)) == {DEASSIGNED}
    assert not world.agent.stats().breaker_open


def test_b3_a_vector_that_keeps_losing_is_waited_for(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    os.eventfd_write(fd, 1)
    for _ in range(3):
        decided = session.op(Kind.CATCH, vector.id, to(0x40))
        assert world.agent.invalidate(entry(0)) == 1
        assert session.run(decided) == [errno.ESTALE]
    assert world.agent.stats().starved == 0
    before = session.generation(vector.id)
    while session.rung() and session.generation(vector.id) != before:
        pass
    served = threading.Event()

    def serve() -> None:
        eventually(lambda: session.generation(vector.id) != before, "the renewal")
        session.send_batch([session.op(Kind.CATCH, vector.id, to(0x41))])
        served.set()

    serving = world.background(serve)
    _, ns, _ = world.agent.invalidate_timed(entry(0))
    serving.result(10)
    assert served.is_set()
    assert ns < 100_000_000
    assert world.agent.stats().starved == 1
    eventually(lambda: world.arrived() == [(0, 0x41)], "the delivery")
    assert world.pending(fd) == 0
    # Once: the next one does not wait.
    world.agent.invalidate(entry(0))
    assert world.agent.stats().starved == 1


def test_b4_a_vcpu_is_not_overtaken_by_a_long_batch(world: World, session: Session) -> None:
    vector, _ = world.add_one(session)
    other, _ = world.add_one(session, cookie=1)
    stop = threading.Event()

    def hammer() -> int:
        frames = 0
        while not stop.is_set():
            session.run(*[session.op(Kind.SET_ROUTE, other.id, to(0x40))] * 2000)
            frames += 1
        return frames

    hammering = world.background(hammer)
    waits = sorted(world.agent.invalidate_timed(entry(0))[1] for _ in range(2000))
    stop.set()
    assert hammering.result(10) > 0
    assert vector is not None
    assert waits[len(waits) * 9 // 10] < 5_000_000  # with a pthread mutex: tens of milliseconds


def test_everything_at_once_comes_out_right(tmp_path: Path) -> None:
    """Invalidations narrow and wide, masks and a service in a hurry: in the end every event was delivered once more."""
    with World(tmp_path, deadline_s=0.02) as world:
        session = world.attach()
        vectors = world.add(session, *[to(0x30 + n) for n in range(16)])
        ending = threading.Event()

        def decide() -> None:
            session.request.settimeout(0.001)
            while not ending.is_set():
                try:
                    frame, _ = session.expect(Command.INVALIDATE)
                    session.reply_operations(frame, _routes(session, vectors[::2], 0x30))
                except TimeoutError:
                    pass
                except AssertionError:
                    pass  # a PING: this service does not answer any
                session.run(*[session.op(Kind.PREPARE, vector.id, to(0x30 + vector.id)) for vector, _ in vectors])

        def invalidate(scope: Scope) -> None:
            for _ in range(150):
                world.agent.invalidate(scope)

        deciding = world.background(decide)
        others = [world.background(invalidate, scope) for scope in (EVERYTHING, entries(0, 3), entry(3))]
        for number in range(300):
            os.eventfd_write(vectors[number % 16][1], 1)
            if number % 50 == 0:
                world.agent.mask(vectors[5][0])
                world.agent.unmask(vectors[5][0])
        for other in others:
            other.result(60)
        eventually(lambda: all(world.pending(fd) == 0 for _, fd in vectors), "everything delivered")
        ending.set()
        deciding.result(10)
        assert not world.agent.stats().malformed
