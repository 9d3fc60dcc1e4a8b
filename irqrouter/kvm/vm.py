"""The VM: KVM's VM-wide ioctls on the real kernel."""

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from irqrouter.errors import CallerError, IrqrouterError, KernelError, SpecError
from irqrouter.kvm.abi import (
    KVM_API_VERSION,
    KVM_CAP_IRQ_ROUTING,
    KVM_CAP_IRQFD,
    KVM_CAP_SIGNAL_MSI,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_ENABLE_CAP,
    KVM_ENABLE_CAP_STRUCT,
    KVM_GET_API_VERSION,
    KVM_IRQ_LEVEL_STRUCT,
    KVM_IRQ_LINE,
    KVM_IRQ_ROUTING_ENTRY_STRUCT,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQ_ROUTING_STRUCT,
    KVM_IRQFD,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_STRUCT,
    KVM_MSI_STRUCT,
    KVM_SET_GSI_ROUTING,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SIGNAL_MSI,
    KVM_USERSPACE_MEMORY_REGION_STRUCT,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
)
from irqrouter.kvm.eventfd import EpollWatchSet, KvmEventfd, kernel_error
from irqrouter.kvm.port import Eventfd
from irqrouter.x86.msi import Message, checked

_DEV_KVM = "/dev/kvm"
_X2APIC = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK


_CREATE_VM_TRIES = 10


class KvmMissingError(KernelError):
    """There is no ``/dev/kvm``, or no driver behind it."""


class KvmPermissionError(KernelError):
    """``/dev/kvm`` exists and this process may not open it."""


class KvmUnsupportedError(KernelError):
    """This KVM lacks something irqrouter needs; ``object`` names it and ``errno`` is ``EOPNOTSUPP``."""


class NotAVmError(CallerError):
    """The descriptor is closed or is something else than a KVM VM's."""


class ForeignVmError(KernelError):
    """``EIO``: KVM obeys only the address space that created the VM (virt/kvm/kvm_main.c:kvm_vm_ioctl)."""

    def __init__(self, call: str, object: str) -> None:  # noqa: A002 - KernelError's name
        super().__init__(errno.EIO, call, object)
        self.rule += ": the VM belongs to another process, or is dead"


def open_kvm() -> int:
    """Open ``/dev/kvm``, check the API version and return the descriptor, which is the caller's to close.

    Raises :class:`KvmMissingError`, :class:`KvmPermissionError`, :class:`KvmUnsupportedError` or
    :class:`KernelError`.
    """
    try:
        kvm_fd = os.open(_DEV_KVM, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise KvmMissingError(errno.ENOENT, "open", _DEV_KVM) from error
    except PermissionError as error:
        raise KvmPermissionError(errno.EACCES, "open", _DEV_KVM) from error
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise KvmMissingError(error.errno, "open", _DEV_KVM) from error
        raise kernel_error(error, "open", _DEV_KVM) from error
    try:
        version = fcntl.ioctl(kvm_fd, KVM_GET_API_VERSION, 0)
    except OSError as error:
        os.close(kvm_fd)
        raise kernel_error(error, "KVM_GET_API_VERSION", _DEV_KVM) from error
    if version != KVM_API_VERSION:
        os.close(kvm_fd)
        raise KvmUnsupportedError(errno.EOPNOTSUPP, "KVM_GET_API_VERSION", f"KVM API version {version}")
    return kvm_fd


class KvmVm:
    """A VM of the real kernel (:class:`irqrouter.kvm.port.Vm`), by a duplicate of its descriptor ``vm_fd``.

    The VM must have a split irqchip whose I/OAPIC pins are the GSIs below ``pins``, and 32-bit x2APIC ids
    (``KVM_CAP_X2APIC_API``); :meth:`create` makes one. KVM cannot be asked for a VM's routes: the table is taken to be
    empty, and the first write replaces what the VMM may have put there.

    Raises :class:`NotAVmError`, :class:`ForeignVmError`, :class:`KvmUnsupportedError` and :class:`CallerError`.

    The calls are made with the GIL released, and may come from any thread. After :meth:`close` each of them raises
    :class:`KernelError` with ``EBADF``; the VM itself lives as long as anybody has it open.
    """

    def __init__(self, vm_fd: int, *, pins: int = 24) -> None:
        self._fd = _duplicate_vm(vm_fd)
        try:
            self._routes_max = self._require(KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING")
            self._require(KVM_CAP_IRQFD, "KVM_CAP_IRQFD")
            self._require(KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI")
        except BaseException:
            self.close()
            raise
        if not 0 <= pins <= self._routes_max:
            self.close()
            raise CallerError(f"{pins} pins", f"must be between 0 and {self._routes_max}")
        self._pins = pins
        # The table as the kernel last accepted it, kept as the bytes that the ioctl takes: `_routes` says what is in
        # it and `_slots` where. The order of entries means nothing to KVM, so a dropped one is filled by the last.
        self._image = bytearray(KVM_IRQ_ROUTING_STRUCT.size + self._routes_max * KVM_IRQ_ROUTING_ENTRY_STRUCT.size)
        self._argument = (ctypes.c_char * len(self._image)).from_buffer(self._image)
        self._routes: dict[int, Message] = {}
        self._slots: dict[int, int] = {}
        self._order: list[int] = []
        self._routing_lock = threading.Lock()

    @classmethod
    def create(cls, *, pins: int = 24) -> Self:
        """Create a VM with a split irqchip, ``pins`` I/OAPIC pins and 32-bit x2APIC ids.

        Raises what :func:`open_kvm` and the class do.
        """
        kvm_fd = open_kvm()
        try:
            vm_fd = _create_vm(kvm_fd)
        finally:
            os.close(kvm_fd)
        try:
            vm = cls(vm_fd, pins=pins)
        finally:
            os.close(vm_fd)
        try:
            vm._enable_cap(KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP", pins)
            vm._enable_cap(KVM_CAP_X2APIC_API, "KVM_CAP_X2APIC_API", _X2APIC)
        except BaseException:
            vm.close()
            raise
        return vm

    @property
    def pins(self) -> int:
        """GSIs below this belong to I/OAPIC pins (``KVM_CAP_SPLIT_IRQCHIP``'s argument)."""
        return self._pins

    @property
    def routes_max(self) -> int:
        """How many routes, and GSIs, the VM can have: ``KVM_CAP_IRQ_ROUTING``, 4096 in practice."""
        return self._routes_max

    def fileno(self) -> int:
        """The duplicate's number; -1 once closed."""
        return self._fd

    def check_extension(self, capability: int) -> int:
        """``KVM_CHECK_EXTENSION`` for this VM: 0 where the capability is missing."""
        return self._ioctl_number(KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", f"capability {capability}", capability)

    def create_vcpu(self, vcpu_id: int) -> int:
        """``KVM_CREATE_VCPU``: the new vCPU's descriptor, which is the caller's to close."""
        return self._ioctl_number(KVM_CREATE_VCPU, "KVM_CREATE_VCPU", f"vCPU {vcpu_id}", vcpu_id)

    def set_user_memory_region(self, slot: int, gpa: int, size: int, host_address: int) -> None:
        """``KVM_SET_USER_MEMORY_REGION``: ``size`` bytes at ``gpa`` are those at ``host_address``; size 0 deletes."""
        what = f"memory slot {slot}"
        region = _packed(KVM_USERSPACE_MEMORY_REGION_STRUCT, what, slot, 0, gpa, size, host_address)
        self._ioctl(KVM_SET_USER_MEMORY_REGION, "KVM_SET_USER_MEMORY_REGION", what, region)

    def adopt(self, fd: int) -> KvmEventfd:
        """Duplicate ``fd`` and own the duplicate: :class:`~irqrouter.kvm.eventfd.KvmEventfd`."""
        return KvmEventfd(fd)

    def watch_set(self) -> EpollWatchSet:
        """A new, empty watch set."""
        return EpollWatchSet()

    def irqfd_assign(self, eventfd: Eventfd, gsi: int) -> None:
        """``KVM_IRQFD``: from now on KVM takes the eventfd's events and injects them at ``gsi``.

        A pending count is injected but not taken (virt/kvm/eventfd.c:kvm_irqfd_assign). ``EBUSY`` when the eventfd has
        an irqfd already: of any VM since Linux 6.17, of this one before.
        """
        try:
            fcntl.ioctl(self._fd, KVM_IRQFD, bytearray(KVM_IRQFD_STRUCT.pack(eventfd.fileno(), gsi, 0, 0)))
        except _REFUSED as error:
            raise _refusal(error, "KVM_IRQFD", f"eventfd {eventfd.fileno()} at gsi {gsi}") from error

    def irqfd_deassign(self, eventfd: Eventfd, gsi: int) -> None:
        """``KVM_IRQFD`` with ``KVM_IRQFD_FLAG_DEASSIGN``: when it returns KVM injects nothing more for that pair.

        KVM waits for an SRCU grace period and a host-wide work queue in it (irqfd_shutdown): some 15 µs to 90 µs, at
        times several ms. Succeeds when nothing matched.
        """
        try:
            # A bytearray, as everywhere: fcntl.ioctl tries for a writable buffer first, and fails slowly on bytes.
            argument = bytearray(KVM_IRQFD_STRUCT.pack(eventfd.fileno(), gsi, KVM_IRQFD_FLAG_DEASSIGN, 0))
            fcntl.ioctl(self._fd, KVM_IRQFD, argument)
        except _REFUSED as error:
            raise _refusal(
                error, "KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN", f"eventfd {eventfd.fileno()} at gsi {gsi}"
            ) from error

    def signal_msi(self, message: Message) -> int:
        """``KVM_SIGNAL_MSI``: deliver now. Returns how many vCPUs took it; 0 when none did, as on a bus without one.

        Where KVM has no map of local APICs to look in, as before the first vCPU, its answer for "nobody" is -1
        (arch/x86/kvm/irq.c:kvm_irq_delivery_to_apic), which the ioctl returns as ``EPERM``. It means 0 here too.
        """
        address, data = message.address, message.data
        try:
            argument = bytearray(KVM_MSI_STRUCT.pack(address & 0xFFFFFFFF, address >> 32, data, 0, 0))
            taken: int = fcntl.ioctl(self._fd, KVM_SIGNAL_MSI, argument)
        except PermissionError:
            return 0
        except _REFUSED as error:
            checked(message)
            raise _refusal(error, "KVM_SIGNAL_MSI", f"MSI {message.describe()}") from error
        return taken

    def irq_line(self, gsi: int, level: int) -> None:
        """``KVM_IRQ_LINE``: level 1 delivers what the routing table, as it is now, says for ``gsi``; 0 does nothing.

        So it is with a split irqchip, where every route is an MSI (arch/x86/kvm/irq.c:kvm_set_msi).
        """
        argument = _packed(KVM_IRQ_LEVEL_STRUCT, f"gsi {gsi}", gsi, level)
        self._ioctl(KVM_IRQ_LINE, "KVM_IRQ_LINE", f"gsi {gsi}", argument)

    def set_gsi_routing(self, changes: Mapping[int, Message | None]) -> None:
        """``KVM_SET_GSI_ROUTING``: the whole table as last accepted, with ``changes`` (None drops a GSI).

        Atomic: on an error the kernel's table, and the one remembered here, are as before. Assigned irqfds use the
        new routes when it returns. Raises :class:`CallerError` for a GSI beyond ``routes_max`` and for an address
        whose bits 39:32 are not zero: with 32-bit x2APIC ids bits 63:40 are the destination's bits 31:8 and the rest
        is reserved (arch/x86/kvm/irq.c:kvm_msi_route_invalid).
        """
        for gsi, message in changes.items():
            if not 0 <= gsi < self._routes_max:
                raise CallerError(f"gsi {gsi}", f"must be below {self._routes_max}")
            if message is not None and checked(message).address >> 32 & 0xFF:
                raise CallerError(f"gsi {gsi}", f"bits 39:32 of {message.address:#x} must be zero")
        with self._routing_lock:
            before = {gsi: self._routes.get(gsi) for gsi in changes}
            self._edit_image(changes)
            try:
                _large_ioctl(self._fd, KVM_SET_GSI_ROUTING, self._argument)
            except _REFUSED as error:
                self._edit_image(before)
                raise _refusal(error, "KVM_SET_GSI_ROUTING", f"{len(before)} changed routes") from error

    def close(self) -> None:
        """Close the duplicate. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _edit_image(self, changes: Mapping[int, Message | None]) -> None:
        for gsi, message in changes.items():
            if message is not None:
                if gsi not in self._slots:
                    self._slots[gsi] = len(self._order)
                    self._order.append(gsi)
                self._routes[gsi] = message
                self._write_entry(gsi, message)
            elif gsi in self._slots:
                del self._routes[gsi]
                slot = self._slots.pop(gsi)
                last = self._order.pop()
                if last != gsi:
                    self._order[slot] = last
                    self._slots[last] = slot
                    self._write_entry(last, self._routes[last])
        KVM_IRQ_ROUTING_STRUCT.pack_into(self._image, 0, len(self._order), 0)

    def _write_entry(self, gsi: int, message: Message) -> None:
        KVM_IRQ_ROUTING_ENTRY_STRUCT.pack_into(
            self._image,
            KVM_IRQ_ROUTING_STRUCT.size + self._slots[gsi] * KVM_IRQ_ROUTING_ENTRY_STRUCT.size,
            gsi,
            KVM_IRQ_ROUTING_MSI,
            0,
            message.address & 0xFFFFFFFF,
            message.address >> 32,
            message.data,
        )

    def _require(self, capability: int, name: str) -> int:
        value = self.check_extension(capability)
        if not value:
            raise KvmUnsupportedError(errno.EOPNOTSUPP, "KVM_CHECK_EXTENSION", name)
        return value

    def _enable_cap(self, capability: int, name: str, argument: int) -> None:
        self._require(capability, name)
        self._ioctl(KVM_ENABLE_CAP, "KVM_ENABLE_CAP", name, KVM_ENABLE_CAP_STRUCT.pack(capability, 0, argument))

    def _ioctl(self, request: int, call: str, what: str, argument: bytes) -> None:
        try:
            fcntl.ioctl(self._fd, request, argument)
        except _REFUSED as error:
            raise _refusal(error, call, what) from error

    def _ioctl_number(self, request: int, call: str, what: str, argument: int) -> int:
        try:
            return fcntl.ioctl(self._fd, request, argument)
        except _REFUSED as error:
            raise _refusal(error, call, what) from error


#: ``ioctl(2)`` itself: the GIL is always released, and ``EINTR`` comes back. Below 0 it failed; ``ctypes.get_errno()``.
libc_ioctl: Final = ctypes.CDLL(None, use_errno=True).ioctl
libc_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def _large_ioctl(fd: int, request: int, argument: ctypes.Array[ctypes.c_char]) -> None:
    # For an argument above 1024 bytes fcntl.ioctl keeps the GIL (Modules/fcntlmodule.c:fcntl_ioctl_impl), and to write
    # a large table takes a millisecond or more: every thread would wait, the loop's first of all.
    if libc_ioctl(fd, request, argument) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# How an ioctl, or packing its argument, fails: ValueError is a closed descriptor's, the last two are a field's.
_REFUSED = (OSError, ValueError, struct.error, OverflowError)


def _refusal(error: Exception, call: str, what: str) -> IrqrouterError:
    if isinstance(error, struct.error | OverflowError):
        return SpecError(what, f"does not fit the argument of {call}")
    if isinstance(error, OSError) and error.errno == errno.EIO:
        return ForeignVmError(call, what)
    assert isinstance(error, OSError | ValueError)
    return kernel_error(error, call, what)


def _packed(layout: struct.Struct, what: str, *fields: int) -> bytes:
    try:
        return layout.pack(*fields)
    except struct.error as error:
        raise SpecError(what, "a field does not fit") from error


def _create_vm(kvm_fd: int) -> int:
    # KVM starts a kernel thread for the VM, and gives up with EINTR when that is disturbed, signal or not: seen about
    # once in 300 VMs on Linux 6.18. Every VMM tries again.
    for _ in range(_CREATE_VM_TRIES):
        try:
            return fcntl.ioctl(kvm_fd, KVM_CREATE_VM, 0)
        except InterruptedError:
            pass
        except OSError as error:
            raise kernel_error(error, "KVM_CREATE_VM", _DEV_KVM) from error
    raise KernelError(errno.EINTR, "KVM_CREATE_VM", _DEV_KVM)


def _duplicate_vm(vm_fd: int) -> int:
    try:
        fd = fcntl.fcntl(vm_fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, ValueError, OverflowError) as error:
        raise NotAVmError(f"descriptor {vm_fd}", "cannot be duplicated") from error
    if Path(f"/proc/self/fd/{fd}").readlink() != Path("anon_inode:kvm-vm"):
        os.close(fd)
        raise NotAVmError(f"descriptor {vm_fd}", "is not a KVM VM's")
    return fd
