"""The loop: from an eventfd that fires to an interrupt that is delivered, and back to sleep.

While a vector is *assigned*, KVM's irqfd takes every event before epoll can see it, and this file does nothing at all.
An invalidation, on whatever thread the guest caused it, deassigns the irqfds it touches and returns. Nothing else
happens until such an eventfd fires again. Then::

    1st event:  harvest -> translate -> Catch (now) -> SetRoute ... one table write for all that waits
    2nd event:  harvest -> Assign (now): KVM delivers it, and every one after it

The first event is *caught*: taken and delivered at once, in microseconds, on the loop's thread. Its route follows on
the *settler*'s thread, because a table write waits for a grace period. The irqfd is assigned when the next event is
pending, and delivers that: assigned in between, on an eventfd that is being signalled, KVM now and then injects an
event twice (``Assign`` tells why). If the executor's lock is taken, the settler does it; the loop waits for nobody.

A translation that fails is read again after a short pause (guests write the two halves of an entry separately), and
only then caught as a fault, at delivery, as hardware does.

Every eventfd is watched through one private epoll set in one-shot mode: what fired is disarmed until it has been
answered, so a batch in flight costs no wakeups, and re-arming polls again, so nothing is missed. ``kvm/eventfd.py``
tells why it has to be so.
"""

import asyncio
import errno
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

import msgspec
import structlog

from irqrouter.core.machine import State
from irqrouter.core.ops import Assign, Catch, CatchFault, SetRoute
from irqrouter.core.vectors import Vector, VectorStatus, decide, route
from irqrouter.errors import CallerError, KernelError
from irqrouter.iommu.fault import Fault
from irqrouter.iommu_remap import Remapper
from irqrouter.kvm.executor import Executor
from irqrouter.kvm.port import Eventfd, Vm, WatchSet
from irqrouter.scope import Scope
from irqrouter.uevents import Uevent, Uevents, departed_pci_device, unbound_pci_devices
from irqrouter.x86.msi import Message, Request, checked

log = structlog.get_logger("irqrouter")

#: How long after a failed translation the entry is read again, before the fault is caught. A guest's driver writes the
#: two halves of an entry within nanoseconds; a vCPU that is preempted between them takes longer.
SECOND_READING_S = 0.0005
#: How many fired eventfds one turn of the loop takes; the rest come in the next.
HARVEST_MAX = 512
#: An event that cannot be delivered is tried again after this, doubling up to the second.
BACK_OFF_MIN_S, BACK_OFF_MAX_S = 0.001, 1.0

#: Outcomes of a delivery that mean "not now": somebody else had the event, or the vector changed.
_MOOT = frozenset({errno.EAGAIN, errno.ESTALE, errno.EALREADY, errno.EINPROGRESS})
#: Outcomes of routing and assigning that are no refusal by the kernel.
_NOT_REFUSED = frozenset({0, errno.ESTALE, errno.EALREADY, errno.ECANCELED, errno.EINPROGRESS})


class LoopThreadError(CallerError):
    """A verb was called on the event loop's own thread, which it would stall."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What a vector is made of.

    ``eventfd``: a descriptor with ``EFD_NONBLOCK`` and without ``EFD_SEMAPHORE``; it is duplicated and stays yours.
    ``message``: the MSI address and data the guest gave the device. ``requester``: the device's requester id, 16 bits.
    ``device``: the host's name for the device (``0000:03:00.0``), so that it can be removed by it.
    """

    eventfd: int
    message: Message
    requester: int
    masked: bool = False
    device: str | None = None


class _Miss(NamedTuple):
    """An event on its way from the harvest to the next watch."""

    vector: Vector
    woken_ns: int
    op: Catch | CatchFault | Assign
    done: bool


class Router:
    """Routes the interrupts of one VM, on the event loop that entered it (``async with``), uvloop or the stdlib's.

    Its *verbs* (:meth:`add`, :meth:`program`, :meth:`mask`, :meth:`unmask`, :meth:`invalidate`, :meth:`remove`) block
    until they are true and may be called from any thread, a vCPU's for example, except the event loop's own; there use
    ``await asyncio.to_thread(router.invalidate, scope)``.

    ``on_fault(vector, fault)`` is called for each fault that is to be recorded, before its event is consumed, on any
    thread and with a lock held: it must only store, and not call the router.
    """

    def __init__(self, vm: Vm, remapper: Remapper, *, on_fault: Callable[[Vector, Fault], None]) -> None:
        self._remapper = remapper
        self._executor = Executor(vm, record_fault=on_fault, translate=remapper.translate)
        self._watched = _Watched(vm.watch_set())
        self._delays: dict[int, float] = {}
        self._settler = _Settler(self._settle, self._back_off)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: int | None = None
        self._closing: asyncio.Future[None] | None = None
        #: How often an eventfd woke the loop.
        self.wakeups = 0
        #: How often one did that belonged to an assigned vector. Anything but 0 means that KVM does not hide events.
        self.wakeups_while_assigned = 0

    async def __aenter__(self) -> "Router":
        if self._loop is not None or self._closing is not None:
            raise CallerError("the router", "can be entered once, and not after it was closed")
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._loop.add_reader(self._watched.fileno(), self._turn)
        self._settler.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop routing: every irqfd is deassigned, every route of ours dropped, every descriptor closed. Idempotent."""
        if self._closing is None:
            if self._loop is not None:
                self._loop.remove_reader(self._watched.fileno())
            self._closing = asyncio.get_running_loop().run_in_executor(None, self._release)
        await asyncio.shield(self._closing)  # whoever is cancelled here has closed it all the same

    def _release(self) -> None:
        self._settler.stop()
        try:
            self._executor.close()
        finally:
            self._watched.close()

    # --- verbs ---------------------------------------------------------------------------------------------------

    def add(
        self,
        eventfd: int,
        message: Message,
        *,
        requester: int,
        masked: bool = False,
        device: str | None = None,
    ) -> Vector:
        """Add one vector; see :class:`Source` for the arguments and :meth:`add_all` for the errors."""
        source = Source(eventfd=eventfd, message=message, requester=requester, masked=masked, device=device)
        return self.add_all([source])[0]

    def add_all(self, sources: Iterable[Source]) -> list[Vector]:
        """Add vectors with one table write. All are added, or none.

        Each is translated once without recording a fault; where that succeeds its irqfd is assigned at once.
        Raises :class:`~irqrouter.errors.CallerError` (not an eventfd, semaphore, blocking, a vector already; no GSI
        left), :class:`~irqrouter.errors.SpecError` (message or requester do not fit) and
        :class:`~irqrouter.errors.KernelError` (``EBUSY``: the eventfd has somebody else's irqfd; ``EIO``: the VM
        belongs to another process).
        """
        self._refuse_on_loop("add")
        added: list[tuple[Vector, Eventfd]] = []
        try:
            for source in sources:
                request = Request(checked(source.message), source.requester)
                added.append(
                    self._executor.add(
                        source.eventfd,
                        request,
                        self._remapper.cookie(request),
                        masked=source.masked,
                        device=source.device,
                    )
                )
            self._assign_new([vector for vector, _ in added if vector.state is not State.MASKED])
            for vector, eventfd in added:
                self._watched.add(vector, eventfd)
        except BaseException:
            self._executor.remove(self._forgotten(vector for vector, _ in added))
            raise
        return [vector for vector, _ in added]

    def invalidate(self, scope: Scope) -> int:
        """Drop every translation in ``scope`` and return how many vectors that touched.

        Only when this has returned may the guest see its invalidation completed (write the wait descriptor's status):
        no event signalled from then on is delivered by an older translation.
        """
        self._refuse_on_loop("invalidate")
        return self._executor.invalidate(scope)

    def mask(self, vector: Vector) -> None:
        """Mask ``vector``. Its events wait in its eventfd, as in a pending bit; nothing is delivered meanwhile."""
        self._refuse_on_loop("mask")
        self._executor.mask(vector)

    def unmask(self, vector: Vector) -> None:
        """Unmask ``vector``. What waited is delivered now, through a fresh translation."""
        self._refuse_on_loop("unmask")
        self._executor.unmask(vector)
        self._watched.look_again(vector)

    def program(self, vector: Vector, message: Message) -> None:
        """Give ``vector`` another MSI address and data, masked or not. Its next event is translated afresh."""
        self._refuse_on_loop("program")
        request = Request(checked(message), vector.request.requester)
        self._executor.program(vector, request, self._remapper.cookie(request))

    def remove(self, *vectors: Vector) -> None:
        """Remove ``vectors``. When this returns KVM knows nothing of them; what is pending stays in your eventfds.

        Raises :class:`~irqrouter.core.vectors.VectorGoneError` for one that was removed before.
        """
        self._refuse_on_loop("remove")
        self._executor.remove(self._forgotten(self._executor.known(vectors)))

    def remove_device(self, device: str) -> int:
        """Remove every vector that was added for ``device``; return how many there were."""
        self._refuse_on_loop("remove_device")
        gone = [vector for vector in self._executor.vectors() if vector.device == device]
        self._executor.remove(self._forgotten(gone))
        log.info("device removed", device=device, vectors=len(gone))
        return len(gone)

    async def follow_uevents(self, uevents: Uevents) -> None:
        """Until cancelled, or ``uevents`` is closed: a PCI device that leaves takes its vectors with it.

        Devices are known by the ``device`` their vectors were added with, as in sysfs (``0000:03:00.0``).
        """
        async for event in uevents:
            vectors = await asyncio.to_thread(self._executor.vectors)
            held = {vector.device for vector in vectors if vector.device is not None}
            if isinstance(event, Uevent):
                gone = held & {departed_pci_device(event)}
            else:  # events were lost: look instead
                gone = unbound_pci_devices(held)
            for device in gone:
                await asyncio.to_thread(self.remove_device, device)

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None:
        """Replace the VMM's own routes (GSI to message). The table is the router's: they must go in through here."""
        self._refuse_on_loop("set_foreign_routes")
        self._executor.set_foreign_routes(routes)

    def vectors(self) -> list[VectorStatus]:
        """A snapshot of every vector."""
        return self._executor.status()

    # --- the loop ------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """One turn: everything that fired is delivered at once, and its routes are settled as one batch."""
        woken_ns = time.perf_counter_ns()
        for vector in self._watched.harvest():
            self.wakeups += 1
            if vector.state is State.ASSIGNED:
                self.wakeups_while_assigned += 1
                self._back_off(vector)  # its irqfd is gone, or hides nothing: whatever it is, it must not spin
            else:
                self._attend(vector, woken_ns)
        self._settler.go()

    def _attend(self, vector: Vector, woken_ns: int, *, second_reading: bool = False) -> None:
        """An event came on a vector that KVM does not deliver: deliver it, or have KVM deliver it."""
        try:
            op = self._decide(vector)
            if isinstance(op, CatchFault) and not second_reading:
                self._later(SECOND_READING_S, self._read_again, vector, woken_ns)
                return
            result = self._executor.run_now(op)
        except Exception:  # the remapper and on_fault may be the embedder's: their failure must not lose the event
            log.exception("an event could not be attended to", vector=vector.id)
            self._back_off(vector)
            return
        miss = _Miss(vector, woken_ns, op, done=result is not None)
        if result is None:  # the lock is taken
            self._settler.put(miss)
        else:
            self._delivered(miss, result)

    def _read_again(self, vector: Vector, woken_ns: int) -> None:
        """The second reading after a failed translation: now its outcome counts, whatever it is."""
        self._attend(vector, woken_ns, second_reading=True)
        self._settler.go()

    def _decide(self, vector: Vector) -> Catch | CatchFault | Assign:
        generation = vector.generation  # before the first byte of the guest's tables is read
        if self._executor.may_assign(vector, generation):
            return Assign(vector.id, generation, delivering=True)
        return decide(vector.id, generation, self._remapper.translate(vector.request))

    def _delivered(self, miss: _Miss, result: int) -> None:
        """Go on after a delivery, on whichever thread it was made."""
        vector = miss.vector
        if result == 0:
            vector.last_miss_us = (time.perf_counter_ns() - miss.woken_ns) / 1000
            self._delays.pop(vector.id, None)
            if isinstance(miss.op, Catch) and not vector.assign_errno:
                self._settler.put(miss)
                return
        elif result not in _MOOT:
            log.warning("cannot deliver", vector=vector.id, error=os.strerror(result), op=miss.op.describe())
            if not isinstance(miss.op, Assign):  # otherwise it is caught at once: assign_errno is set
                self._back_off(vector)
                return
        self._watched.answered(vector)

    def _back_off(self, vector: Vector) -> None:
        """Leave an event that cannot be delivered in its eventfd, and look again later: never spin."""
        delay = self._delays.get(vector.id, BACK_OFF_MIN_S)
        self._delays[vector.id] = min(2 * delay, BACK_OFF_MAX_S)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._later, delay, self._watched.answered, vector)

    def _later(self, delay_s: float, function: Callable[..., None], *arguments: object) -> None:
        def unless_closed() -> None:
            if self._closing is None:
                function(*arguments)

        assert self._loop is not None
        self._loop.call_later(delay_s, unless_closed)

    def _settle(self, misses: Sequence[_Miss]) -> None:
        """On the settler's thread, what the last turns left: late deliveries; then the routes, in one table write."""
        late = [miss for miss in misses if not miss.done]
        for miss, result in zip(late, self._executor.run([miss.op for miss in late]), strict=True):
            self._delivered(miss._replace(done=True), result)
        caught = [miss for miss in misses if miss.done]
        self._run([route(miss.op) for miss in caught if isinstance(miss.op, Catch)])
        for miss in caught:
            self._watched.answered(miss.vector)

    # --- small parts ---------------------------------------------------------------------------------------------

    def _assign_new(self, vectors: list[Vector]) -> None:
        """Translate new vectors, quietly, and assign those for which that succeeds, with one table write."""
        caught = [op for op in [self._decide(vector) for vector in vectors] if isinstance(op, Catch)]
        batch: list[SetRoute | Assign] = [route(catch) for catch in caught]
        batch += [Assign(catch.vector, catch.generation) for catch in caught]
        for op, result in self._run(batch):
            raise KernelError(result, _call_of(op), f"vector {op.vector}")

    def _run(self, batch: Sequence[SetRoute | Assign]) -> list[tuple[SetRoute | Assign, int]]:
        """Carry out ``batch``; returns what the kernel refused."""
        results = zip(batch, self._executor.run(batch), strict=True)
        refused = [(op, result) for op, result in results if result not in _NOT_REFUSED]
        for op, result in refused:
            log.warning("refused; the loop delivers", vector=op.vector, call=_call_of(op), error=os.strerror(result))
        return refused

    def _forgotten(self, vectors: Iterable[Vector]) -> list[Vector]:
        gone = list(vectors)
        for vector in gone:
            self._watched.forget(vector)
            self._delays.pop(vector.id, None)
        return gone

    def _refuse_on_loop(self, verb: str) -> None:
        if threading.get_ident() == self._loop_thread:
            raise LoopThreadError(
                f"Router.{verb}",
                f"would stall the event loop here: await asyncio.to_thread(router.{verb}, ...)",
            )


class _Watched:
    """The eventfds of the vectors in the epoll set, and who has fired and was not answered yet.

    What has fired is never armed before it has been answered, so a vector has one miss on its way at most. Harvesting,
    answering and looking again exclude one another: between two of them a wake-up could be lost or come twice.
    """

    def __init__(self, watch_set: WatchSet) -> None:
        self._set = watch_set
        self._by_fd: dict[int, Vector] = {}
        self._eventfds: dict[Vector, Eventfd] = {}
        self._unanswered: set[Vector] = set()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Readable while there is something to harvest."""
        return self._set.fileno()

    def add(self, vector: Vector, eventfd: Eventfd) -> None:
        """Watch ``eventfd`` for ``vector``."""
        with self._lock:
            self._by_fd[eventfd.fileno()] = vector
            self._eventfds[vector] = eventfd
            self._set.arm(eventfd)

    def forget(self, vector: Vector) -> None:
        """Forget the descriptor before it is closed: its number may be reused at once."""
        with self._lock:
            eventfd = self._eventfds.pop(vector, None)
            if eventfd is not None:
                self._by_fd.pop(eventfd.fileno(), None)  # closed already, if the router was closed meanwhile
                self._unanswered.discard(vector)

    def harvest(self) -> list[Vector]:
        """The vectors that fired, to be answered. A masked one stays pending, until it is looked at again."""
        with self._lock:
            fired = [self._by_fd[fd] for fd in self._set.harvest(HARVEST_MAX) if fd in self._by_fd]
            fired = [vector for vector in fired if vector.state is not State.MASKED]
            self._unanswered.update(fired)
            return fired

    def answered(self, vector: Vector) -> None:
        """Watch again a vector that was harvested."""
        with self._lock:
            self._unanswered.discard(vector)
            self._arm(vector)

    def look_again(self, vector: Vector) -> None:
        """Watch a vector that may have been masked when it fired."""
        with self._lock:
            if vector not in self._unanswered:
                self._arm(vector)

    def close(self) -> None:
        """Close the set."""
        self._set.close()

    def _arm(self, vector: Vector) -> None:
        eventfd = self._eventfds.get(vector)
        if eventfd is not None:
            self._set.arm(eventfd)


class _Settler:
    """A thread that carries out what must not be done on the loop's; whatever has gathered by then is one batch."""

    def __init__(self, settle: Callable[[Sequence[_Miss]], None], give_up: Callable[[Vector], None]) -> None:
        self._settle = settle
        self._give_up = give_up
        self._waiting: deque[_Miss] = deque()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="irqrouter-settler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, miss: _Miss) -> None:
        """Leave ``miss`` for the thread; it begins at the next :meth:`go`."""
        self._waiting.append(miss)

    def go(self) -> None:
        """Wake the thread if something waits: once per turn, so that one turn is one batch."""
        if self._waiting:
            self._wake.put(True)

    def stop(self) -> None:
        """Finish what waits, and end the thread."""
        if self._thread.is_alive():
            self._wake.put(False)
            self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            going = self._wake.get()
            while self._waiting:  # settling a late catch leaves more
                misses = [self._waiting.popleft() for _ in range(len(self._waiting))]
                try:
                    self._settle(misses)
                except Exception:
                    log.exception("settling failed")  # a bug, in us or in on_fault: these must not be forgotten
                    for miss in misses:
                        self._give_up(miss.vector)


def _call_of(op: SetRoute | Assign) -> str:
    return "KVM_IRQFD" if isinstance(op, Assign) else "KVM_SET_GSI_ROUTING"
