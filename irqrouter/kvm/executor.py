"""The executor: carries out operations on one VM, and is the truth about its vectors.

Two kinds of callers meet here. The loop decides about events that fired and passes *batches* (:meth:`Executor.run`).
The VMM's own threads, vCPUs mostly, say what the guest did through *verbs* (:meth:`Executor.invalidate`, ``mask``,
``program``, ...), which are true when they return. One lock orders the two. It is handed over in order, and held for
microseconds: the two calls that wait for a grace period in the kernel are made without it.

A *deassign* first changes the vector, under the lock, so that nothing decided before counts any more; then makes the
ioctl. Until that has returned KVM may still inject by the old route, so a verb that finds a deassign on its way waits
for it, and ``Assign`` is refused. A *table write* is a snapshot, ordered by a lock of its own.

An invalidation of many vectors can be made in two halves (:meth:`Executor.begin_wide`, :meth:`Executor.finish_wide`),
between which somebody translates them all again: one table write then stands for many deassigns. Each half is
checked vector by vector against what other threads did meanwhile, and whatever cannot be shown to be new is deassigned.

What a batch decided is checked against the vector as it is now: an older generation is refused with ``ESTALE``, and
``Catch``, ``CatchFault`` and ``Assign`` are refused unless the vector is deassigned. A batch ends by writing the
routing table if it changed, before the caller acknowledges anything to anybody.

Works on any kernel of ``kvm/port.py``: the real one, and the simulated one.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from irqrouter.core.machine import Event, State
from irqrouter.core.ops import Assign, Catch, CatchFault, Deassign, DropRoute, Generation, Op, SetRoute
from irqrouter.core.routes import RouteTable
from irqrouter.core.vectors import Vector, Vectors, VectorStatus, decide
from irqrouter.errors import CallerError, IrqrouterError, KernelError, SpecError
from irqrouter.iommu.fault import Fault
from irqrouter.kvm.fairlock import FairLock
from irqrouter.kvm.port import Eventfd, Vm
from irqrouter.scope import Cookie, Scope
from irqrouter.x86.msi import Message, Request

#: A vector that lost this many races in a row is served by the next invalidation that matches it.
PATIENCE = 3

#: How long an invalidation waits for such a vector where others decide about it.
CATCH_WAIT_S = 0.001

#: Refusals of a table that may be gone at the next event.
_PASSING = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EINTR})


class DuplicateEventfdError(CallerError):
    """The eventfd is a vector's already: one would eat the other's events."""


class Mirror(Protocol):
    """Whoever shows the vectors to somebody else. Both methods are called often, by any thread, and must not raise."""

    def show(self, vector: Vector) -> None:
        """Something about ``vector`` has changed. The executor's lock is held."""
        ...

    def announce(self) -> None:
        """What was shown is complete. The lock is not held; what may take long, deassigns above all, comes after."""
        ...


class _Deassign:
    """A deassign on its way: from the change of the vector until the ioctl has returned. One caller makes the ioctl."""

    __slots__ = ("_claim", "_on_its_way", "cookie", "error", "eventfd", "vector")

    def __init__(self, vector: Vector, eventfd: Eventfd, cookie: Cookie) -> None:
        self.vector = vector
        self.cookie = cookie  # the irqfd's, which may not be the vector's any more
        self.eventfd = eventfd
        self.error: KernelError | None = None
        self._claim = threading.Lock()
        self._on_its_way = threading.Lock()  # not an Event: this is made for every invalidation
        self._on_its_way.acquire()

    def claim(self) -> bool:
        """Whether the caller is the one to make the ioctl."""
        return self._claim.acquire(blocking=False)

    def finish(self, error: KernelError | None) -> None:
        """The ioctl has returned."""
        self.error = error
        self._on_its_way.release()

    def wait(self) -> None:
        """Wait until the ioctl has returned."""
        with self._on_its_way:
            pass


class _Left(msgspec.Struct):
    """A vector that a wide invalidation found assigned."""

    vector: Vector
    #: The generation it was given then.
    since: Generation
    #: The route that KVM went by; None if another may have been on its way.
    before: Message | None


class Wide(msgspec.Struct):
    """An invalidation between its two halves."""

    scope: Scope
    #: How many vectors it touched.
    touched: int = 0
    #: Those that are assigned still, for :meth:`Executor.finish_wide` to route or to deassign.
    left: list[_Left] = []
    served: "list[_Awaited]" = []


class _Awaited(msgspec.Struct):
    """A vector that keeps losing the race, and whose event an invalidation gives time to be caught."""

    vector: Vector
    caught: threading.Event


class Executor:
    """Carries out operations on ``vm``.

    ``record_fault(vector, fault)`` puts a fault where the VMM keeps them; it is called with the lock held, before the
    event is consumed, and must only store. ``translate(request)`` is the remapper's: an invalidation uses it to serve
    a vector that keeps losing the race. None where nobody here can translate: the invalidation then waits up to
    ``CATCH_WAIT_S`` for whoever decides. ``mirror`` is told of every change.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        record_fault: Callable[[Vector, Fault], None],
        translate: Callable[[Request], Message | Fault] | None,
        mirror: Mirror | None = None,
    ) -> None:
        self._vm = vm
        self._record_fault = record_fault
        self._translate = translate
        self._mirror = mirror
        self._lock = FairLock()
        self._writing = threading.Lock()  # one table write at a time, so that the kernel has the latest; see there
        self._vectors = Vectors(RouteTable(vm.pins, vm.routes_max))
        self._eventfds: dict[int, Eventfd] = {}
        self._identities: set[int] = set()
        self._deassigning: dict[int, _Deassign] = {}  # by vector; one that failed stays, to be tried again
        self._awaited: dict[int, _Awaited] = {}  # by vector
        self._closed = False

    # --- verbs: what the VMM's threads say. True when they return. -----------------------------------------------

    def add(
        self, fd: int, request: Request, cookie: Cookie, *, masked: bool = False, device: str | None = None
    ) -> tuple[Vector, Eventfd]:
        """Make a vector of the eventfd ``fd``, deassigned or masked. ``fd`` is duplicated and stays the caller's.

        Raises what ``Vm.adopt`` does, :class:`DuplicateEventfdError` and
        :class:`~irqrouter.core.routes.GsiExhaustedError`.
        """
        eventfd = self._vm.adopt(fd)
        try:
            with self._lock:
                self._refuse_new(fd, eventfd)
                vector = self._vectors.add(request, cookie, device, masked=masked)
                self._identities.add(eventfd.identity)
                self._eventfds[vector.id] = eventfd
        except BaseException:
            eventfd.close()
            raise
        return vector, eventfd

    def invalidate(self, scope: Scope) -> int:
        """Drop every translation made for a cookie in ``scope``; return how many vectors that touched.

        When this returns, no event signalled afterwards is delivered, or turned into a fault, by a translation read
        before it: only now may the guest be told that its invalidation is complete.
        """
        deassigns: list[_Deassign] = []
        awaited: list[_Awaited] = []
        failure: Exception | None = None
        with self._lock:
            matching = self._vectors.matching(scope)
            for vector in matching:
                if vector.state is not State.REMOVED:
                    vector.invalidations += 1
                    deassigns += self._happen(vector, Event.INVALIDATED)
                    try:
                        awaited += self._serve(vector)
                    except Exception as error:  # noqa: BLE001 - the remapper's; the others must be deassigned first
                        failure = error
                self._lock.give_way()
            # Those of vectors that were removed, or given another cookie, and whose irqfd may still be there.
            if len(self._deassigning) > len(deassigns):
                deassigns += self._all_on_their_way(scope)
        self._deassign(deassigns)
        if failure is not None:
            raise failure
        self._await(awaited)
        return len(matching)

    def matches(self, scope: Scope) -> int:
        """How many vectors :meth:`invalidate` would touch."""
        with self._lock:
            return self._vectors.count(scope)

    def begin_wide(self, scope: Scope) -> Wide:
        """The first half of an invalidation that would rather route many vectors afresh than deassign each.

        Every matching vector is renewed, so that nothing decided before counts any more; what is assigned stays so.
        :meth:`finish_wide` must follow, whatever happens in between.
        """
        wide = Wide(scope)
        with self._lock:
            for vector in self._vectors.matching(scope):
                if vector.state is not State.REMOVED:
                    wide.touched += 1
                    vector.invalidations += 1
                    before = self._vectors.routes.certain(vector.gsi)
                    self._happen(vector, Event.WIDENED)
                    if vector.state is State.ASSIGNED:
                        wide.left.append(_Left(vector, vector.generation, before))
                    elif self._translate is None:  # a remapper might raise, and the second half must follow
                        wide.served += self._serve(vector)
                self._lock.give_way()
        self._announce()
        return wide

    def finish_wide(self, wide: Wide, routes: Sequence[SetRoute]) -> int:
        """The second half: ``routes`` for the vectors that the first left assigned; return how many it touched.

        Deassigned is every one of them that is still assigned and whose route is not known to have been decided after
        :meth:`begin_wide`, for whatever reason (none came, or too late, or the kernel refused it), or that KVM may
        still be delivering for by the route before (:func:`~irqrouter.core.routes.replaced_at_once`). When this returns
        the same is true as after :meth:`invalidate`.
        """
        deassigns: list[_Deassign] = []
        with self._lock:
            for op in routes:
                self._carry_out(op)
                self._lock.give_way()
            for left in wide.left:  # the old route is still in the table: what KVM has put off is delivered by it
                if not self._vectors.may_stay(left.vector, left.since, left.before):
                    deassigns += self._unless_routed(left.vector)
                self._lock.give_way()
        failure = self._attempt(deassigns)
        self._write_routes()
        with self._lock:
            # What the kernel refused is deassigned by now. Left are those that were given yet another route during the
            # write: it may have been somebody's who began before we did, or the write did not take it along.
            deassigns = []
            for left in wide.left:
                if left.vector.accepted_generation < left.since:
                    deassigns += self._unless_routed(left.vector)
                self._lock.give_way()
            deassigns += self._all_on_their_way(wide.scope)
        failure = self._attempt(deassigns) or failure
        if failure is not None:
            raise failure
        self._await(wide.served)
        return wide.touched

    def _unless_routed(self, vector: Vector) -> list[_Deassign]:
        return self._happen(vector, Event.ROUTE_MISSED) if vector.state is State.ASSIGNED else []

    def show(self, vectors: Iterable[Vector]) -> None:
        """Show ``vectors`` to the mirror, changed or not."""
        with self._lock:
            for vector in vectors:
                self._show(vector)
                self._lock.give_way()
        self._announce()

    def mask(self, vector: Vector) -> None:
        """Mask ``vector``: from now on its events wait in its eventfd."""
        with self._lock:
            deassigns = self._happen(self._vectors.known(vector), Event.MASKED)
        self._deassign(deassigns)

    def unmask(self, vector: Vector) -> None:
        """Unmask ``vector``. It is deassigned: what waited, or comes next, goes through a fresh translation."""
        with self._lock:
            deassigns = self._happen(self._vectors.known(vector), Event.UNMASKED)
        self._deassign(deassigns)

    def program(self, vector: Vector, request: Request, cookie: Cookie) -> None:
        """Give ``vector`` another message. Its next event goes through a fresh translation."""
        with self._lock:
            # The message first, the generation second: the loop samples them the other way round, without the lock.
            before = self._vectors.known(vector).cookie
            self._vectors.program(vector, request, cookie)
            deassigns = self._happen(vector, Event.PROGRAMMED, cookie=before)
        self._deassign(deassigns)

    def remove(self, vectors: Iterable[Vector]) -> None:
        """Deassign and forget ``vectors``, with one table write for all. What is pending stays in their eventfds."""
        going: list[Vector] = []
        deassigns: list[_Deassign] = []
        with self._lock:
            for vector in vectors:
                if vector.state is not State.REMOVED:
                    going.append(vector)
                    deassigns += self._happen(vector, Event.REMOVED)
                else:  # by somebody else, just now
                    deassigns += self._on_its_way(vector)
                self._lock.give_way()
        try:
            self._deassign(deassigns)  # the irqfds go before the routes do (I4)
        finally:  # a VM that is gone (EIO): the rest must be released all the same
            with self._lock:
                for vector in going:
                    self._release(vector)
            self._write_routes()  # if refused, the dropped routes lead nowhere, and go with the next write

    def known(self, vectors: Iterable[Vector]) -> list[Vector]:
        """``vectors``, or :class:`~irqrouter.core.vectors.VectorGoneError` if one was removed or is another's."""
        with self._lock:
            return [self._vectors.known(vector) for vector in vectors]

    def duplicates(self, vectors: Iterable[Vector]) -> list[tuple[Vector, int]]:
        """A duplicate of each one's descriptor, to be given away; the caller closes them. Without those removed.

        Raises :class:`~irqrouter.errors.KernelError`, and nothing is left open then.
        """
        found: list[tuple[Vector, int]] = []
        try:
            with self._lock:  # or a number could be closed, and reused, before it is duplicated
                for vector in vectors:
                    if vector.state is not State.REMOVED:
                        found.append((vector, os.dup(self._eventfds[vector.id].fileno())))  # noqa: PERF401 - to be closed on error
        except OSError as error:
            for _, fd in found:
                os.close(fd)
            raise KernelError(error.errno or 0, "dup", "the vectors' eventfds") from error
        return found

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        """Replace the routes that are the VMM's own, I/OAPIC pins for example. They must go in through here.

        A VMM that writes the table behind the executor's back erases live routes, and events with them.
        """
        table = self._vectors.routes
        with self._writing:  # or another thread's write takes them along, and is told that they were refused
            with self._lock:
                before = table.foreign()
                table.set_foreign(routes)
            failed = self._write()
            if failed:
                with self._lock:
                    table.set_foreign(before)
        if failed:
            raise KernelError(failed, "KVM_SET_GSI_ROUTING", "the VMM's own routes")

    def status(self) -> list[VectorStatus]:
        """A snapshot of every vector."""
        found: list[VectorStatus] = []
        with self._lock:
            for vector in list(self._vectors):
                if vector.state is not State.REMOVED:
                    found.append(self._vectors.status(vector))
                self._lock.give_way()
        return found

    def vectors(self) -> list[Vector]:
        """Every vector there is."""
        with self._lock:
            return [vector for vector in self._vectors if vector.state is not State.REMOVED]

    def close(self) -> None:
        """Remove every vector, and let none be added: nothing stays bound."""
        with self._lock:
            self._closed = True
        self.remove(self.vectors())

    # --- batches: what the loop decided. -------------------------------------------------------------------------

    def run(self, batch: Sequence[Op]) -> list[int]:
        """Carry out ``batch`` in order; one errno per operation, 0 where it succeeded.

        An operation that fails skips the rest of that vector's (``ECANCELED``). The table is written once, before the
        first ``Assign``, or at the end. ``ESTALE``: the vector changed since the decision. ``EAGAIN`` (``Catch``,
        ``CatchFault``): nothing was pending, so nothing was done.
        """
        errnos: list[int] = []
        failed: set[int] = set()
        refused = 0  # why the kernel refused the table, if it did
        for op in batch:
            if op.vector in failed:
                errnos.append(errno.ECANCELED)
                continue
            if isinstance(op, Assign):
                refused = self._write_routes() or refused
            result = self._run_one(op)
            if result == errno.ENXIO:  # refused in this batch's write, or in another thread's that took it along
                vector = self._vectors.find(op.vector)
                result = refused or (vector.assign_errno if vector is not None else 0) or result
            errnos.append(result)
            if result:
                failed.add(op.vector)
        refused = self._write_routes() or refused
        self._announce()
        if refused:
            self._blame(batch, errnos, refused)
        return errnos

    def _run_one(self, op: Op) -> int:
        if not isinstance(op, Deassign):
            with self._lock:
                return self._carry_out(op)
        with self._lock:
            vector = self._vectors.find(op.vector)
            if vector is None or vector.state is State.REMOVED:
                return errno.ESTALE
            deassigns = self._happen(vector, Event.INVALIDATED)
        try:
            self._deassign(deassigns)
        except KernelError as error:
            return error.errno
        return 0

    def run_now(self, op: Catch | CatchFault | Assign) -> int | None:
        """Carry out one delivery if that needs no waiting; None, and nothing done, if the lock is taken.

        This is what the event loop calls, which waits for nobody.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._carry_out(op)
        finally:
            self._lock.release()
            self._announce()

    def may_assign(self, vector: Vector, generation: Generation) -> bool:
        """Whether ``Assign`` is worth a try. Asked without the lock: what it says then counts."""
        routed = vector.accepted_generation == generation and not vector.assign_errno
        return routed and vector.id not in self._deassigning

    def _blame(self, batch: Sequence[Op], errnos: list[int], refused: int) -> None:
        """Give the errno of a refused table write to the batch's ``SetRoute`` operations that fell with it."""
        for index, op in enumerate(batch):
            if isinstance(op, SetRoute) and not errnos[index]:
                vector = self._vectors.find(op.vector)
                if vector is None or vector.accepted_generation != op.generation:
                    errnos[index] = refused

    def _write_routes(self) -> int:
        """Write the table if it differs from what the kernel accepted; an errno. The lock must not be held.

        The write waits for a grace period, for a millisecond or more where there are thousands of routes, and holds
        no lock but the writers' own meanwhile. Nothing depends on the table during it: an irqfd is assigned only
        after its route was accepted, and deassigned before its route is dropped. A refused write leaves the old
        routes live: the vectors whose routes were to change are deassigned.
        """
        with self._writing:
            return self._write()

    def _write(self) -> int:
        with self._lock:
            routes = self._vectors.routes
            changes = routes.begin_write()
            if not changes:
                return 0
        try:
            self._vm.set_gsi_routing(changes)
        except IrqrouterError as error:
            code = error.errno if isinstance(error, KernelError) else errno.EINVAL
            with self._lock:
                deassigns = self._refuse_routes(routes.refuse(changes), code)
            try:
                self._deassign(deassigns)
            except KernelError as failure:
                code = failure.errno
            return code
        with self._lock:
            routes.accept(changes)
            for gsi in changes:
                vector = self._vectors.routed_at(gsi)
                # Otherwise the vector has been given another route during the write, which the next one brings.
                if vector is not None and routes.has(gsi):
                    vector.accepted_generation = vector.routed_generation
                    self._show(vector)
        return 0

    def _deassign(self, deassigns: Sequence[_Deassign]) -> None:
        """Make the ioctl for each, or wait for whoever is making it. The lock must not be held.

        All are attempted; the last failure is raised. An irqfd that could not be deassigned is tried again by the next
        verb that meets it.
        """
        failure = self._attempt(deassigns)
        if failure is not None:
            raise failure

    def _attempt(self, deassigns: Sequence[_Deassign]) -> KernelError | None:
        """The same, and the failure is returned."""
        self._announce()
        failure: KernelError | None = None
        for deassign in deassigns:
            if deassign.claim():
                self._make_deassign(deassign)
            else:
                deassign.wait()
            failure = deassign.error or failure
        return failure

    def _announce(self) -> None:
        if self._mirror is not None:
            self._mirror.announce()

    def _make_deassign(self, deassign: _Deassign) -> None:
        vector = deassign.vector
        try:
            self._vm.irqfd_deassign(deassign.eventfd, vector.gsi)
        except KernelError as error:
            deassign.finish(error)
        except BaseException:  # whatever came up, nobody waits for ever, and the next verb tries again
            deassign.finish(KernelError(errno.EINTR, "KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN", f"vector {vector.id}"))
            raise
        else:
            with self._lock:
                self._deassigning.pop(vector.id, None)
            deassign.finish(None)

    # --- one operation each, with the lock held. -----------------------------------------------------------------

    def _carry_out(self, op: SetRoute | DropRoute | Catch | CatchFault | Assign) -> int:
        vector = self._vectors.find(op.vector)
        if vector is None:
            return errno.ESTALE
        if isinstance(op, DropRoute):
            return self._drop_route(vector)
        refusal = self._vectors.refusal(vector, op)
        if refusal:
            if refusal == errno.ESTALE:
                vector.stale += 1
                vector.lost_races += isinstance(op, Catch | CatchFault)
                self._show(vector)
            return refusal
        try:
            return self._carry_out_on(vector, op)
        except (CallerError, SpecError):  # a message that KVM cannot be given: the remapper's doing
            return errno.EINVAL
        except KernelError as error:
            return error.errno
        finally:
            self._show(vector)

    def _carry_out_on(self, vector: Vector, op: SetRoute | Catch | CatchFault | Assign) -> int:
        if isinstance(op, Catch):
            return self._catch(vector, op.delivery)
        if isinstance(op, CatchFault):
            return self._catch_fault(vector, op.record)
        if isinstance(op, SetRoute):
            return self._set_route(vector, op.route)
        return self._assign(vector, delivering=op.delivering)

    def _show(self, vector: Vector) -> None:
        if self._mirror is not None:
            self._mirror.show(vector)

    def _happen(self, vector: Vector, event: Event, *, cookie: Cookie | None = None) -> list[_Deassign]:
        """Move the vector. It is true once what is returned has been through :meth:`_deassign`, without the lock."""
        row = self._vectors.happen(vector, event)
        self._show(vector)
        if row.deassign:
            cookie = vector.cookie if cookie is None else cookie
            self._deassigning[vector.id] = _Deassign(vector, self._eventfds[vector.id], cookie)
        return self._on_its_way(vector)

    def _on_its_way(self, vector: Vector) -> list[_Deassign]:
        """The vector's deassign that has not returned yet, if there is one; one that failed begins anew."""
        deassign = self._deassigning.get(vector.id)
        if deassign is None:
            return []
        if deassign.error is not None:
            deassign = self._deassigning[vector.id] = _Deassign(vector, deassign.eventfd, deassign.cookie)
        return [deassign]

    def _all_on_their_way(self, scope: Scope) -> list[_Deassign]:
        """Every deassign that has not returned yet of an irqfd which ``scope`` touches."""
        found: list[_Deassign] = []
        for deassign in list(self._deassigning.values()):
            if deassign.cookie in scope:
                found += self._on_its_way(deassign.vector)
        return found

    def _refuse_new(self, fd: int, eventfd: Eventfd) -> None:
        if self._closed:
            raise CallerError("the router", "is closed")
        if eventfd.identity in self._identities:
            raise DuplicateEventfdError(f"descriptor {fd}", "its eventfd is a vector already")

    def _release(self, vector: Vector) -> None:
        """Let go of what a removed vector held."""
        bound = self._deassigning.pop(vector.id, None) is not None  # its deassign failed: KVM has the irqfd still
        self._vectors.routes.drop(vector.gsi)
        eventfd = self._eventfds.pop(vector.id)
        self._identities.discard(eventfd.identity)
        self._vectors.forget(vector, bound=bound)
        eventfd.close()

    def _drop_route(self, vector: Vector) -> int:
        if vector.state is State.ASSIGNED or vector.id in self._deassigning:
            return errno.EBUSY
        self._vectors.routes.drop(vector.gsi)
        vector.accepted_generation = 0
        self._show(vector)
        return 0

    def _set_route(self, vector: Vector, route: Message) -> int:
        vector.routed_generation = vector.generation
        known = self._vectors.routes.set(vector.gsi, route)
        vector.accepted_generation = vector.generation if known else 0
        return 0

    def _catch(self, vector: Vector, delivery: Message) -> int:
        eventfd = self._eventfds[vector.id]
        count = eventfd.read()
        if not count:
            return errno.EAGAIN
        try:
            self._vm.signal_msi(delivery)  # 0 vCPUs took it: as in hardware, that is delivered
        except BaseException:
            eventfd.write(1)  # what had gathered is one event, and a full count could not be written
            raise
        self._vectors.happen(vector, Event.CAUGHT)
        vector.caught += 1
        self._won(vector)
        return 0

    def _catch_fault(self, vector: Vector, fault: Fault) -> int:
        eventfd = self._eventfds[vector.id]
        # Recorded first, consumed second: whoever dies between the two has recorded once too often, and lost nothing.
        # So pending is asked before, without taking it.
        if not eventfd.pending():
            return errno.EAGAIN
        if fault.recorded:
            self._record_fault(vector, fault)
        if eventfd.read() > 1 and fault.recorded:  # an event may have come after the record, and this took it too
            try:
                self._record_fault(vector, fault)
            except BaseException:
                eventfd.write(1)  # that one is pending still
                raise
        self._vectors.happen(vector, Event.FAULT_CAUGHT)
        vector.faults += 1
        self._won(vector)
        return 0

    def _assign(self, vector: Vector, *, delivering: bool) -> int:
        if vector.id in self._deassigning:
            return errno.EINPROGRESS
        eventfd = self._eventfds[vector.id]
        if delivering and not eventfd.pending():
            return errno.EAGAIN
        try:
            self._vm.irqfd_assign(eventfd, vector.gsi)
        except KernelError as error:
            # EBUSY: somebody else's irqfd. What is pending was not injected and must not be discarded; we deliver.
            vector.assign_errno = error.errno
            raise
        self._vectors.happen(vector, Event.ASSIGNED)
        # KVM injected what was pending, and did not drain it.
        vector.deferred = bool(eventfd.read())
        vector.discarded += vector.deferred
        return 0

    def _refuse_routes(self, gsis: list[int], code: int) -> list[_Deassign]:
        deassigns: list[_Deassign] = []
        for gsi in gsis:
            vector = self._vectors.routed_at(gsi)
            if vector is not None and vector.state is not State.REMOVED:
                deassigns += self._happen(vector, Event.ROUTE_REFUSED)
                if code not in _PASSING:
                    vector.assign_errno = code
                    self._show(vector)
        return deassigns

    def _won(self, vector: Vector) -> None:
        """An event of ``vector`` has been taken."""
        vector.lost_races = 0
        awaited = self._awaited.pop(vector.id, None)
        if awaited is not None:
            awaited.caught.set()

    def _serve(self, vector: Vector) -> list[_Awaited]:
        """See to a pending event: decisions about it keep coming too late.

        Deliver it here and now, or, if others must decide, return what to wait for once the lock is released.
        """
        if vector.lost_races < PATIENCE or vector.state is not State.DEASSIGNED:
            return []
        if self._translate is None:
            if not self._eventfds[vector.id].pending():
                return []
            return [self._awaited.setdefault(vector.id, _Awaited(vector, threading.Event()))]
        catch = decide(vector.id, vector.generation, self._translate(vector.request))
        if isinstance(catch, Catch):  # a fault is left to the loop, which reads the entry twice
            self._carry_out(catch)
        return []

    def _await(self, awaited: Sequence[_Awaited]) -> None:
        """Give those who decide a moment to catch these, at a generation that stands still meanwhile."""
        deadline = time.monotonic() + CATCH_WAIT_S
        for each in awaited:
            if not each.caught.wait(max(0.0, deadline - time.monotonic())):
                with self._lock:
                    self._awaited.pop(each.vector.id, None)
                    each.vector.lost_races = 0  # nobody decides: waiting again before somebody does is in vain
