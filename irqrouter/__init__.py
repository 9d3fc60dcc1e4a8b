"""Keeps KVM irqfds assigned while nothing changes; after an invalidation it catches, retranslates and reassigns.

The library in one breath: a :class:`Router` over a VM (:class:`KvmVm`) and a remapper (:class:`VtdRemapper`,
:class:`AmdviRemapper`, :class:`NoRemapping`); ``add`` an eventfd as a vector; ``invalidate`` when the guest does;
``vectors()`` tells what happened.
"""

from irqrouter.core.machine import State
from irqrouter.core.vectors import Vector, VectorStatus
from irqrouter.errors import CallerError, GuestMemoryError, IrqrouterError, KernelError, SpecError
from irqrouter.eventfd_loop import Router, Source
from irqrouter.iommu_remap import (
    EVERYTHING,
    AmdviRemapper,
    Fault,
    NoRemapping,
    Remapper,
    Scope,
    VtdRemapper,
    device,
    entries,
    entry,
)
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import KvmVm
from irqrouter.memory import GuestMemory, MemfdMemory, MemoryRegion
from irqrouter.x86.msi import Message, Request

__all__ = [
    "EVERYTHING",
    "AmdviRemapper",
    "CallerError",
    "Fault",
    "GuestMemory",
    "GuestMemoryError",
    "IrqrouterError",
    "KernelError",
    "KvmVm",
    "MemfdMemory",
    "MemoryRegion",
    "Message",
    "NoRemapping",
    "Remapper",
    "Request",
    "Router",
    "Scope",
    "Source",
    "SpecError",
    "State",
    "Vcpu",
    "Vector",
    "VectorStatus",
    "VtdRemapper",
    "device",
    "entries",
    "entry",
]
