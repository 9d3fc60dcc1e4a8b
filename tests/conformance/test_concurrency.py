"""Everything at once: what the thread sanitizer looks at, and that nothing is lost or left behind afterwards."""

import errno
from collections.abc import Callable

from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service.wire import Kind, Operation, SlotState
from tests.conformance.agents import AgentTarget
from tests.conformance.operations import added, assign, by_entry, catch, fire, pending, set_route, state
from tests.conformance.target import Background, Target, V, delivered
from tests.kvm.conftest import message

ROUNDS = 1000
VECTORS = 6
MOOT = {0, errno.EAGAIN, errno.ESTALE, errno.EALREADY, errno.EINPROGRESS, errno.ENXIO, errno.ECANCELED}
TO = message(1, 0x41)


def decide(target: Target) -> None:
    """One batch about every vector, as it is or was a moment ago."""
    vectors = target.vectors()
    batch = [
        Operation(kind, v.number, v.generation, TO.address if route else 0, TO.data if route else 0, flag=not route)
        for kind, route in ((Kind.CATCH, True), (Kind.SET_ROUTE, True), (Kind.ASSIGN, False))
        for v in vectors
    ]
    assert set(target.run(batch)) <= MOOT


def test_verbs_events_and_batches_at_once(target: Target) -> None:
    vectors = [added(target, index) for index in range(VECTORS)]
    if isinstance(target, AgentTarget):
        service = target.service
        service.on_invalidate = lambda _: [
            Operation(Kind.SET_ROUTE, v.number, service.slot(v.number).generation, TO.address, TO.data) for v in vectors
        ]

    def invalidates() -> None:
        for at in range(ROUNDS):
            target.invalidate(EVERYTHING if at % 8 == 0 else Scope(at % VECTORS, at % VECTORS))

    def masks() -> None:
        for at in range(ROUNDS):
            v = vectors[at % VECTORS]
            target.mask(v)
            target.unmask(v)
            target.program(v, by_entry(at % VECTORS))

    def comes_and_goes() -> None:
        fd = target.bench.eventfd()
        for _ in range(ROUNDS // 4):
            v = target.add(fd, by_entry(3))
            target.vectors()
            target.remove(v)

    def fires() -> None:
        for at in range(10 * ROUNDS):
            fire(target, vectors[at % VECTORS])

    threads: list[Callable[[], None]] = [invalidates, masks, comes_and_goes, fires]
    with target.unwatched():
        running = [Background(each) for each in threads]
        for each in running:
            each.start()
        while not all(each.done() for each in running):
            decide(target)
        for each in running:
            each.join()
    delivered(target)
    assert sorted(each.number for each in target.vectors()) == sorted(v.number for v in vectors)
    for v in vectors:
        delivers(target, v)


def delivers(target: Target, v: V) -> None:
    """An event of ``v`` arrives, whoever delivers it, and KVM can deliver it from then on."""
    fire(target, v)
    if state(target, v) is SlotState.DEASSIGNED:
        assert target.run([catch(target, v, TO)]) == [0]
    assert delivered(target) == {(1, 0x41)}
    assert pending(target, v) == 0
    if state(target, v) is SlotState.DEASSIGNED:
        assert target.run([set_route(target, v, TO), assign(target, v)]) == [0, 0]
    fire(target, v)
    assert delivered(target) == {(1, 0x41)}
