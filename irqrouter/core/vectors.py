"""The vectors of one VM: who they are, what state they are in, what a decision about them may still do.

Pure book-keeping behind the executor's lock: states change through ``core/machine.py`` alone, generations come from
one 64-bit counter per VM that never restarts, and cookies are looked up by range. It asks nothing of a kernel.
"""

import errno
from collections.abc import Iterator

import msgspec

from irqrouter.core.cookies import CookieIndex
from irqrouter.core.machine import Event, Row, State, step
from irqrouter.core.ops import Assign, Catch, CatchFault, Generation, SetRoute, VectorId
from irqrouter.core.routes import RouteTable, replaced_at_once
from irqrouter.errors import CallerError
from irqrouter.iommu.fault import Fault
from irqrouter.scope import Cookie, Scope
from irqrouter.x86.msi import Message, Request


class VectorGoneError(CallerError):
    """The vector was removed, or belongs to another router."""


class VectorStatus(msgspec.Struct, frozen=True):
    """What is known of a vector at one moment."""

    id: VectorId
    gsi: int
    state: State
    generation: Generation
    request: Request
    cookie: Cookie
    #: The host's name for the device, where the caller gave one.
    device: str | None
    #: The route in the table the kernel last accepted; None before the first.
    route: Message | None
    invalidations: int
    #: Events taken by the loop and delivered.
    caught: int
    #: Events taken by the loop and blocked, recorded or (FPD, IG) not.
    faults: int
    #: Decisions refused because the vector had changed meanwhile.
    stale: int
    #: Counts found pending just after ``KVM_IRQFD``, which KVM had injected.
    discarded: int
    #: Why the kernel refused this generation's route or irqfd (an errno); 0 if it did not. The loop delivers meanwhile.
    assign_errno: int
    #: Microseconds from the loop's wake-up to the delivery, of the last event caught; None before the first.
    last_miss_us: float | None


class Vector:
    """One interrupt source of one VM. The handle that ``Router.add`` returns; read its attributes, change none."""

    __slots__ = (
        "accepted_generation",
        "assign_errno",
        "born",
        "caught",
        "cookie",
        "deferred",
        "device",
        "discarded",
        "faults",
        "generation",
        "gsi",
        "id",
        "invalidations",
        "last_miss_us",
        "lost_races",
        "request",
        "routed_generation",
        "stale",
        "state",
    )

    def __init__(self, number: VectorId, gsi: int, request: Request, cookie: Cookie, device: str | None) -> None:
        self.id = number
        self.gsi = gsi
        self.device = device
        self.request = request
        self.cookie = cookie
        self.state = State.DEASSIGNED
        self.generation: Generation = 0
        self.born: Generation = 0
        # The generation of the last SetRoute, and that of the route the kernel has accepted: what Assign may go by
        # (I4).
        self.routed_generation: Generation = 0
        self.accepted_generation: Generation = 0
        self.assign_errno = 0
        # Decisions refused in a row: at a few of these the next invalidation delivers the event itself.
        self.lost_races = 0
        self.invalidations = 0
        self.caught = 0
        self.faults = 0
        self.stale = 0
        self.discarded = 0
        # Whether the last KVM_IRQFD found an event pending: KVM injects that from its work queue, at any time.
        self.deferred = False
        self.last_miss_us: float | None = None

    def __repr__(self) -> str:
        return f"<vector {self.id}: gsi {self.gsi}, {self.state.value}, cookie {self.cookie:#x}>"


class Vectors:
    """Every vector of one VM, with its routes and cookies."""

    def __init__(self, routes: RouteTable) -> None:
        self.routes = routes
        self._vectors: dict[VectorId, Vector] = {}
        self._by_gsi: dict[int, Vector] = {}
        self._cookies = CookieIndex()
        self._last_id: VectorId = 0
        self._last_generation: Generation = 0

    def __iter__(self) -> Iterator[Vector]:
        return iter(self._vectors.values())

    def add(self, request: Request, cookie: Cookie, device: str | None, *, masked: bool) -> Vector:
        """Make a vector, with a GSI of its own and an id that is never given again."""
        vector = Vector(self._last_id + 1, self.routes.allocate(), request, cookie, device)
        self._last_id = vector.id
        vector.generation = vector.born = self._renew()
        if masked:
            vector.state = State.MASKED
        self._vectors[vector.id] = vector
        self._by_gsi[vector.gsi] = vector
        self._cookies.add(cookie, vector.id)
        return vector

    def known(self, vector: Vector) -> Vector:
        """Return ``vector`` if it is one of these; raise :class:`VectorGoneError` otherwise."""
        if self._vectors.get(vector.id) is not vector or vector.state is State.REMOVED:
            raise VectorGoneError(f"vector {vector.id}", "was removed, or belongs to another router")
        return vector

    def find(self, vector: VectorId) -> Vector | None:
        """The vector of that id, if it has not been removed."""
        return self._vectors.get(vector)

    def routed_at(self, gsi: int) -> Vector | None:
        """The vector whose GSI this is."""
        return self._by_gsi.get(gsi)

    def matching(self, scope: Scope) -> list[Vector]:
        """The vectors an invalidation of ``scope`` touches."""
        return [self._vectors[vector] for vector in self._cookies.matching(scope)]

    def count(self, scope: Scope) -> int:
        """How many vectors an invalidation of ``scope`` touches."""
        return self._cookies.count(scope)

    def happen(self, vector: Vector, event: Event) -> Row:
        """Move ``vector`` through the table. The caller carries out what the returned row demands, at once.

        Raises :class:`~irqrouter.core.machine.IllegalTransitionError` and changes nothing where the table has no row.
        """
        row = step(vector.state, event)
        vector.state = row.state
        if row.renews:
            vector.generation = self._renew()
            vector.assign_errno = 0
        return row

    def program(self, vector: Vector, request: Request, cookie: Cookie) -> None:
        """Give ``vector`` another message. The cookie changes with it, at once: an invalidation may be next."""
        self._cookies.discard(vector.cookie, vector.id)
        vector.request = request
        vector.cookie = cookie
        self._cookies.add(cookie, vector.id)

    def forget(self, vector: Vector, *, bound: bool) -> None:
        """Drop a removed vector and give its GSI back; but not if its irqfd is ``bound`` to that still (I5)."""
        del self._vectors[vector.id]
        del self._by_gsi[vector.gsi]
        self._cookies.discard(vector.cookie, vector.id)
        if not bound:
            self.routes.free(vector.gsi)

    def refusal(self, vector: Vector | None, op: SetRoute | Catch | CatchFault | Assign) -> int:
        """Why ``op`` may not be carried out now, as an errno; 0 when it may.

        ``ESTALE``: the vector changed since the decision. ``EALREADY``: it is assigned, the kernel delivers.
        ``ENXIO`` (Assign): the kernel has not accepted this generation's route.
        """
        if vector is None or op.generation != vector.generation or vector.state is State.MASKED:
            return errno.ESTALE
        if isinstance(op, SetRoute):
            return 0
        if vector.state is not State.DEASSIGNED:
            return errno.EALREADY
        if isinstance(op, Assign) and vector.accepted_generation != op.generation:
            return errno.ENXIO
        return 0

    def may_stay(self, vector: Vector, since: Generation, before: Message | None) -> bool:
        """Whether ``vector`` may stay assigned when an invalidation ends, once KVM has accepted the route it wants.

        The invalidation gave it the generation ``since``, and found KVM going by ``before`` (None: that is not known).
        """
        after = self.routes.wanted(vector.gsi)
        if vector.routed_generation < since or before is None or after is None:
            return False
        return before == after or (not vector.deferred and replaced_at_once(before, after))

    def status(self, vector: Vector) -> VectorStatus:
        """A snapshot for people and machines."""
        return VectorStatus(
            id=vector.id,
            gsi=vector.gsi,
            state=vector.state,
            generation=vector.generation,
            request=vector.request,
            cookie=vector.cookie,
            device=vector.device,
            route=self.routes.accepted(vector.gsi),
            invalidations=vector.invalidations,
            caught=vector.caught,
            faults=vector.faults,
            stale=vector.stale,
            discarded=vector.discarded,
            assign_errno=vector.assign_errno,
            last_miss_us=vector.last_miss_us,
        )

    def _renew(self) -> Generation:
        self._last_generation += 1
        return self._last_generation


def decide(vector: VectorId, generation: Generation, outcome: Message | Fault) -> Catch | CatchFault:
    """What to do at once about an event on a deassigned vector, given what its request translates to.

    ``generation`` is the vector's, sampled before the first byte of the guest's tables was read.
    """
    if isinstance(outcome, Fault):
        return CatchFault(vector, generation, outcome)
    return Catch(vector, generation, outcome)


def route(catch: Catch) -> SetRoute:
    """What follows a catch: the route, so that the vector can be assigned at its next event.

    It comes after the catch so that the first interrupt never waits for a table write.
    """
    return SetRoute(catch.vector, catch.generation, catch.delivery)
