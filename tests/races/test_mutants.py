"""Each rule broken on purpose: some world must notice, and name the invariant.

The labels are those of the review that broke earlier forms of the design. The rules are broken by patching the code
here; there is no knob for it.
"""

import errno
from collections.abc import Callable

import pytest

from irqrouter.core.machine import TABLE, Event, Row, State
from irqrouter.core.ops import Assign, Catch, CatchFault, DropRoute, Op, SetRoute
from irqrouter.core.vectors import Vector, Vectors, decide
from irqrouter.errors import KernelError
from irqrouter.eventfd_loop import Router, _Watched
from irqrouter.iommu.fault import Fault
from irqrouter.kvm.executor import Executor, Wide
from irqrouter.kvm.simulated import SimulatedEventfd, SimulatedVm
from irqrouter.scope import Cookie
from irqrouter.x86.msi import Message, Request
from tests.races.explorer import InvariantBrokenError, explore
from tests.races.test_worlds import WORLDS
from tests.races.world import Deassign

Patch = pytest.MonkeyPatch


def catch_split_in_two(patch: Patch) -> None:
    """A1: the event is taken, the lock let go, and only then delivered, if the vector is still the same."""

    def catch(self: Executor, vector: Vector, delivery: Message) -> int:
        generation = vector.generation
        if not self._eventfds[vector.id].read():
            return errno.EAGAIN
        self._lock.release()
        self._lock.acquire()
        if vector.generation != generation:
            return errno.ESTALE
        self._vm.signal_msi(delivery)
        vector.caught += 1
        return 0

    patch.setattr(Executor, "_catch", catch)


def without_generation(*kinds: type[Op]) -> Callable[[Patch], None]:
    """Operations of these kinds are carried out on a deassigned vector whatever their generation."""

    def mutant(patch: Patch) -> None:
        refusal = Vectors.refusal

        def lenient(self: Vectors, vector: Vector | None, op: SetRoute | Catch | CatchFault | Assign) -> int:
            if isinstance(op, kinds) and vector is not None and vector.state is State.DEASSIGNED:
                return 0
            return refusal(self, vector, op)

        patch.setattr(Vectors, "refusal", lenient)

    return mutant


def route_by_bare_gsi(patch: Patch) -> None:
    """A3: a route is set for the GSI that the vector had when it was decided, whatever happened since."""
    gsis: dict[int, int] = {}
    add, carry_out = Vectors.add, Executor._carry_out

    def remember(self: Vectors, request: Request, cookie: Cookie, device: str | None, *, masked: bool) -> Vector:
        vector = add(self, request, cookie, device, masked=masked)
        gsis[vector.id] = vector.gsi
        return vector

    def by_gsi(self: Executor, op: SetRoute | DropRoute | Catch | CatchFault | Assign) -> int:
        if isinstance(op, SetRoute) and self._vectors.find(op.vector) is None:
            self._vectors.routes.set(gsis[op.vector], op.route)
            return 0
        return carry_out(self, op)

    patch.setattr(Vectors, "add", remember)
    patch.setattr(Executor, "_carry_out", by_gsi)


def cookie_installed_late(patch: Patch) -> None:
    """A4: a reprogrammed vector is found by its new cookie only once it is assigned."""
    late: dict[int, Cookie] = {}
    program, happen = Vectors.program, Vectors.happen

    def keep_the_old(self: Vectors, vector: Vector, request: Request, cookie: Cookie) -> None:
        vector.request = request
        late[vector.id] = cookie

    def install(self: Vectors, vector: Vector, event: Event) -> Row:
        if event is Event.ASSIGNED and vector.id in late:
            program(self, vector, vector.request, late.pop(vector.id))
        return happen(self, vector, event)

    patch.setattr(Vectors, "program", keep_the_old)
    patch.setattr(Vectors, "happen", install)


def mask_without_a_new_generation(patch: Patch) -> None:
    """A5: masking and unmasking leave the generation as it is."""
    patch.setitem(TABLE, (State.ASSIGNED, Event.MASKED), Row(State.MASKED, deassign=True))
    patch.setitem(TABLE, (State.DEASSIGNED, Event.MASKED), Row(State.MASKED))
    patch.setitem(TABLE, (State.MASKED, Event.UNMASKED), Row(State.DEASSIGNED))


def masked_vector_not_refused(patch: Patch) -> None:
    """A5: the executor goes by generations alone, and masking does not make one."""
    mask_without_a_new_generation(patch)
    refusal = Vectors.refusal

    def lenient(self: Vectors, vector: Vector | None, op: SetRoute | Catch | CatchFault | Assign) -> int:
        if vector is not None and vector.state is State.MASKED and op.generation == vector.generation:
            return 0
        return refusal(self, vector, op)

    patch.setattr(Vectors, "refusal", lenient)
    patch.setitem(TABLE, (State.MASKED, Event.CAUGHT), Row(State.MASKED))
    patch.setitem(TABLE, (State.MASKED, Event.ASSIGNED), Row(State.MASKED))


def deassign_by_reused_number(patch: Patch) -> None:
    """A6: the VMM's descriptor number is used, not a duplicate of it."""

    class ByNumber(SimulatedEventfd):
        def bind(self, host):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
            return host.files.get(self._fd)

        def close(self) -> None:
            pass

    def adopt(self: SimulatedVm, fd: int) -> SimulatedEventfd:
        return ByNumber(self._host, self._host.files[fd], fd)

    patch.setattr(SimulatedVm, "adopt", adopt)


def refused_table_taken_for_accepted(patch: Patch) -> None:
    """A7: a failing table write is taken for success."""
    write = SimulatedVm.set_gsi_routing

    def ignore(self: SimulatedVm, changes: dict[int, Message | None]) -> None:
        try:
            write(self, changes)
        except KernelError:
            pass

    patch.setattr(SimulatedVm, "set_gsi_routing", ignore)


def no_discard_after_assign(patch: Patch) -> None:
    """What KVM injected at assign stays in the eventfd."""

    def assign(self: Executor, vector: Vector, *, delivering: bool) -> int:
        if delivering and not self._eventfds[vector.id].pending():
            return errno.EAGAIN
        self._vm.irqfd_assign(self._eventfds[vector.id], vector.gsi)
        self._vectors.happen(vector, Event.ASSIGNED)
        return 0

    patch.setattr(Executor, "_assign", assign)


def deassign_after_the_route_change(patch: Patch) -> None:
    """The route goes first, the irqfd after it."""

    def remove(self: Executor, vectors: list[Vector]) -> None:
        for vector in vectors:
            with self._lock:
                deassigns = self._happen(vector, Event.REMOVED)
                self._vectors.routes.drop(vector.gsi)
            self._write_routes()
            self._deassign(deassigns)
            with self._lock:
                self._release(vector)

    patch.setattr(Executor, "remove", remove)


def deassign_on_its_way_not_waited_for(patch: Patch) -> None:
    """A vCPU that finds the vector being deassigned by another goes on at once."""
    patch.setattr(Deassign, "wait", lambda self: None)


def deassign_known_by_the_new_cookie_only(patch: Patch) -> None:
    """An invalidation of a reprogrammed vector's old entry does not find the deassign on its way."""
    happen = Executor._happen

    def forgetful(self: Executor, vector: Vector, event: Event, *, cookie: Cookie | None = None) -> object:
        return happen(self, vector, event)

    patch.setattr(Executor, "_happen", forgetful)


def undelivered_count_dropped(patch: Patch) -> None:
    """The count is not written back when the delivery fails."""

    def catch(self: Executor, vector: Vector, delivery: Message) -> int:
        if not self._eventfds[vector.id].read():
            return errno.EAGAIN
        self._vm.signal_msi(delivery)
        return 0

    patch.setattr(Executor, "_catch", catch)


def generation_sampled_after_the_reading(patch: Patch) -> None:
    """C1: the translation is labelled with the generation that holds once it has been read."""

    def decide_late(self: Router, vector: Vector) -> object:
        outcome = self._remapper.translate(vector.request)
        if self._executor.may_assign(vector, vector.generation):
            return Assign(vector.id, vector.generation, delivering=True)
        return decide(vector.id, vector.generation, outcome)

    patch.setattr(Router, "_decide", decide_late)


def invalidation_without_deassign(patch: Patch) -> None:
    """An invalidated vector stays assigned."""
    patch.setitem(TABLE, (State.ASSIGNED, Event.INVALIDATED), Row(State.DEASSIGNED, renews=True))


def unmasked_and_not_watched(patch: Patch) -> None:
    """Unmask does not look for what is pending."""
    patch.setattr(_Watched, "look_again", lambda self, vector: None)


def answered_and_not_watched(patch: Patch) -> None:
    """A vector is not watched again after it was served."""
    patch.setattr(_Watched, "answered", lambda self, vector: self._unanswered.discard(vector))


def generation_before_the_message(patch: Patch) -> None:
    """A reprogrammed vector is renewed, and deassigned, before it has its new message."""

    def program(self: Executor, vector: Vector, request: Request, cookie: Cookie) -> None:
        with self._lock:
            deassigns = self._happen(vector, Event.PROGRAMMED)
        self._deassign(deassigns)
        with self._lock:
            self._vectors.program(vector, request, cookie)

    patch.setattr(Executor, "program", program)


def one_record_for_all_it_takes(patch: Patch) -> None:
    """An event that comes between the fault's record and the read is taken with the rest."""

    def catch_fault(self: Executor, vector: Vector, fault: Fault) -> int:
        if not self._eventfds[vector.id].pending():
            return errno.EAGAIN
        self._record_fault(vector, fault)
        self._eventfds[vector.id].read()
        return 0

    patch.setattr(Executor, "_catch_fault", catch_fault)


def wide_acknowledged_without_every_route(patch: Patch) -> None:
    """A3, A7: what did not get a route stays assigned with the one it has."""
    patch.setattr(Executor, "_unless_routed", lambda self, vector: [])


def wide_route_without_generation(patch: Patch) -> None:
    """A3: a route for an assigned vector is set whatever its generation."""
    refusal = Vectors.refusal

    def lenient(self: Vectors, vector: Vector | None, op: SetRoute | Catch | CatchFault | Assign) -> int:
        if isinstance(op, SetRoute) and vector is not None:
            return 0
        return refusal(self, vector, op)

    patch.setattr(Vectors, "refusal", lenient)


def wide_without_renewal(patch: Patch) -> None:
    """A5: an assigned vector keeps its generation when a wide invalidation begins."""
    patch.setitem(TABLE, (State.ASSIGNED, Event.WIDENED), Row(State.ASSIGNED))


def deassigned_vectors_not_renewed_by_wide(patch: Patch) -> None:
    """A2: nor does a deassigned one, whose event is being decided about."""
    patch.setitem(TABLE, (State.DEASSIGNED, Event.WIDENED), Row(State.DEASSIGNED))


def wide_goes_by_the_decision_alone(patch: Patch) -> None:
    """A7: whether the kernel has accepted the route is not looked at when a wide invalidation ends."""

    def finish(self: Executor, wide: Wide, routes: list[SetRoute]) -> int:
        deassigns: list[object] = []
        with self._lock:
            for op in routes:
                self._carry_out(op)
            for left in wide.left:
                if not self._vectors.may_stay(left.vector, left.since, left.before):
                    deassigns += self._unless_routed(left.vector)
            deassigns += self._all_on_their_way(wide.scope)
        self._deassign(deassigns)  # type: ignore[arg-type]
        self._write_routes()
        return wide.touched

    patch.setattr(Executor, "finish_wide", finish)


def wide_waits_for_no_deassign_but_its_own(patch: Patch) -> None:
    """A deassign that another thread is making is not waited for when a wide invalidation ends."""
    patch.setattr(Executor, "_all_on_their_way", lambda self, scope: [])


def wide_table_write_taken_for_a_drain(patch: Patch) -> None:
    """B7: a vector whose assignment KVM may still be injecting stays assigned."""
    may_stay = Vectors.may_stay

    def lenient(self: Vectors, vector: Vector, since: int, before: Message | None) -> bool:
        vector.deferred = False
        return may_stay(self, vector, since, before)

    patch.setattr(Vectors, "may_stay", lenient)


MUTANTS: list[tuple[Callable[[Patch], None], set[str]]] = [
    (catch_split_in_two, {"I1"}),
    (without_generation(CatchFault), {"I2"}),
    (without_generation(Catch), {"I2"}),
    (without_generation(Assign), {"I2"}),
    (route_by_bare_gsi, {"I5"}),
    (cookie_installed_late, {"I2"}),
    (mask_without_a_new_generation, {"I7"}),
    (masked_vector_not_refused, {"I7"}),
    (deassign_by_reused_number, {"I2"}),
    (refused_table_taken_for_accepted, {"I2"}),
    (no_discard_after_assign, {"I6"}),
    (deassign_after_the_route_change, {"I4"}),
    (deassign_on_its_way_not_waited_for, {"I2"}),
    (deassign_known_by_the_new_cookie_only, {"I2"}),
    (undelivered_count_dropped, {"I1"}),
    (generation_sampled_after_the_reading, {"I2"}),
    (invalidation_without_deassign, {"I2"}),
    (unmasked_and_not_watched, {"I1"}),
    (answered_and_not_watched, {"I1"}),
    (generation_before_the_message, {"I2"}),
    (one_record_for_all_it_takes, {"I1"}),
    (wide_acknowledged_without_every_route, {"I2"}),
    (wide_route_without_generation, {"I2"}),
    (wide_without_renewal, {"I2"}),
    (deassigned_vectors_not_renewed_by_wide, {"I2"}),
    (wide_goes_by_the_decision_alone, {"I2"}),
    (wide_waits_for_no_deassign_but_its_own, {"I2"}),
    (wide_table_write_taken_for_a_drain, {"I2"}),
]
NAMES = [
    "catch_split_in_two",
    "fault_without_generation",
    "catch_without_generation",
    "assign_without_generation",
    *(mutant.__name__ for mutant, _ in MUTANTS[4:]),
]


@pytest.mark.parametrize(("mutant", "invariants"), MUTANTS, ids=NAMES)
def test_mutant_is_noticed_and_the_invariant_named(
    mutant: Callable[[Patch], None], invariants: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    found: dict[str, list[str]] = {}
    # Worlds of the mutant's own kind first: they are the ones made for it.
    for world in sorted(WORLDS, key=lambda world: ("wide" in world.__name__) != ("wide" in mutant.__name__)):
        try:
            explore(world, runs_max=60_000)
        except InvariantBrokenError as broken:
            found.setdefault(broken.invariant, broken.trace)
        if invariants <= found.keys():
            break
    assert invariants <= found.keys(), f"nothing noticed it; broken were {sorted(found)}"
    assert all(found[invariant] for invariant in invariants), "the trace tells how it came to that"
