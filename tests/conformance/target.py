"""What the suite asks of an implementation, and how it looks at the system calls that it makes.

A :class:`Target` is one VM whose vCPUs do not run, so that what arrives stays in their IRRs, and an implementation that
routes its interrupts. Its *verbs* are what the VMM's threads say; :meth:`Target.run` is what the deciding side says.
Operations are the wire's on every target. A decision names a vector by its number.
"""

import contextlib
import enum
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from irqrouter.errors import KernelError
from irqrouter.kvm.port import Eventfd, Vm, WatchSet
from irqrouter.kvm.simulated import SimulatedVm
from irqrouter.kvm.vm import KvmVm
from irqrouter.scope import Cookie, Scope
from irqrouter.service.wire import Operation, Record, SlotState
from irqrouter.x86.msi import Message
from tests.kvm.conftest import Bench, Delivered

#: The requester id of every device here.
REQUESTER = 0x18


class V(NamedTuple):
    """A vector: its number, the VMM's descriptor of its eventfd, and the implementation's handle."""

    number: int
    fd: int
    handle: object


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What an implementation says about a vector."""

    number: int
    generation: int
    state: SlotState
    gsi: int
    message: Message
    requester: int
    cookie: Cookie
    refused: int
    invalidations: int
    caught: int
    faults: int
    stale: int
    discarded: int


class Recorded(NamedTuple):
    """A fault as it was handed to the VMM, with the eventfd's count at that moment."""

    number: int
    record: Record
    pending: int


class Call(enum.IntEnum):
    """The system calls that an implementation makes on the VM."""

    ASSIGN = 0
    DEASSIGN = 1
    ROUTING = 2
    MSI = 3


class Hooks:
    """Counts the calls, refuses those it is told to, and does something before those it is told to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Call] = Counter()
        self._refusals: dict[Call, deque[int]] = {call: deque() for call in Call}
        self._actions: dict[Call, deque[Callable[[], None]]] = {call: deque() for call in Call}

    def calls(self, call: Call) -> int:
        """How often ``call`` was made, refused ones included."""
        with self._lock:
            return self._counts[call]

    def refuse(self, call: Call, *errnos: int) -> None:
        """The next calls fail with these errnos, having done nothing."""
        with self._lock:
            self._refusals[call].extend(errnos)

    def before(self, call: Call, action: Callable[[], None]) -> None:
        """Do ``action`` just before the next ``call``, on its thread."""
        with self._lock:
            self._actions[call].append(action)

    def enter(self, call: Call) -> int:
        """The implementation makes ``call``: the errno that it must fail with, or 0."""
        with self._lock:
            self._counts[call] += 1
            action = self._actions[call].popleft() if self._actions[call] else None
            code = self._refusals[call].popleft() if self._refusals[call] else 0
        if action is not None:
            action()
        return code


class HookedVm:
    """A VM whose calls go through :class:`Hooks` first."""

    def __init__(self, vm: Vm, hooks: Hooks) -> None:
        self._vm = vm
        self._hooks = hooks

    @property
    def pins(self) -> int:
        return self._vm.pins

    @property
    def routes_max(self) -> int:
        return self._vm.routes_max

    def adopt(self, fd: int) -> Eventfd:
        return self._vm.adopt(fd)

    def watch_set(self) -> WatchSet:
        return self._vm.watch_set()

    def irqfd_assign(self, eventfd: Eventfd, gsi: int) -> None:
        self._enter(Call.ASSIGN)
        self._vm.irqfd_assign(eventfd, gsi)

    def irqfd_deassign(self, eventfd: Eventfd, gsi: int) -> None:
        self._enter(Call.DEASSIGN)
        self._vm.irqfd_deassign(eventfd, gsi)

    def set_gsi_routing(self, changes: Mapping[int, Message | None]) -> None:
        self._enter(Call.ROUTING)
        self._vm.set_gsi_routing(changes)

    def signal_msi(self, message: Message) -> int:
        self._enter(Call.MSI)
        return self._vm.signal_msi(message)

    def _enter(self, call: Call) -> None:
        code = self._hooks.enter(call)
        if code:
            raise KernelError(code, call.name, "told to")


class Target(Protocol):
    """An implementation and its VM."""

    @property
    def bench(self) -> Bench:
        """The host: eventfds, who signals them, and the neighbour's VM."""
        ...

    @property
    def hooks(self) -> Hooks: ...

    @property
    def faults(self) -> list[Recorded]:
        """The faults handed to the VMM."""
        ...

    # --- the VMM's threads ---

    def add(self, fd: int, message: Message, *, masked: bool = False) -> V:
        """Make a vector, of which the deciding side says nothing yet: deassigned or masked."""
        ...

    def invalidate(self, scope: Scope) -> int: ...

    def mask(self, v: V) -> None: ...

    def unmask(self, v: V) -> None: ...

    def program(self, v: V, message: Message) -> None: ...

    def remove(self, *vectors: V) -> None: ...

    def set_foreign_routes(self, routes: Mapping[int, Message]) -> None: ...

    def vectors(self) -> list[Seen]: ...

    # --- the deciding side ---

    def run(self, operations: Sequence[Operation]) -> list[int]:
        """Carry out one batch: an errno for each operation."""
        ...

    def unwatched(self) -> contextlib.AbstractContextManager[None]:
        """Within the block verbs on other threads are nobody's business: what is compared after each is not."""
        ...

    def close(self) -> None: ...


def seen(target: Target, v: V) -> Seen:
    """What the implementation says about ``v``."""
    (found,) = [each for each in target.vectors() if each.number == v.number]
    return found


def delivered(target: Target) -> Delivered:
    """What has arrived at the vCPUs since the last call, when the kernel's deferred work is done: (APIC id, vector)."""
    target.bench.settle()
    return target.bench.guest.delivered()


def once(what: Callable[[], object]) -> None:
    """Wait for something that no descriptor tells of."""
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline, "it has not come for 20 s"
        os.sched_yield()


def raise_line(target: Target, gsi: int) -> None:
    """Have KVM deliver whatever the routing table says for ``gsi``."""
    vm = target.bench.guest.vm
    if isinstance(vm, SimulatedVm):
        route = vm.routes().get(gsi)
        if route is not None:
            vm.signal_msi(route)
    else:
        assert isinstance(vm, KvmVm)
        vm.irq_line(gsi, 1)
        vm.irq_line(gsi, 0)


class Background:
    """A verb on another thread, as a vCPU's; leaving the block waits for it and raises what it raised."""

    def __init__(self, verb: Callable[[], object]) -> None:
        self._verb = verb
        self._failure: BaseException | None = None
        self.result: object = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.result = self._verb()
        except BaseException as error:  # noqa: BLE001 - raised by join
            self._failure = error

    def start(self) -> None:
        """Begin; :meth:`join` must follow."""
        self._thread.start()

    def done(self) -> bool:
        """Whether it has returned."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for it."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "still running"
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "Background":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.join()


@contextlib.contextmanager
def holding(target: Target, call: Call, verb: Callable[[], object]) -> Generator[Background]:
    """Within the block ``verb``, on another thread, is just before making ``call``; after it, it has returned."""
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert release.wait(20)

    target.hooks.before(call, hold)
    with Background(verb) as running:
        try:
            assert entered.wait(20), f"{call.name} was not made"
            yield running
        finally:
            release.set()
