"""Interrupt remapping, as the event loop sees it.

A device's MSI does not say where the interrupt goes: it names an entry of a table in guest memory, and the
guest's IOMMU looks it up at every interrupt. irqrouter looks it up when an interrupt fires that is not bound
to the guest by an irqfd, and then binds it. So it asks a remapper for three things:

- **translate** a request: read the guest's tables now, and give back the message to deliver, or the fault
  that keeps it from being delivered;
- the request's **cookie**: what an invalidation has to name to make its translation stale;
- the **scope** of a guest's command: the cookies it makes stale. Those vectors lose their irqfds before the
  guest sees its command completed.

A guest moves an interrupt by writing the table entry and then invalidating it; the MSI itself never changes.
The invalidation is therefore all that irqrouter hears, and it must never be lost.

Two units exist, as the guest sees them: :class:`VtdRemapper` (Intel VT-d) and :class:`AmdviRemapper`
(AMD-Vi). :class:`NoRemapping` is a guest without one. What the bits say is in :mod:`irqrouter.iommu`.
"""

import threading
from typing import Protocol

import msgspec

from irqrouter.iommu import amdvi, vtd
from irqrouter.iommu.amdvi import AmdviFault, device
from irqrouter.iommu.fault import Fault, unremapped
from irqrouter.iommu.vtd import VtdFault, entries, entry
from irqrouter.memory import GuestMemory
from irqrouter.scope import EVERYTHING, UNINDEXED, Cookie, Scope
from irqrouter.x86.msi import Message, Request, checked_requester

__all__ = [
    "EVERYTHING",
    "UNINDEXED",
    "AmdviFault",
    "AmdviRemapper",
    "Cookie",
    "Fault",
    "NoRemapping",
    "Remapper",
    "Scope",
    "VtdFault",
    "VtdRemapper",
    "device",
    "entries",
    "entry",
]


class Remapper(Protocol):
    """A guest's IOMMU, as far as interrupts go. Every method may be called from any thread."""

    def cookie(self, request: Request) -> Cookie:
        """What an invalidation names to make this translation stale. Depends on the request alone.

        Raises :class:`~irqrouter.errors.SpecError` for a requester id that no device can have.
        """
        ...

    def translate(self, request: Request) -> Message | Fault:
        """Read the guest's tables now: the message to deliver, or why there is none.

        Whatever the guest wrote is answered, never raised.
        """
        ...


class NoRemapping:
    """A guest without interrupt remapping: messages pass unchanged."""

    def cookie(self, request: Request) -> Cookie:
        """:data:`UNINDEXED`."""
        checked_requester(request.requester)
        return UNINDEXED

    def translate(self, request: Request) -> Message | Fault:
        """The request's own message, if it is an interrupt."""
        return unremapped(request)


class VtdRemapper:
    """One VT-d unit: its registers, and its interrupt remapping table in guest ``memory``.

    The register methods are what a VMM calls when the guest writes GCMD; they return the scope to invalidate
    before the guest may see the change in GSTS. ``host_address_width`` is the one the DMAR table tells the
    guest.
    """

    def __init__(self, memory: GuestMemory, *, host_address_width: int = 52) -> None:
        self._read = memory.read
        self._host_address_width = host_address_width
        # translate() takes this value once; the lock only keeps two register writes from losing one another.
        self._registers = vtd.Registers()
        self._writing = threading.Lock()

    def cookie(self, request: Request) -> Cookie:
        """The IRTE's index; :data:`UNINDEXED` for a compatibility-format request or an index above FFFFh."""
        checked_requester(request.requester)
        return vtd.cookie(request.message)

    def translate(self, request: Request) -> Message | Fault:
        """See :meth:`Remapper.translate`."""
        return vtd.remap(self._registers, request, self._read)

    def set_interrupt_remap_table(self, irta: int) -> Scope:
        """GCMD.SIRTP: latch the value of IRTA (table address, size and EIME)."""
        with self._writing:
            self._registers = vtd.latch(self._registers, irta, self._host_address_width)
        return EVERYTHING

    def set_remapping(self, enabled: bool) -> Scope:
        """GCMD.IRE."""
        with self._writing:
            self._registers = msgspec.structs.replace(self._registers, ires=enabled)
        return EVERYTHING

    def set_compatibility_format(self, allowed: bool) -> Scope:
        """GCMD.CFI: whether compatibility-format requests pass unchanged (with EIME they never do)."""
        with self._writing:
            self._registers = msgspec.structs.replace(self._registers, cfis=allowed)
        return EVERYTHING

    def descriptor(self, low: int, high: int) -> Scope | None:
        """What a descriptor of the invalidation queue makes stale; None where it is not about interrupts.

        Raises :class:`~irqrouter.errors.SpecError` for reserved bits set (hardware: FSTS.IQE).
        """
        return vtd.invalidation_scope(low, high)


class AmdviRemapper:
    """One AMD-Vi unit: its registers, and its device and interrupt remapping tables in guest ``memory``.

    The register methods are what a VMM calls when the guest writes those registers; they return the scope to
    invalidate before the write is done for the guest. IRTCacheDis must not be offered: a guest that may set it sends no
    invalidations.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._read = memory.read
        # As in VtdRemapper.
        self._registers = amdvi.Registers()
        self._writing = threading.Lock()

    def cookie(self, request: Request) -> Cookie:
        """The requester id: AMD-Vi invalidates the table of a whole device."""
        return checked_requester(request.requester)

    def translate(self, request: Request) -> Message | Fault:
        """See :meth:`Remapper.translate`."""
        return amdvi.remap(self._registers, request, self._read)

    def set_control(self, value: int) -> Scope:
        """A write to the Control register (18h)."""
        with self._writing:
            self._registers = amdvi.with_control(self._registers, value)
        return EVERYTHING

    def set_device_table(self, value: int) -> Scope:
        """A write to the Device Table Base Address register (0)."""
        with self._writing:
            self._registers = amdvi.with_device_table(self._registers, value)
        return EVERYTHING

    def command(self, low: int, high: int) -> Scope | None:
        """What a command of the command buffer makes stale; None where it is not about interrupts.

        Raises :class:`~irqrouter.errors.SpecError` for reserved bits set (hardware: ILLEGAL_COMMAND_ERROR).
        """
        return amdvi.invalidation_scope(low, high)
