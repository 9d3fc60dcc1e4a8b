"""Operations: what the core decides and an executor carries out, in order, with one errno each.

They name a vector and a generation, never a bare GSI: a number that was reused can then never reach its former owner.
An operation that fails skips the rest of that vector's operations in the batch, not the others'.
"""

from typing import TypeAlias

import msgspec

from irqrouter.iommu.fault import Fault
from irqrouter.x86.msi import Message

VectorId: TypeAlias = int
Generation: TypeAlias = int


class Deassign(msgspec.Struct, frozen=True):
    """Unbind the irqfd. Complete when the ioctl returns: KVM injects nothing more for it after that."""

    vector: VectorId

    def describe(self) -> str:
        """One line for people."""
        return f"deassign vector {self.vector}"


class SetRoute(msgspec.Struct, frozen=True):
    """Edit the vector's entry in the executor's copy of the routing table."""

    vector: VectorId
    generation: Generation
    route: Message

    def describe(self) -> str:
        """One line for people."""
        return f"route vector {self.vector} to {self.route.describe()} (generation {self.generation})"


class DropRoute(msgspec.Struct, frozen=True):
    """Remove the vector's entry from the executor's copy of the routing table."""

    vector: VectorId

    def describe(self) -> str:
        """One line for people."""
        return f"drop the route of vector {self.vector}"


class Catch(msgspec.Struct, frozen=True):
    """Take the pending event and deliver it, in one hold of the lock.

    Taking and delivering are one operation on purpose: between two, an invalidation or a ``kill -9`` loses the event.
    Nothing pending is ``EAGAIN``. If the delivery fails the count is written back.
    """

    vector: VectorId
    generation: Generation
    delivery: Message

    def describe(self) -> str:
        """One line for people."""
        return f"catch vector {self.vector}, deliver {self.delivery.describe()} (generation {self.generation})"


class CatchFault(msgspec.Struct, frozen=True):
    """Record the fault where the VMM keeps it, then take the pending event, in one hold of the lock."""

    vector: VectorId
    generation: Generation
    record: Fault

    def describe(self) -> str:
        """One line for people."""
        return f"catch vector {self.vector} as a fault: {self.record.describe()} (generation {self.generation})"


class Assign(msgspec.Struct, frozen=True):
    """Bind the irqfd, then read and discard what was pending: KVM has injected that.

    With ``delivering`` only if an event is pending (``EAGAIN`` otherwise), which KVM thereby delivers. On an eventfd
    that devices are signalling this is the only safe way: KVM looks at the count without its lock
    (fs/eventfd.c:eventfd_poll), can see one that its new waiter is just taking, and injects that event twice. If an
    event is pending there are never fewer events than injections.
    """

    vector: VectorId
    generation: Generation
    delivering: bool = False

    def describe(self) -> str:
        """One line for people."""
        how = ", delivering what is pending" if self.delivering else ""
        return f"assign vector {self.vector}{how} (generation {self.generation})"


Op: TypeAlias = Deassign | SetRoute | DropRoute | Catch | CatchFault | Assign
