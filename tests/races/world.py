"""A small world: one VM on the simulated kernel, the real router and executor, and books that know I1-I7.

Every reading of the guest's table gives a message of its own (an APIC id and vector number nobody else has), so a
delivery tells which entry it came from, which version of it, and when that was read.
"""

import select
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from irqrouter.core.ops import SetRoute
from irqrouter.core.vectors import Vector
from irqrouter.eventfd_loop import Router
from irqrouter.iommu.fault import Fault
from irqrouter.kvm.executor import _Deassign
from irqrouter.kvm.port import Eventfd
from irqrouter.kvm.simulated import SimulatedKernel, SimulatedVm, _Irqfd
from irqrouter.scope import Cookie, Scope
from irqrouter.x86.msi import Message, Request
from tests.races.explorer import Actor, Choices, ImpossibleError, InvariantBrokenError, Script

VCPUS = 8
FIRST_VECTOR = 0x20
#: How often in one run somebody is interrupted in the middle of a step, by any number of steps of others. Each known
#: race needs one.
PREEMPTIONS = 1
#: Actors that never wait for the executor's lock.
NEVER_WAIT = frozenset({"device", "the loop turns", "a timer runs out", "KVM's work queue runs"})


@dataclass
class Reading:
    """One reading of a table entry."""

    book: "Book"
    cookie: Cookie
    version: int
    time: int


@dataclass
class Signal:
    """An event on an eventfd, and what had been acknowledged by then."""

    versions: dict[Cookie, int]
    program: int


@dataclass
class Book:
    """What is known of one vector from the outside."""

    name: str
    fd: int
    programs: list[Cookie]
    vector: Vector | None = None
    program: int = 0  # the newest that was acknowledged
    acknowledged: dict[Cookie, int] = field(default_factory=dict)
    signals: int = 0
    outcomes: int = 0
    uncovered: list[Signal] = field(default_factory=list)  # those that no outcome has followed yet
    masked: bool = False
    fresh_since: int = 0  # when the last unmask began
    removed: bool = False


class World:
    """Scripts act on it; :meth:`run` lets them, the loop, the settler and the timers take turns until all is quiet."""

    def __init__(self, choices: Choices, *, deferred: bool = False) -> None:
        self.choices = choices
        self.trace: list[str] = []
        self.time = 0
        self.kernel = SimulatedKernel(deferred=deferred)
        self.vm = _PointVm(self.kernel.vm(vcpus=range(VCPUS), on_delivery=self._delivered), self)
        self.router = Router(self.vm, _Table(self), on_fault=self._faulted)
        self.executor = self.router._executor
        self.lock = PointLock(self)
        self.executor._lock = self.lock  # type: ignore[assignment]
        self.executor._writing = _WritersLock()  # type: ignore[assignment]
        self.timers: list[Callable[[], None]] = []
        self.router._loop = _Timers(self)  # type: ignore[assignment]
        self._actors: list[Actor] = [_Loop(self), _Settler(self), _Timer(self), _WorkQueue(self)]
        self._versions: dict[Cookie, list[bool]] = {}  # of each entry: is that version valid
        self._owner: dict[Cookie, Book] = {}
        self._books: list[Book] = []
        self._readings: list[Reading] = []
        self._exploring = False
        self._preemptions = 0

    # --- what scripts do -----------------------------------------------------------------------------------------

    def add(self, name: str, cookie: Cookie, *, masked: bool = False) -> Book:
        """A vector on an eventfd of its own, programmed with the message of entry ``cookie``."""
        book = Book(name, self.kernel.eventfd(), [cookie], masked=masked)
        self._versions.setdefault(cookie, [True])
        self._owner[cookie] = book
        self._books.append(book)
        book.acknowledged[cookie] = 0
        book.vector = self.router.add(book.fd, message_of(cookie), requester=0, masked=masked)
        return book

    def fire(self, book: Book) -> None:
        """The device signals."""
        self._say(f"{book.name} fires")
        book.signals += 1
        book.uncovered.append(Signal(dict(book.acknowledged), book.program))
        self.kernel.signal(book.fd)

    def write(self, cookie: Cookie, *, valid: bool = True) -> None:
        """The guest writes entry ``cookie``."""
        self._versions.setdefault(cookie, []).append(valid)
        version = len(self._versions[cookie]) - 1
        self._say(f"guest writes entry {cookie}, version {version}{'' if valid else ', invalid'}")

    def invalidate(self, cookie: Cookie) -> None:
        """The guest invalidates entry ``cookie``, and sees it done."""
        version = len(self._versions[cookie]) - 1
        self._say(f"invalidation of {cookie} begins")
        self.router.invalidate(Scope(cookie, cookie))
        self._owner[cookie].acknowledged[cookie] = version
        self._say(f"invalidation of {cookie} acknowledged")

    def invalidate_wide(self, *cookies: Cookie, answered: bool = True) -> list[SetRoute]:
        """The guest invalidates the entries ``cookies``, first to last, all at once; returns what was decided.

        Somebody else translates the vectors that are assigned, and answers in time or not.
        """
        versions = {cookie: len(self._versions[cookie]) - 1 for cookie in cookies}
        self._say(f"wide invalidation of {cookies} begins")
        wide = self.executor.begin_wide(Scope(cookies[0], cookies[-1]))
        routes: list[SetRoute] = []
        for vector in [left.vector for left in wide.left]:
            generation = vector.generation
            outcome = self.router._remapper.translate(vector.request)
            if isinstance(outcome, Message):
                routes.append(SetRoute(vector.id, generation, outcome))
        self.executor.finish_wide(wide, routes if answered else [])
        for cookie, version in versions.items():
            book = self._owner[cookie]
            book.acknowledged[cookie] = max(version, book.acknowledged[cookie])
        self._say(f"wide invalidation of {cookies} acknowledged")
        return routes

    def route_without_a_write(self, book: Book) -> None:
        """A thread translates and sets the route, and has not begun to write the table when others go on."""
        assert book.vector is not None
        generation = book.vector.generation
        outcome = self.router._remapper.translate(book.vector.request)
        assert isinstance(outcome, Message)
        with self.lock:
            self.executor._carry_out(SetRoute(book.vector.id, generation, outcome))
        self._say(f"a route for {book.name} is wanted")

    def program(self, book: Book, cookie: Cookie) -> None:
        """The guest gives the vector the message of another entry."""
        assert book.vector is not None
        self._versions.setdefault(cookie, [True])
        self._owner[cookie] = book
        book.programs.append(cookie)
        program = len(book.programs) - 1
        book.acknowledged.setdefault(cookie, len(self._versions[cookie]) - 1)
        self._say(f"{book.name} is being programmed with entry {cookie}")
        self.router.program(book.vector, message_of(cookie))
        book.program = program
        self._say(f"{book.name} programmed")

    def mask(self, book: Book) -> None:
        assert book.vector is not None
        self._say(f"{book.name} is being masked")
        self.router.mask(book.vector)
        book.masked = True
        self._say(f"{book.name} masked")

    def unmask(self, book: Book) -> None:
        assert book.vector is not None
        self._say(f"{book.name} is being unmasked")
        book.masked = False
        book.fresh_since = self.time
        self.router.unmask(book.vector)
        self._say(f"{book.name} unmasked")

    def remove(self, book: Book) -> None:
        assert book.vector is not None
        self._say(f"{book.name} is being removed")
        self.router.remove(book.vector)
        book.removed = True
        self._say(f"{book.name} removed")

    # --- running -------------------------------------------------------------------------------------------------

    def run(self, **scripts: Iterator[None]) -> None:
        """Interleave ``scripts`` with the router until nothing can happen any more, then close the books."""
        self._actors += [Script(name, steps) for name, steps in scripts.items()]
        self._exploring = True
        while enabled := self._enabled():
            self._take(enabled[self.choices.choose(len(enabled))])
        self._exploring = False
        self._close_books()

    def settle(self) -> None:
        """Let the router come to rest, in one order: what a world may begin with."""
        while enabled := self._enabled():
            self._take(enabled[0])

    def point(self) -> None:
        """Others may take steps here, as many as they like: once begun, that is one preemption.

        While the executor's lock is held, only those may who do not wait for it: devices, and the loop.
        """
        first = True
        while self._may_interrupt(first) and (enabled := self._enabled(self.lock.held)):
            taken = self.choices.choose(1 + len(enabled))
            if not taken:
                return
            self._preemptions += first
            first = False
            self._take(enabled[taken - 1])

    def busy(self) -> bool:
        """Whether the lock shall look taken to one who will not wait for it."""
        busy = self._may_interrupt(first=True) and self.choices.choose(2) == 1
        self._preemptions += busy
        return busy

    def _may_interrupt(self, first: bool) -> bool:
        return self._exploring and (not first or self._preemptions < PREEMPTIONS)

    def _enabled(self, without_lock: bool = False) -> list[Actor]:
        return [actor for actor in self._actors if actor.enabled() and (actor.name in NEVER_WAIT or not without_lock)]

    def _take(self, actor: Actor) -> None:
        actor.step()
        self._check()

    def _say(self, what: str) -> None:
        self.time += 1
        self.trace.append(what)

    # --- the books -----------------------------------------------------------------------------------------------

    def read(self, cookie: Cookie) -> Message | Fault:
        """A reading of the guest's table, by whoever translates."""
        self.point()
        versions = self._versions[cookie]
        reading = Reading(self._owner[cookie], cookie, len(versions) - 1, self.time)
        number = len(self._readings)
        self._readings.append(reading)
        self._say(f"entry {cookie} is read, version {reading.version}")
        valid = versions[-1]
        self.point()
        if not valid:
            return Fault(requester=number, recorded=True)
        return Message(0xFEE00000 | number % VCPUS << 12, FIRST_VECTOR + number // VCPUS)

    def _delivered(self, apic_id: int, vector: int) -> None:
        self._say(f"delivered to APIC {apic_id}, vector {vector:#x}")
        self._outcome(self._readings[(vector - FIRST_VECTOR) * VCPUS + apic_id], "delivered")

    def _faulted(self, vector: Vector, fault: Fault) -> None:
        del vector
        self._say("fault recorded")
        self._outcome(self._readings[fault.requester], "turned into a fault")
        self.point()

    def _outcome(self, reading: Reading, how: str) -> None:
        book = reading.book
        if book.removed:
            self._broken("I5", f"an event was {how} through {book.name}, which is removed")
        if book.masked:
            self._broken("I7", f"{book.name} is masked and an event was {how}")
        book.outcomes += 1
        if book.outcomes > book.signals:
            self._broken("I3", f"one event of {book.name} was {how} twice")
        for signal in book.uncovered:
            if reading.cookie not in book.programs[signal.program :]:
                self._broken("I2", f"{book.name} had been programmed, and its event was {how} by the old message")
            if reading.version < signal.versions.get(reading.cookie, 0):
                self._broken("I2", f"an event of {book.name} was {how} by a translation read before the invalidation")
        if reading.version < book.acknowledged.get(reading.cookie, 0):
            self._broken("I2", f"an event of {book.name} was still {how} by the translation before the invalidation")
        if reading.time < book.fresh_since:
            self._broken("I7", f"{book.name} was unmasked, and its event {how} by a translation read before that")
        book.uncovered.clear()

    def check_routes(self) -> None:
        unrouted = set(self.vm.irqfds().values()) - self.vm.routes().keys()
        if unrouted:
            self._broken("I4", f"an irqfd is assigned and gsi {min(unrouted)} has no route")

    def _check(self) -> None:
        self.check_routes()
        if self.router.wakeups_while_assigned:
            self._broken("I6", "an assigned vector woke the loop")

    def _close_books(self) -> None:
        self._check()
        for book in self._books:
            if not book.uncovered or book.removed:
                continue
            if not book.masked:
                self._broken("I1", f"an event of {book.name} was neither delivered nor recorded as a fault")
            assert book.vector is not None
            if not self.executor._eventfds[book.vector.id].pending():
                self._broken("I7", f"{book.name} is masked and no longer pending")

    def _broken(self, invariant: str, what: str) -> None:
        raise InvariantBrokenError(invariant, what, self.trace)

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exploring = False
        if kind is None:  # a broken router may break more on its way out
            self.executor.close()
        self.router._watched.close()


def message_of(cookie: Cookie) -> Message:
    """The message of entry ``cookie``; what stands in it is the table's business."""
    return Message(0xFEE00000 | cookie << 5 | 1 << 4, 0)


class _PointVm:
    """The VM with a point before each call, since devices fire while the executor holds its lock, and I4 after each."""

    def __init__(self, vm: SimulatedVm, world: World) -> None:
        self._vm = vm
        self._world = world
        self.pins, self.routes_max = vm.pins, vm.routes_max
        self.adopt, self.watch_set = vm.adopt, vm.watch_set
        self.irqfds, self.routes = vm.irqfds, vm.routes

    def irqfd_assign(self, eventfd: Eventfd, gsi: int) -> None:
        self._world.point()
        self._vm.irqfd_assign(eventfd, gsi)
        self._world.check_routes()
        self._world.point()

    def irqfd_deassign(self, eventfd: Eventfd, gsi: int) -> None:
        self._world.point()
        self._vm.irqfd_deassign(eventfd, gsi)
        self._world.point()

    def set_gsi_routing(self, changes: Mapping[int, Message | None]) -> None:
        self._world.point()
        self._vm.set_gsi_routing(changes)
        self._world.check_routes()

    def signal_msi(self, message: Message) -> int:
        self._world.point()
        return self._vm.signal_msi(message)


class _Table:
    """The guest's IOMMU."""

    def __init__(self, world: World) -> None:
        self._world = world

    def cookie(self, request: Request) -> Cookie:
        return request.message.address >> 5 & 0x7FFF

    def translate(self, request: Request) -> Message | Fault:
        return self._world.read(self.cookie(request))


class PointLock:
    """The executor's lock on one thread: letting go of it is a point."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.held = False

    def acquire(self, *, blocking: bool = True) -> bool:
        if not blocking and (self.held or self._world.busy()):
            return False
        assert not self.held, "a thread that waits for itself"
        self.held = True
        return True

    def release(self) -> None:
        self.held = False
        self._world.point()

    def give_way(self) -> None:
        self.release()
        self.acquire()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.held = False
        if kind is None:
            self._world.point()


class _WritersLock:
    """The lock that table writes hold, on one thread: who would wait for it cannot be interrupting its holder."""

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        if self._held:
            raise ImpossibleError
        self._held = True

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self._held = False


class Deassign(_Deassign):
    """A deassign on one thread: who would wait for it cannot be interrupting the one who makes it."""

    def wait(self) -> None:
        if self._on_its_way.locked():
            raise ImpossibleError


class _Part:
    """A part of the router as an actor: it does not begin a step within its own."""

    name = ""

    def __init__(self, world: World) -> None:
        self.world = world
        self._busy = False

    def enabled(self) -> bool:
        return not self._busy and self.due()

    def step(self) -> None:
        self._busy = True
        self.world._say(self.name)
        try:
            self.act()
        finally:
            self._busy = False

    def due(self) -> bool:
        raise NotImplementedError

    def act(self) -> None:
        raise NotImplementedError


class _Loop(_Part):
    name = "the loop turns"

    def due(self) -> bool:
        return bool(select.select([self.world.router._watched.fileno()], [], [], 0)[0])

    def act(self) -> None:
        self.world.router._turn()


class _Settler(_Part):
    name = "the settler takes what waits"

    def due(self) -> bool:
        return bool(self.world.router._settler._waiting)

    def act(self) -> None:
        waiting = self.world.router._settler._waiting
        self.world.router._settle([waiting.popleft() for _ in range(len(waiting))])


class _Timer(_Part):
    name = "a timer runs out"

    def due(self) -> bool:
        return bool(self.world.timers)

    def act(self) -> None:
        self.world.timers.pop(0)()


class _WorkQueue(_Part):
    """Injections that KVM has put off. It copies the route, lets go of the table, and then delivers."""

    name = "KVM's work queue runs"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._host = world.kernel._host
        self._running: tuple[_Irqfd, Message | None] | None = None
        self._flush_queued = self._host.flush_work
        self._host.flush_work = self._flush_work  # type: ignore[method-assign]

    def due(self) -> bool:
        return bool(self._host.work or self._running)

    def act(self) -> None:
        with self._host.locked():
            if self._running:
                self._deliver()
            else:
                irqfd = self._host.work.popleft()
                self._running = irqfd, irqfd.kvm.routes.get(irqfd.gsi)

    def _flush_work(self, irqfd: _Irqfd) -> None:
        if self._running and self._running[0] is irqfd:
            self._deliver()
        self._flush_queued(irqfd)

    def _deliver(self) -> None:
        assert self._running is not None
        (irqfd, route), self._running = self._running, None
        if route is not None:
            irqfd.kvm.deliver(route)


class _Timers:
    """As much of an event loop as the router uses outside its turns."""

    def __init__(self, world: World) -> None:
        self._world = world

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        del delay
        self._world.timers.append(callback)

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: object) -> None:
        self._world.timers.append(lambda: callback(*arguments))
