"""VFIO interrupts: the eventfds behind INTx, MSI and MSI-X of a PCI device that the VMM holds.

The two ioctls of ``linux/vfio.h``, ``VFIO_DEVICE_GET_IRQ_INFO`` and ``VFIO_DEVICE_SET_IRQS``, as
drivers/vfio/pci implements them. What to know before binding an eventfd to a device:

- **Eventfds must be** ``EFD_NONBLOCK``: once KVM has taken a count, a blocking read of the same eventfd
  hangs. :meth:`irqrouter.kvm.port.Vm.adopt` refuses any other.
- **MSI and MSI-X are edges**: bind each eventfd once, give it to the router, and leave it bound. Never swap
  eventfds to catch events: the kernel frees the host IRQ and requests it again, and an edge can fall between
  the two (vfio_pci_intrs.c:vfio_msi_set_vector_signal). Deassigning the irqfd leaves the host IRQ alone.
- **INTx is a level and is never bound to an irqfd**: VFIO masks the line when it signals, and the line stays
  masked until :meth:`VfioIrqs.unmask`, or the unmask eventfd, at the guest's EOI.
- INTx, MSI and MSI-X of one device exclude each other: ``disable`` one before enabling another.
- vfio-pci clears bus mastering: until the guest's driver sets it, the device sends no MSI. ``trigger`` works.

Sizes, offsets and constants are checked against the installed header in the test run; the calls themselves
are proven on a real device in the lab only.
"""

import enum
import errno
import fcntl
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from irqrouter.errors import CallerError, KernelError, SpecError

VFIO_TYPE = ord(";")
VFIO_BASE = 100
VFIO_DEVICE_GET_IRQ_INFO = VFIO_TYPE << 8 | VFIO_BASE + 9
VFIO_DEVICE_SET_IRQS = VFIO_TYPE << 8 | VFIO_BASE + 10

#: ``struct vfio_irq_info``: argsz, flags, index, count.
VFIO_IRQ_INFO = struct.Struct("=IIII")
#: ``struct vfio_irq_set`` up to ``data``: argsz, flags, index, start, count.
VFIO_IRQ_SET = struct.Struct("=IIIII")

#: ``ioctl(fd, request, argument)``: gives the kernel's return value and fills ``argument``, or raises OSError.
Ioctl: TypeAlias = Callable[[int, int, bytearray], int]


class VfioIrqIndex(enum.IntEnum):
    """The fixed interrupt indexes of a VFIO PCI device (``VFIO_PCI_*_IRQ_INDEX``)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    #: An uncorrectable AER error was reported; PCIe devices only.
    ERR = 3
    #: The host wants the device back: it waits until the VMM closes it.
    REQ = 4

    def describe(self) -> str:
        """As the PCI specifications write it: ``INTx``, ``MSI``, ``MSI-X``. ``ERR`` and ``REQ`` are VFIO's."""
        return {VfioIrqIndex.INTX: "INTx", VfioIrqIndex.MSIX: "MSI-X"}.get(self, self.name)


class VfioIrqInfoFlag(enum.IntFlag):
    """``VFIO_IRQ_INFO_*``: what an index can do."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    #: Vectors beyond those the index was enabled with need a ``disable`` first.
    NORESIZE = 1 << 3


class VfioIrqSetFlag(enum.IntFlag):
    """``VFIO_IRQ_SET_*``: one DATA and one ACTION flag make a request."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


class VfioIrqInfo(msgspec.Struct, frozen=True):
    """What an index can do and how many vectors it has; 0 where the device does not implement it."""

    flags: VfioIrqInfoFlag
    count: int


class VfioRefusedError(KernelError):
    """VFIO refused an ioctl. ``object`` names device, index and vectors, ``reason`` what the errno means."""

    def __init__(self, errno: int, call: str, object: str, reason: str) -> None:  # noqa: A002 - as KernelError
        super().__init__(errno, call, object)
        self.reason = reason
        if reason:
            self.rule = f"{self.rule}: {reason}"


class TooFewHostVectorsError(CallerError):
    """The host can give the device only ``available`` vectors at the moment. Nothing was enabled."""

    def __init__(self, object: str, available: int) -> None:  # noqa: A002 - as IrqrouterError
        super().__init__(object, f"the host has only {available} vectors for this device")
        self.available = available


# What an errno means for each call (drivers/vfio/vfio_main.c, pci/vfio_pci_core.c, pci/vfio_pci_intrs.c).
_GET_IRQ_INFO_REASONS = {
    errno.EINVAL: "the device does not support this index, or is not bound to an iommufd yet",
    errno.ENOTTY: "the descriptor is not a VFIO device",
    errno.EBADF: "the device descriptor is closed",
}
_SET_IRQS_REASONS = {
    errno.EINVAL: "the index is unsupported, not enabled, enabled with fewer vectors or shut out by another "
    "one (INTx, MSI, MSI-X), or a descriptor is not an eventfd",
    errno.ENOTTY: "the descriptor is not a VFIO device, or the index does not know this action",
    errno.EBADF: "the device descriptor or an eventfd is closed",
    errno.EBUSY: "the host's interrupt line is taken, or an unmask eventfd is set already",
    errno.ENODEV: "the host has no interrupt line for the device",
    errno.ENOSPC: "the host has no vector left",
}


class VfioIrqs:
    """One interrupt index of one VFIO PCI device.

    ``device_fd`` stays the caller's: it is neither duplicated nor closed. ``address`` (``0000:03:00.0``)
    names the device in errors. ``ioctl`` is :func:`fcntl.ioctl` everywhere but in tests.

    Every method raises :class:`VfioRefusedError` when the kernel refuses, and
    :class:`~irqrouter.errors.CallerError`, before any change, for vectors outside ``info().count``.
    """

    def __init__(self, device_fd: int, index: VfioIrqIndex, address: str, *, ioctl: Ioctl = fcntl.ioctl) -> None:
        if device_fd < 0:
            raise CallerError(f"{address}: device_fd {device_fd}", "must be an open descriptor")
        self._device_fd = device_fd
        self._index = index
        self._address = address
        self._ioctl = ioctl

    def info(self) -> VfioIrqInfo:
        """``VFIO_DEVICE_GET_IRQ_INFO``: the index's flags and number of vectors."""
        argument = bytearray(VFIO_IRQ_INFO.pack(VFIO_IRQ_INFO.size, 0, self._index, 0))
        try:
            self._ioctl(self._device_fd, VFIO_DEVICE_GET_IRQ_INFO, argument)
        except OSError as error:
            raise _refused(error, "VFIO_DEVICE_GET_IRQ_INFO", self._name(), _GET_IRQ_INFO_REASONS) from error
        _argsz, flags, _index, count = VFIO_IRQ_INFO.unpack(argument)
        return VfioIrqInfo(VfioIrqInfoFlag(flags), count)

    def set_eventfds(self, start: int, eventfds: Sequence[int | None]) -> None:
        """Bind ``eventfds[i]`` to vector ``start + i``; None unbinds. The first call enables the index.

        Enabling allocates ``start + len(eventfds)`` host vectors, all of them or none:
        :class:`TooFewHostVectorsError`. When the kernel refuses a vector of an index already enabled, the whole
        range is left unbound (vfio_pci_intrs.c:vfio_msi_set_block). VFIO holds the eventfd's context but not
        its file: once the last descriptor is closed, KVM's irqfd is gone and the device signals nobody.
        """
        self._check_range(start, len(eventfds))
        for vector, eventfd in enumerate(eventfds, start):
            self._check_eventfd(eventfd, vector)
        self._set_eventfds(VfioIrqSetFlag.ACTION_TRIGGER, start, eventfds)

    def trigger(self, start: int, count: int) -> None:
        """Signal the eventfds of ``count`` vectors as the device would: the kernel's loopback test.

        A vector without an eventfd is passed over; the index must be enabled.
        """
        self._check_range(start, count)
        self._act(VfioIrqSetFlag.ACTION_TRIGGER, start, count)

    def disable(self) -> None:
        """Unbind every eventfd and give the host vectors back. EINVAL when the index is not enabled."""
        self._act(VfioIrqSetFlag.ACTION_TRIGGER, start=0, count=0)

    def mask(self) -> None:
        """Mask the line. INTx only: vfio-pci masks no MSI (there, a masked vector is one without an irqfd)."""
        self._check_maskable()
        self._act(VfioIrqSetFlag.ACTION_MASK, start=0, count=1)

    def unmask(self) -> None:
        """Unmask the line. INTx only. A line still asserted signals its eventfd again at once."""
        self._check_maskable()
        self._act(VfioIrqSetFlag.ACTION_UNMASK, start=0, count=1)

    def set_unmask_eventfd(self, eventfd: int | None) -> None:
        """Unmask the line whenever ``eventfd`` is signalled; None ends that. INTx only.

        The kernel drains this eventfd (drivers/vfio/virqfd.c), so let it serve nothing else. EBUSY when one
        is set already.
        """
        self._check_maskable()
        self._check_eventfd(eventfd, vector=0)
        self._set_eventfds(VfioIrqSetFlag.ACTION_UNMASK, 0, [eventfd])

    def _check_range(self, start: int, count: int) -> None:
        available = self.info().count
        # count 0 with DATA_NONE and ACTION_TRIGGER would disable the whole index
        if start < 0 or count < 1 or start + count > available:
            raise CallerError(
                self._name(),
                f"start {start} and count {count} do not name vectors of the {available} the device has",
            )

    def _check_eventfd(self, eventfd: int | None, vector: int) -> None:
        if eventfd is not None and not 0 <= eventfd < 1 << 31:
            raise CallerError(f"{self._name(vector, 1)}: eventfd {eventfd}", "must be a descriptor, or None")

    def _check_maskable(self) -> None:
        if VfioIrqInfoFlag.MASKABLE not in self.info().flags:
            raise CallerError(self._name(), "VFIO cannot mask this index (VFIO_IRQ_INFO_MASKABLE is not set)")

    def _set_eventfds(self, action: VfioIrqSetFlag, start: int, eventfds: Sequence[int | None]) -> None:
        data = struct.pack(f"={len(eventfds)}i", *(-1 if fd is None else fd for fd in eventfds))
        self._set_irqs(VfioIrqSetFlag.DATA_EVENTFD | action, start, len(eventfds), data)

    def _act(self, action: VfioIrqSetFlag, start: int, count: int) -> None:
        self._set_irqs(VfioIrqSetFlag.DATA_NONE | action, start, count, b"")

    def _set_irqs(self, flags: VfioIrqSetFlag, start: int, count: int, data: bytes) -> None:
        argsz = VFIO_IRQ_SET.size + len(data)
        argument = bytearray(VFIO_IRQ_SET.pack(argsz, flags, self._index, start, count) + data)
        name = self._name(start, count)
        try:
            available = self._ioctl(self._device_fd, VFIO_DEVICE_SET_IRQS, argument)
        except OSError as error:
            raise _refused(error, "VFIO_DEVICE_SET_IRQS", name, _SET_IRQS_REASONS) from error
        # vfio_msi_enable returns how many it could have had when it cannot have them all
        if available > 0:
            raise TooFewHostVectorsError(name, available)

    def _name(self, start: int = 0, count: int = 0) -> str:
        index = f"{self._address} {self._index.describe()}"
        if count == 0:
            return index
        return f"{index} vector {start}" if count == 1 else f"{index} vectors {start}-{start + count - 1}"


def _refused(error: OSError, call: str, name: str, reasons: Mapping[int, str]) -> VfioRefusedError:
    number = error.errno or errno.EIO
    return VfioRefusedError(number, call, name, reasons.get(number, ""))


_ADDRESS = re.compile(r"[0-9a-f]{4,8}:(?P<bus>[0-9a-f]{2}):(?P<device>[01][0-9a-f])\.(?P<function>[0-7])")


def requester_id(address: str) -> int:
    """The requester id of a PCI address as sysfs writes it: ``0000:03:00.0`` is 0x0300.

    Bus in bits 15:8, device in 7:3, function in 2:0 (PCI Express Base Specification, section 2.2.6.2). The
    domain is not part of it: every domain has remapping units of its own. A guest's IOMMU knows the device by
    the address the *guest* sees.

    Raises :class:`~irqrouter.errors.SpecError` for anything else.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise SpecError(f"PCI address {address!r}", "must be domain:bus:device.function, as in 0000:03:1f.7")
    bus, device, function = (int(match[field], 16) for field in ("bus", "device", "function"))
    return bus << 8 | device << 3 | function
