"""What this host's kernel does, tried out: small functions that return what they saw, and judge nothing.

A behaviour is probed in a VM of its own that is gone when the function returns; nothing on the host is changed. Version
numbers prove little, as distributions backport: they are used only for :class:`KernelBug`, which cannot be probed
without a device. All of them raise :class:`~irqrouter.errors.KernelError` where the kernel refuses more than they
ask about, and those that need ``/dev/kvm`` what :func:`~irqrouter.kvm.vm.open_kvm` does.
"""

import contextlib
import ctypes
import enum
import errno
import fcntl
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final, Self

import msgspec

from irqrouter.errors import KernelError, SpecError
from irqrouter.kvm.abi import (
    KVM_CAP_IRQ_ROUTING,
    KVM_CAP_IRQFD,
    KVM_CAP_SIGNAL_MSI,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CHECK_EXTENSION,
    KVM_IRQFD,
    KVM_IRQFD_STRUCT,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
)
from irqrouter.kvm.eventfd import EpollWatchSet, KvmEventfd, kernel_error
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import KvmVm, open_kvm
from irqrouter.x86.msi import remapped

# Of <linux/kvm.h>, and used by nobody else: tests/kvm/test_probes.py compares them with the header.
_KVM_CAP_XEN_HVM: Final = 38
_KVM_CAP_MSI_DEVID: Final = 131
_KVM_IRQFD_FLAG_RESAMPLE: Final = 1 << 1

_ROOT: Final = Path("/")
_PATIENCE_S: Final = 5.0

# The throw-away VM: one GSI above the I/OAPIC's pins, and the vector that its route leads to.
_GSI: Final = 32
_VECTOR: Final = 0x41


class X2apicApi(enum.IntFlag):
    """What ``KVM_CAP_X2APIC_API`` can switch on (``KVM_X2APIC_*``, Documentation/virt/kvm/api.rst 7.7)."""

    USE_32BIT_IDS = KVM_X2APIC_API_USE_32BIT_IDS
    DISABLE_BROADCAST_QUIRK = KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
    ENABLE_SUPPRESS_EOI_BROADCAST = 1 << 2
    DISABLE_SUPPRESS_EOI_BROADCAST = 1 << 3


class XenHvm(enum.IntFlag):
    """What ``KVM_CAP_XEN_HVM`` offers (``KVM_XEN_HVM_CONFIG_*``, Documentation/virt/kvm/api.rst 8.30)."""

    HYPERCALL_MSR = 1 << 0
    INTERCEPT_HCALL = 1 << 1
    SHARED_INFO = 1 << 2
    RUNSTATE = 1 << 3
    EVTCHN_2LEVEL = 1 << 4
    EVTCHN_SEND = 1 << 5
    RUNSTATE_UPDATE_FLAG = 1 << 6
    PVCLOCK_TSC_UNSTABLE = 1 << 7
    SHARED_INFO_HVA = 1 << 8


class Capabilities(msgspec.Struct, frozen=True):
    """``KVM_CHECK_EXTENSION``'s answers. ``routes_max`` is ``KVM_CAP_IRQ_ROUTING``'s, 0 without it."""

    split_irqchip: bool
    x2apic_api: X2apicApi
    irqfd: bool
    routes_max: int
    signal_msi: bool
    msi_devid: bool
    xen_hvm: XenHvm


class EventSeen(msgspec.Struct, frozen=True):
    """What became of an event: whether KVM injected it and epoll reported it, and how much is left in the eventfd."""

    injected: bool
    reported: bool
    left: int


class Vfio(msgspec.Struct, frozen=True):
    """``container``: /dev/vfio/vfio is there; ``iommufd``: /dev/iommu is; how many IOMMU groups the host has."""

    container: bool
    iommufd: bool
    iommu_groups: int


class PostedInterrupts(msgspec.Struct, frozen=True):
    """The module parameters that let KVM post device interrupts; None where one is missing or cannot be read.

    ``vendor_module`` is ``kvm_intel`` or ``kvm_amd``, None if neither is loaded; ``apicv`` its ``enable_apicv`` or
    ``avic``; ``device_posted_irqs`` its ``enable_device_posted_irqs``, which Linux has since 6.16.
    """

    vendor_module: str | None
    apicv: bool | None
    device_posted_irqs: bool | None

    @property
    def switched_off(self) -> bool:
        """Whether KVM certainly posts no device's interrupt."""
        return self.apicv is False or self.device_posted_irqs is False


class KernelRelease(msgspec.Struct, frozen=True, order=True):
    """A release's number, as ``uname -r`` begins. ``patch`` is -1 in a release candidate: it comes before .0."""

    major: int
    minor: int
    patch: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """``6.12.26-1-amd64``, ``6.15.0-rc4+``. Raises :class:`SpecError` for what does not begin like a release."""
        match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(-rc\d)?", text)
        if match is None:
            raise SpecError(f"kernel release {text!r}", "must begin with major.minor")
        major, minor, patch, candidate = match.groups()
        return cls(int(major), int(minor), -1 if candidate else int(patch or 0))

    def describe(self) -> str:
        """``6.12.26``, ``6.19``, ``6.19-rc``."""
        patch = "-rc" if self.patch < 0 else f".{self.patch}" if self.patch else ""
        return f"{self.major}.{self.minor}{patch}"


class KernelBug(msgspec.Struct, frozen=True):
    """A kernel bug: ``fixed`` has the first good release of every stable series and, last, of the mainline."""

    cve: str
    title: str
    fixed: tuple[KernelRelease, ...]

    def fixed_in(self, release: KernelRelease) -> bool:
        """Whether ``release`` has the fix by its number. False is no proof: distributions backport."""
        series = release.major, release.minor
        return release >= self.fixed[-1] or any(
            series == (fix.major, fix.minor) and release >= fix for fix in self.fixed
        )


def _releases(text: str) -> tuple[KernelRelease, ...]:
    return tuple(KernelRelease.parse(release) for release in text.split())


#: After a deassign the host's IOMMU may keep posting the old translation: the next event is never caught.
CVE_2026_23198: Final = KernelBug(
    "CVE-2026-23198",
    "KVM: Don't clobber irqfd routing type when deassigning irqfd",
    _releases("5.10.250 5.15.200 6.1.163 6.6.124 6.12.70 6.18.10 6.19"),
)

#: A route rewritten to one that cannot be posted leaves the host's IOMMU posting the old one.
CVE_2025_37885: Final = KernelBug(
    "CVE-2025-37885",
    "KVM: x86: Reset IRTE to host control if *new* route isn't postable",
    _releases("5.10.237 5.15.181 6.1.136 6.6.89 6.12.26 6.14.5 6.15"),
)


def kernel_release() -> KernelRelease:
    """The running kernel's release."""
    return KernelRelease.parse(os.uname().release)


def cpu_virtualization(root: Path = _ROOT) -> str | None:
    """``vmx`` or ``svm``, whichever the CPU says it has; None for neither."""
    found = re.search(r"^flags\s*:.*\b(vmx|svm)\b", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return found and found[1]


def capabilities() -> Capabilities:
    """What KVM says it can do."""
    kvm_fd = open_kvm()
    try:

        def check(capability: int) -> int:
            return fcntl.ioctl(kvm_fd, KVM_CHECK_EXTENSION, capability)

        return Capabilities(
            split_irqchip=bool(check(KVM_CAP_SPLIT_IRQCHIP)),
            x2apic_api=X2apicApi(check(KVM_CAP_X2APIC_API)),
            irqfd=bool(check(KVM_CAP_IRQFD)),
            routes_max=check(KVM_CAP_IRQ_ROUTING),
            signal_msi=bool(check(KVM_CAP_SIGNAL_MSI)),
            msi_devid=bool(check(_KVM_CAP_MSI_DEVID)),
            xen_hvm=XenHvm(check(_KVM_CAP_XEN_HVM)),
        )
    except OSError as error:
        raise kernel_error(error, "KVM_CHECK_EXTENSION", "/dev/kvm") from error
    finally:
        os.close(kvm_fd)


def event_while_assigned() -> EventSeen:
    """Signal once while the irqfd is assigned: KVM should take it all, and userspace see nothing (irqfd_wakeup)."""
    with _Scene.open() as scene:
        scene.assign()
        scene.eventfd.write(1)
        return scene.look()


def event_after_deassign() -> EventSeen:
    """Signal once after the irqfd was assigned and deassigned: userspace should see it, and KVM not."""
    with _Scene.open() as scene:
        scene.assign()
        scene.deassign()
        scene.eventfd.write(1)
        return scene.look()


def event_before_assign() -> EventSeen:
    """Signal once, then assign: KVM should inject, and leave the count where it is (kvm_irqfd_assign)."""
    with _Scene.open() as scene:
        scene.eventfd.write(1)
        scene.assign()
        return scene.look()


def event_without_route() -> EventSeen:
    """Signal once while the irqfd is assigned to a GSI without a route."""
    with _Scene.open(routed=False) as scene:
        scene.assign()
        scene.eventfd.write(1)
        return scene.look()


def one_irqfd_per_eventfd() -> bool:
    """Whether a second VM's irqfd on the same eventfd gets ``EBUSY`` (add_wait_queue_priority_exclusive, 6.17)."""
    with KvmVm.create() as first, KvmVm.create() as second, _eventfd() as eventfd:
        first.irqfd_assign(eventfd, _GSI)
        return _refused(errno.EBUSY, lambda: second.irqfd_assign(eventfd, _GSI))


def resample_refused() -> bool:
    """Whether ``KVM_IRQFD_FLAG_RESAMPLE`` gets ``EINVAL`` on a split irqchip (kvm_arch_irqfd_allowed)."""
    with KvmVm.create() as vm, _eventfd() as trigger, _eventfd() as resample:
        argument = KVM_IRQFD_STRUCT.pack(trigger.fileno(), _GSI, _KVM_IRQFD_FLAG_RESAMPLE, resample.fileno())

        def assign() -> None:
            try:
                fcntl.ioctl(vm.fileno(), KVM_IRQFD, argument)
            except OSError as error:
                raise kernel_error(error, "KVM_IRQFD with KVM_IRQFD_FLAG_RESAMPLE", f"gsi {_GSI}") from error

        return _refused(errno.EINVAL, assign)


def eventfd_fdinfo() -> frozenset[str]:
    """The names of the lines that are about eventfds in an eventfd's fdinfo (fs/eventfd.c:eventfd_show_fdinfo)."""
    fd = _new_eventfd()
    path = Path(f"/proc/self/fdinfo/{fd}")
    try:
        lines = path.read_text("ascii").splitlines()
    except OSError as error:
        raise kernel_error(error, f"reading {path}", "eventfd") from error
    finally:
        os.close(fd)
    return frozenset(line.partition(":")[0] for line in lines if line.startswith("eventfd-"))


_ASK_AS_ANOTHER_PROCESS: Final = """\
import fcntl, sys
try:
    fcntl.ioctl(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(0)
except OSError as error:
    print(error.errno)
"""


def foreign_vm_errno() -> int:
    """The errno of a VM ioctl made by another process than the VM's (kvm_vm_ioctl: ``EIO``); 0 if it is obeyed."""
    with KvmVm.create() as vm:
        request = [str(vm.fileno()), str(KVM_CHECK_EXTENSION), str(KVM_CAP_IRQFD)]
        # Not fork(): it is not for processes with threads, and a VMM has them.
        command = [sys.executable, "-I", "-S", "-c", _ASK_AS_ANOTHER_PROCESS, *request]
        try:
            answer = subprocess.run(
                command, pass_fds=[vm.fileno()], capture_output=True, timeout=_PATIENCE_S, check=True
            )
        except subprocess.TimeoutExpired as error:
            raise KernelError(errno.ETIMEDOUT, f"running {sys.executable}", "another process") from error
        except subprocess.CalledProcessError as error:
            raise KernelError(errno.ECHILD, f"running {sys.executable}", "another process") from error
        except OSError as error:
            raise kernel_error(error, f"running {sys.executable}", "another process") from error
    return int(answer.stdout)


_ENTRY: Final = 0x1000
_HANDLER: Final = 0x1010
_REPORT: Final = 0x2000  # the guest's data segment: byte 0 is set when it idles, byte 1 when it was interrupted
_RAM_SIZE: Final = 0x3000


def vcpu_runs() -> bool:
    """Whether a guest that sleeps in ``HLT`` wakes up and runs its handler when an irqfd's eventfd is signalled.

    Waits five seconds for it. Raises :class:`~irqrouter.kvm.vcpu.UnexpectedExitError` if the vCPU gives up.
    """
    with (
        mmap.mmap(-1, _RAM_SIZE) as ram,  # outermost: the VM has it in a memory slot
        _Scene.open(entry=_ENTRY, stack=_ENTRY, data=_REPORT) as scene,
    ):
        ram[4 * _VECTOR : 4 * _VECTOR + 2] = _HANDLER.to_bytes(2, "little")  # IVT: IP; CS is 0
        code = (
            b"\xc6\x06\x00\x00\x01"  # mov byte [0], 1
            b"\xfb"  # sti: its shadow covers the hlt
            b"\xf4"  # hlt
            b"\xeb\xfd"  # jmp to the hlt
        )
        ram[_ENTRY : _ENTRY + len(code)] = code
        handler = (
            b"\xc6\x06\x01\x00\x01"  # mov byte [1], 1
            b"\xcf"  # iret
        )
        ram[_HANDLER : _HANDLER + len(handler)] = handler
        address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        scene.vm.set_user_memory_region(0, 0, _RAM_SIZE, address)
        scene.assign()
        scene.vcpu.start()
        if not _becomes_set(ram, _REPORT):
            return False
        scene.eventfd.write(1)
        return _becomes_set(ram, _REPORT + 1)


def _becomes_set(ram: mmap.mmap, offset: int) -> bool:
    # A guest that writes to memory wakes nobody, so there is nothing to wait for but the byte itself.
    deadline = time.monotonic() + _PATIENCE_S
    while not ram[offset]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def memfd_seals() -> bool:
    """Whether a memfd sealed with ``F_SEAL_SHRINK`` refuses to shrink."""
    try:
        fd = os.memfd_create("irqrouter-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise kernel_error(error, "memfd_create", "memfd") from error
    try:
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            raise kernel_error(error, "F_ADD_SEALS", "memfd") from error
        try:
            os.ftruncate(fd, 0)
        except PermissionError:
            return True
        return False
    finally:
        os.close(fd)


def vfio(root: Path = _ROOT) -> Vfio:
    """What there is of VFIO."""
    groups = root / "sys/kernel/iommu_groups"
    return Vfio(
        container=(root / "dev/vfio/vfio").exists(),
        iommufd=(root / "dev/iommu").exists(),
        iommu_groups=len(list(groups.iterdir())) if groups.is_dir() else 0,
    )


def posted_interrupts(root: Path = _ROOT) -> PostedInterrupts:
    """Whether KVM is set to post device interrupts. The host's IOMMU must be able to, too, which this does not say."""
    for module, apicv in (("kvm_intel", "enable_apicv"), ("kvm_amd", "avic")):
        parameters = root / "sys/module" / module / "parameters"
        if parameters.is_dir():
            return PostedInterrupts(
                vendor_module=module,
                apicv=_switch(parameters / apicv),
                device_posted_irqs=_switch(parameters / "enable_device_posted_irqs"),
            )
    return PostedInterrupts(vendor_module=None, apicv=None, device_posted_irqs=None)


def _switch(parameter: Path) -> bool | None:
    # Boolean parameters read Y or N; avic is a number in some releases.
    return {"Y": True, "1": True, "N": False, "0": False}.get((_text(parameter) or "").strip())


def _text(path: Path) -> str | None:
    try:
        return path.read_text("ascii", errors="replace")
    except OSError:
        return None  # missing or forbidden: the callers' answers have a word for that


def _refused(code: int, call: Callable[[], None]) -> bool:
    try:
        call()
    except KernelError as error:
        if error.errno != code:
            raise
        return True
    return False


def _new_eventfd() -> int:
    try:
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    except OSError as error:
        raise kernel_error(error, "eventfd2", "eventfd") from error


@contextlib.contextmanager
def _eventfd() -> Generator[KvmEventfd, None, None]:
    fd = _new_eventfd()
    try:
        eventfd = KvmEventfd(fd)
    finally:
        os.close(fd)
    with eventfd:
        yield eventfd


class _Scene:
    """A throw-away VM with one vCPU and one route to it, and an eventfd that epoll watches."""

    def __init__(self, vm: KvmVm, vcpu: Vcpu, eventfd: KvmEventfd, watch_set: EpollWatchSet) -> None:
        self.vm = vm
        self.vcpu = vcpu
        self.eventfd = eventfd
        self._watch_set = watch_set

    @classmethod
    @contextlib.contextmanager
    def open(cls, *, routed: bool = True, entry: int = 0, stack: int = 0, data: int = 0) -> Generator[Self, None, None]:
        with (
            KvmVm.create() as vm,
            Vcpu(vm, 0, entry=entry, stack=stack, data=data) as vcpu,
            EpollWatchSet() as watch_set,
            _eventfd() as eventfd,
        ):
            if routed:
                route = remapped(destination=0, dm=0, rh=0, vector=_VECTOR, delivery_mode=0, tm=0)
                vm.set_gsi_routing({_GSI: route})
            watch_set.arm(eventfd)
            yield cls(vm, vcpu, eventfd, watch_set)

    def assign(self) -> None:
        self.vm.irqfd_assign(self.eventfd, _GSI)

    def deassign(self) -> None:
        self.vm.irqfd_deassign(self.eventfd, _GSI)

    def look(self) -> EventSeen:
        reported = bool(self._watch_set.harvest(1))
        left = self.eventfd.read()
        # KVM may inject from a work queue, which a deassign waits for; it would also zero the count.
        self.deassign()
        return EventSeen(injected=_VECTOR in self.vcpu.irr(), reported=reported, left=left)
