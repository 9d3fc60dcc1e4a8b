"""What the service tells about itself: VMs, vectors, and what happens to them."""

import asyncio
import collections
import enum
import time
from collections.abc import Generator
from contextlib import contextmanager

import msgspec

from irqrouter.x86.msi import Message


class VmStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One attached VM at one moment."""

    name: str
    #: Of the VMM's process, as the kernel told when it connected (``SO_PEERCRED``).
    pid: int
    uid: int
    #: Seconds since it attached.
    attached_s: float
    remapper: str
    features: list[str]
    vectors: int
    assigned: int
    deassigned: int
    masked: int
    #: Of the deassigned ones, those for which a decision stands (``PREPARE``).
    prepared: int
    regions: int
    #: Descriptors that the service holds for it.
    descriptors: int
    #: Frames received, and bytes in them.
    frames: int
    bytes: int
    #: Operations sent, and how many the agent answered with ``ESTALE``.
    operations: int
    stale: int
    #: Faults sent to be recorded.
    faults: int
    #: How often its doorbell woke the service, and how often an eventfd did.
    doorbells: int
    wakeups: int


class VectorReport(msgspec.Struct, frozen=True, kw_only=True):
    """One vector of a VM at one moment. Counters are the agent's, modulo 2^32."""

    vm: str
    vector: int
    gsi: int
    state: str
    prepared: bool
    generation: int
    requester: int
    message: Message
    cookie: int
    #: What it was last translated to for the agent; None before the first time.
    route: Message | None
    invalidations: int
    caught: int
    faults: int
    stale: int
    discarded: int
    #: The errno with which KVM refused route, delivery or irqfd of this generation; 0 if it did not.
    refused: int
    #: Of the last event that a prepared vector caught, from waking to delivery; None before.
    last_catch_us: float | None


class What(enum.Enum):
    """What can happen."""

    ATTACHED = "attached"
    DETACHED = "detached"
    REFUSED = "refused"
    ADDED = "added"
    REMOVED = "removed"
    #: The generation rose: an invalidation, a mask, an unmask, a new message.
    RENEWED = "renewed"
    #: The eventfd of a vector woke the service.
    FIRED = "fired"
    PREPARED = "prepared"
    CAUGHT = "caught"
    FAULTED = "faulted"
    ASSIGNED = "assigned"
    #: An operation was answered with ``ESTALE``.
    STALE = "stale"


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a VM or to one of its vectors. ``time_ns`` is ``CLOCK_MONOTONIC``'s."""

    time_ns: int
    vm: str
    what: What
    vector: int | None = None
    generation: int | None = None
    detail: str = ""


class Happenings:
    """Tells subscribers what happens. With none it costs a test of an empty set.

    A subscriber that does not keep up loses the oldest, and is told how many: nobody waits for it.
    """

    KEPT = 4096

    def __init__(self) -> None:
        self._subscribers: set[Subscription] = set()
        self._wanted = asyncio.Event()

    async def wanted(self) -> None:
        """Wait until somebody listens."""
        await self._wanted.wait()

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return bool(self._subscribers)

    def tell(
        self, vm: str, what: What, vector: int | None = None, generation: int | None = None, detail: str = ""
    ) -> None:
        """Something happened just now."""
        if self._subscribers:
            happening = Happening(
                time_ns=time.monotonic_ns(), vm=vm, what=what, vector=vector, generation=generation, detail=detail
            )
            for subscriber in self._subscribers:
                subscriber.put(happening)

    @contextmanager
    def subscribed(self) -> "Generator[Subscription]":
        """Listen, within the ``with`` block."""
        subscription = Subscription(self.KEPT)
        self._subscribers.add(subscription)
        self._wanted.set()
        try:
            yield subscription
        finally:
            self._subscribers.discard(subscription)
            if not self._subscribers:
                self._wanted.clear()


class Subscription:
    """What happened and was not taken yet."""

    def __init__(self, kept: int) -> None:
        self._most = kept
        self._kept: collections.deque[Happening] = collections.deque()
        self._news = asyncio.Event()
        self._ended = False
        #: How many were lost because they were not taken in time.
        self.lost = 0

    def put(self, happening: Happening) -> None:
        """Keep ``happening``, at the cost of the oldest if need be."""
        if len(self._kept) == self._most:
            self._kept.popleft()
            self.lost += 1
        self._kept.append(happening)
        self._news.set()

    def end(self) -> None:
        """Whoever waits for more, or will, waits no longer."""
        self._ended = True
        self._news.set()

    async def get(self) -> Happening:
        """The oldest that was not taken yet."""
        while not self._kept:
            self._news.clear()
            await self._news.wait()
        return self._kept.popleft()

    async def take(self, most: int) -> list[Happening]:
        """At most so many of the oldest that were not taken yet; none only after :meth:`end`."""
        while not (self._kept or self._ended):
            self._news.clear()
            await self._news.wait()
        return [] if self._ended else [self._kept.popleft() for _ in range(min(most, len(self._kept)))]
