"""The routing table: the whole truth of one VM's GSIs, and what of it the kernel has accepted.

``KVM_SET_GSI_ROUTING`` replaces the whole table (virt/kvm/irqchip.c:kvm_set_irq_routing), so exactly one party may
write it. This is that party's book-keeping; it writes nothing itself.
"""

import heapq
from collections.abc import Mapping, Set

from irqrouter.errors import CallerError
from irqrouter.x86.msi import Message, checked


class GsiExhaustedError(CallerError):
    """Every GSI the VM can have is in use."""


class RouteTable:
    """Routes wanted, routes accepted, and the difference. GSIs from ``first`` to below ``limit`` are ours to give."""

    def __init__(self, first: int, limit: int) -> None:
        self._limit = limit
        self._free = list(range(first, limit))  # a heap: the lowest first, so that the table stays dense
        self._given: set[int] = set()
        self._foreign: set[int] = set()
        self._wanted: dict[int, Message] = {}
        self._accepted: dict[int, Message] = {}
        self._changed: set[int] = set()
        self._in_doubt: Set[int] = set()

    def allocate(self) -> int:
        """Give out the lowest free GSI; raise :class:`GsiExhaustedError` when there is none."""
        taken: list[int] = []
        try:
            while self._free:
                gsi = heapq.heappop(self._free)
                # A route that KVM still has may be refused its end, and is then somebody's as before.
                if gsi not in self._foreign and gsi not in self._accepted:
                    self._given.add(gsi)
                    return gsi
                taken.append(gsi)
        finally:
            for gsi in taken:  # they may become ours again
                heapq.heappush(self._free, gsi)
        raise GsiExhaustedError("the VM's GSIs", f"all {self._limit} are in use")

    def free(self, gsi: int) -> None:
        """Take a GSI back. Its route must have been dropped."""
        self._given.remove(gsi)
        heapq.heappush(self._free, gsi)

    def set(self, gsi: int, route: Message) -> bool:
        """Want ``route`` for ``gsi``. True when the kernel has it already: no write is needed for it."""
        self._wanted[gsi] = route
        return self._compare(gsi)

    def drop(self, gsi: int) -> None:
        """Want no route for ``gsi``."""
        self._wanted.pop(gsi, None)
        self._compare(gsi)

    def set_foreign(self, routes: Mapping[int, Message]) -> None:
        """Replace the VMM's own routes. A GSI that is ours raises ``CallerError``, and nothing changes."""
        for gsi, route in routes.items():
            checked(route)
            if not 0 <= gsi < self._limit:
                raise CallerError(f"gsi {gsi}", f"must be below {self._limit}")
            if gsi in self._given:
                raise CallerError(f"gsi {gsi}", "belongs to a vector of the router")
        for gsi in self._foreign - routes.keys():
            self.drop(gsi)
        for gsi, route in routes.items():
            self.set(gsi, route)
        self._foreign = set(routes)

    def foreign(self) -> dict[int, Message]:
        """The VMM's own routes, as wanted."""
        return {gsi: self._wanted[gsi] for gsi in self._foreign}

    def changes(self) -> dict[int, Message | None]:
        """What is wanted otherwise than the kernel last accepted it, or may have it; None where a route goes."""
        return {gsi: self._wanted.get(gsi) for gsi in self._changed}

    def begin_write(self) -> dict[int, Message | None]:
        """The changes, to be written now.

        Ends with :meth:`accept` or :meth:`refuse`; one write at a time. Until then nothing is known of what the kernel
        has for these GSIs.
        """
        changes = self.changes()
        self._in_doubt = changes.keys()
        return changes

    def has(self, gsi: int) -> bool:
        """Whether the kernel has what is wanted for ``gsi``."""
        return gsi not in self._changed

    def wanted(self, gsi: int) -> Message | None:
        """The route that ``gsi`` is to have."""
        return self._wanted.get(gsi)

    def accepted(self, gsi: int) -> Message | None:
        """The route of ``gsi`` in the table the kernel last accepted."""
        return self._accepted.get(gsi)

    def certain(self, gsi: int) -> Message | None:
        """The route that KVM goes by; None where there is none, or another is wanted and may be on its way."""
        return self._accepted.get(gsi) if self.has(gsi) else None

    def accept(self, changes: Mapping[int, Message | None]) -> None:
        """The kernel took the table with ``changes`` in it. What was wanted since then is a change still."""
        self._in_doubt = set()
        for gsi, route in changes.items():
            if route is None:
                self._accepted.pop(gsi, None)
            else:
                self._accepted[gsi] = route
            self._compare(gsi)

    def refuse(self, changes: Mapping[int, Message | None]) -> list[int]:
        """The kernel refused the table: forget those ``changes`` that set a route, and return their GSIs.

        Drops stay wanted. Keeping a refused route would make it fail every later write, whoever's it was.
        """
        self._in_doubt = set()
        refused = [gsi for gsi, route in changes.items() if route is not None and self._wanted.get(gsi) == route]
        for gsi in refused:
            old = self._accepted.get(gsi)
            if old is None:
                del self._wanted[gsi]
            else:
                self._wanted[gsi] = old
        for gsi in changes:
            self._compare(gsi)
        self._foreign &= self._wanted.keys()
        return refused

    def _compare(self, gsi: int) -> bool:
        if gsi not in self._in_doubt and self._wanted.get(gsi) == self._accepted.get(gsi):
            self._changed.discard(gsi)
            return True
        self._changed.add(gsi)
        return False


def replaced_at_once(before: Message, after: Message) -> bool:
    """Whether KVM delivers nothing more by ``before`` once it has accepted a table with ``after`` in its place.

    An injection on the signaller's thread holds kvm->irq_srcu throughout, and a table write waits for that
    (arch/x86/kvm/irq.c:kvm_arch_set_irq_inatomic). One that KVM puts off to its work queue copies the route, lets go of
    irq_srcu, and then delivers (virt/kvm/irqchip.c:kvm_set_irq); nothing but a deassign waits for it. KVM puts off what
    has not exactly one destination, as far as can be told without its map of the guest's local APICs.
    """
    return _one_destination(before) and _one_destination(after)


def _one_destination(route: Message) -> bool:
    """Whether ``route`` is physical (address bit 2) and no broadcast: FFh in bits 19:12, also of x2APIC's FFFFFFFFh."""
    return not route.address & 1 << 2 and route.address >> 12 & 0xFF != 0xFF
