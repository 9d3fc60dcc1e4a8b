"""The kernel as irqrouter uses it: what an executor and the loop may ask of a kernel.

Two kernels implement this: the real one (``kvm/vm.py``, ``kvm/eventfd.py``) and the simulated one
(``kvm/simulated.py``). One contract suite (``tests/kvm/test_kernel_contract.py``) runs against both. All failures are
:class:`~irqrouter.errors.KernelError` with the errno the kernel gave, except where said.
"""

from collections.abc import Mapping
from typing import Protocol

from irqrouter.errors import CallerError
from irqrouter.x86.msi import Message


class NotAnEventfdError(CallerError):
    """The descriptor is closed or is something else than an eventfd."""


class SemaphoreEventfdError(CallerError):
    """The eventfd was made with ``EFD_SEMAPHORE``: KVM would take one count of many and leave phantom events."""


class BlockingEventfdError(CallerError):
    """The eventfd lacks ``EFD_NONBLOCK``: KVM may take the count between a wakeup and our read, which would hang."""


class Eventfd(Protocol):
    """An eventfd that irqrouter owns: its own duplicate of the descriptor it was given."""

    @property
    def identity(self) -> int:
        """The kernel's id of the eventfd itself: equal for two descriptors of one eventfd."""
        ...

    def fileno(self) -> int:
        """The descriptor number of our duplicate; a :class:`WatchSet` reports it."""
        ...

    def pending(self) -> bool:
        """Whether the count is above zero, without taking it."""
        ...

    def read(self) -> int:
        """Take and return the whole count; 0 when it was empty. Never blocks."""
        ...

    def write(self, count: int) -> None:
        """Add ``count``: signal the eventfd."""
        ...

    def close(self) -> None:
        """Leave any watch set, then close the duplicate. Idempotent."""
        ...


class WatchSet(Protocol):
    """Eventfds watched for readability, each reported once and then disarmed (``EPOLLONESHOT``)."""

    def fileno(self) -> int:
        """A descriptor that is readable while the set has something to report."""
        ...

    def arm(self, eventfd: Eventfd) -> None:
        """Watch ``eventfd`` (again); it is polled at once, so a pending count is reported.

        From any thread. One that was closed meanwhile is left alone: whoever removes a vector waits for nobody.
        """
        ...

    def harvest(self, limit: int) -> list[int]:
        """The descriptor numbers that became readable, at most ``limit``, each disarmed by being returned."""
        ...

    def close(self) -> None:
        """Close the set itself. The eventfds stay."""
        ...


class Vm(Protocol):
    """The VM-wide calls an executor makes. Thread-safe, as the ioctls are; callers order them."""

    @property
    def pins(self) -> int:
        """GSIs below this belong to I/OAPIC pins (``KVM_CAP_SPLIT_IRQCHIP``'s argument)."""
        ...

    @property
    def routes_max(self) -> int:
        """How many routes, and GSIs, the VM can have (``KVM_CAP_IRQ_ROUTING``: 4096)."""
        ...

    def adopt(self, fd: int) -> Eventfd:
        """Duplicate ``fd`` and own the duplicate.

        Raises :class:`NotAnEventfdError`, :class:`SemaphoreEventfdError` or :class:`BlockingEventfdError`; nothing is
        left open then.
        """
        ...

    def watch_set(self) -> WatchSet:
        """A new, empty watch set."""
        ...

    def irqfd_assign(self, eventfd: Eventfd, gsi: int) -> None:
        """``KVM_IRQFD``. A pending count is injected but not drained (virt/kvm/eventfd.c:kvm_irqfd_assign)."""
        ...

    def irqfd_deassign(self, eventfd: Eventfd, gsi: int) -> None:
        """``KVM_IRQFD`` with ``KVM_IRQFD_FLAG_DEASSIGN``.

        When it returns nothing more is injected for that pair (irqfd_shutdown, flush_workqueue). Succeeds when
        nothing matched.
        """
        ...

    def set_gsi_routing(self, changes: Mapping[int, Message | None]) -> None:
        """``KVM_SET_GSI_ROUTING``: the whole table as last accepted, with ``changes`` (None drops a GSI).

        Atomic: on an error the kernel, and the table remembered here, are as before.
        """
        ...

    def signal_msi(self, message: Message) -> int:
        """``KVM_SIGNAL_MSI``: deliver now. Returns how many vCPUs took it; 0 is not an error."""
        ...
