"""The executor: carries out operations on one VM, and is the truth about its vectors.

Two kinds of callers meet here. The loop decides about events that fired and passes *batches* (:meth:`Executor.run`).
The VMM's own threads, vCPUs mostly, say what the guest did through *verbs* (:meth:`Executor.invalidate`, ``mask``,
``program``, ...), which are true when they return. One lock orders the two. It is handed over in order, and held for
microseconds: the two calls that wait for a grace period in the kernel are made without it.

A *deassign* first changes the vector, under the lock, so that nothing decided before counts any more; then makes the
ioctl. Until that has returned KVM may still inject by the old route, so a verb that finds a deassign on its way waits
for it, and ``Assign`` is refused. A *table write* is a snapshot, ordered by a lock of its own.

What a batch decided is checked against the vector as it is now: an older generation is refused with ``ESTALE``, and
``Catch``, ``CatchFault`` and ``Assign`` are refused unless the vector is deassigned. A batch ends by writing the
routing table if it changed, before the caller acknowledges anything to anybody.

Works on any kernel of ``kvm/port.py``: the real one, and the simulated one.
"""

import errno
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

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

#: Refusals of a table that may be gone at the next event.
_PASSING = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EINTR})


class DuplicateEventfdError(CallerError):
    """The eventfd is a vector's already: one would eat the other's events."""


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


class Executor:
    """Carries out operations on ``vm``.

    ``record_fault(vector, fault)`` puts a fault where the VMM keeps them; it is called with the lock held, before the
    event is consumed, and must only store. ``translate(request)`` is the remapper's: an invalidation uses it to serve
    a vector that keeps losing the race.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        record_fault: Callable[[Vector, Fault], None],
        translate: Callable[[Request], Message | Fault],
    ) -> None:
        self._vm = vm
        self._record_fault = record_fault
        self._translate = translate
        self._lock = FairLock()
        self._writing = threading.Lock()  # one table write at a time, so that the kernel has the latest; see there
        self._vectors = Vectors(RouteTable(vm.pins, vm.routes_max))
        self._eventfds: dict[int, Eventfd] = {}
        self._identities: set[int] = set()
        self._deassigning: dict[int, _Deassign] = {}  # by vector; one that failed stays, to be tried again
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
        failure: Exception | None = None
        with self._lock:
            matching = self._vectors.matching(scope)
            for vector in matching:
                if vector.state is not State.REMOVED:
                    vector.invalidations += 1
                    deassigns += self._happen(vector, Event.INVALIDATED)
                    try:
                        self._serve(vector)
                    except Exception as error:  # noqa: BLE001 - the remapper's; the others must be deassigned first
                        failure = error
                self._lock.give_way()
            # Those of vectors that were removed, or given another cookie, and whose irqfd may still be there.
            if len(self._deassigning) > len(deassigns):
                for deassign in list(self._deassigning.values()):
                    if deassign.cookie in scope:
                        deassigns += self._on_its_way(deassign.vector)
        self._deassign(deassigns)
        if failure is not None:
            raise failure
        return len(matching)

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
        return 0

    def _deassign(self, deassigns: Sequence[_Deassign]) -> None:
        """Make the ioctl for each, or wait for whoever is making it. The lock must not be held.

        All are attempted; the last failure is raised. An irqfd that could not be deassigned is tried again by the next
        verb that meets it.
        """
        failure: KernelError | None = None
        for deassign in deassigns:
            if deassign.claim():
                self._make_deassign(deassign)
            else:
                deassign.wait()
            failure = deassign.error or failure
        if failure is not None:
            raise failure

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
            return refusal
        try:
            if isinstance(op, Catch):
                return self._catch(vector, op.delivery)
            if isinstance(op, CatchFault):
                return self._catch_fault(vector, op.record)
            if isinstance(op, SetRoute):
                return self._set_route(vector, op.route)
            return self._assign(vector, delivering=op.delivering)
        except (CallerError, SpecError):  # a message that KVM cannot be given: the remapper's doing
            return errno.EINVAL
        except KernelError as error:
            return error.errno

    def _happen(self, vector: Vector, event: Event, *, cookie: Cookie | None = None) -> list[_Deassign]:
        """Move the vector. It is true once what is returned has been through :meth:`_deassign`, without the lock."""
        row = self._vectors.happen(vector, event)
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

    def _refuse_new(self, fd: int, eventfd: Eventfd) -> None:
        if self._closed:
            raise CallerError("the router", "is closed")
        if eventfd.identity in self._identities:
            raise DuplicateEventfdError(f"descriptor {fd}", "its eventfd is a vector already")

    def _release(self, vector: Vector) -> None:
        """Let go of what a removed vector held."""
        self._deassigning.pop(vector.id, None)
        self._vectors.routes.drop(vector.gsi)
        eventfd = self._eventfds.pop(vector.id)
        self._identities.discard(eventfd.identity)
        self._vectors.forget(vector)
        eventfd.close()

    def _drop_route(self, vector: Vector) -> int:
        if vector.state is State.ASSIGNED or vector.id in self._deassigning:
            return errno.EBUSY
        self._vectors.routes.drop(vector.gsi)
        vector.accepted_generation = 0
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
        vector.lost_races = 0
        return 0

    def _catch_fault(self, vector: Vector, fault: Fault) -> int:
        eventfd = self._eventfds[vector.id]
        # Recorded first, consumed second: whoever dies between the two has recorded once too often, and lost nothing.
        # So pending is asked before, without taking it.
        if not eventfd.pending():
            return errno.EAGAIN
        if fault.recorded:
            self._record_fault(vector, fault)
        if eventfd.read() > 1 and fault.recorded:
            self._record_fault(vector, fault)  # an event may have come after the record, and this took it too
        self._vectors.happen(vector, Event.FAULT_CAUGHT)
        vector.faults += 1
        vector.lost_races = 0
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
        if eventfd.read():
            vector.discarded += 1
        return 0

    def _refuse_routes(self, gsis: list[int], code: int) -> list[_Deassign]:
        deassigns: list[_Deassign] = []
        for gsi in gsis:
            vector = self._vectors.routed_at(gsi)
            if vector is not None and vector.state is not State.REMOVED:
                deassigns += self._happen(vector, Event.ROUTE_REFUSED)
                if code not in _PASSING:
                    vector.assign_errno = code
        return deassigns

    def _serve(self, vector: Vector) -> None:
        """Deliver a pending event here and now: the loop's decisions about it keep coming too late."""
        if vector.lost_races >= PATIENCE and vector.state is State.DEASSIGNED:
            catch = decide(vector.id, vector.generation, self._translate(vector.request))
            if isinstance(catch, Catch):  # a fault is left to the loop, which reads the entry twice
                self._carry_out(catch)
