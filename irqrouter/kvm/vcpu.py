"""A vCPU for real-mode guests, with its local APIC in x2APIC mode: where an interrupt that was delivered can be seen.

A vCPU that never runs shows what arrived in :meth:`Vcpu.irr`. One that runs takes its interrupts, and the guest's
program tells what it saw through memory.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from types import TracebackType
from typing import Final, Self

from irqrouter.errors import CallerError, IrqrouterError, KernelError, SpecError
from irqrouter.kvm.abi import (
    APIC_IRR,
    APIC_ISR,
    APIC_SPIV,
    KVM_EXIT_NAMES,
    KVM_GET_LAPIC,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_MAX_CPUID_ENTRIES,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_STRUCT,
    KVM_RUN,
    KVM_RUN_EXIT_REASON_OFFSET,
    KVM_SET_CPUID2,
    KVM_SET_LAPIC,
    KVM_SET_MP_STATE,
    KVM_SET_REGS,
    KVM_SET_SIGNAL_MASK,
    KVM_SET_SREGS,
    KVM_SIGNAL_MASK_STRUCT,
    kvm_cpuid2,
    kvm_lapic_state,
    kvm_regs,
    kvm_sregs,
)
from irqrouter.kvm.eventfd import kernel_error
from irqrouter.kvm.vm import KvmVm, libc_ioctl, open_kvm

_APIC_BASE_X2APIC: Final = 0xC00  # IA32_APIC_BASE: EN (bit 11) and EXTD (bit 10); Intel SDM vol. 3, "x2APIC Mode"
_CPUID_1_ECX_X2APIC: Final = 1 << 21
_SPIV_ENABLED: Final = 0x1FF  # APIC software enable (bit 8), spurious vector 0xFF
_RFLAGS_FIXED: Final = 0x2  # bit 1 always reads as one
_REAL_MODE_LIMIT: Final = 0xFFFF
_VECTOR_REGISTERS: Final = struct.Struct("<" + "I12x" * 8)  # an IRR or ISR: 32 bits every 16 bytes
_EXIT_REASON: Final = slice(KVM_RUN_EXIT_REASON_OFFSET, KVM_RUN_EXIT_REASON_OFFSET + 4)

# Ends KVM_RUN. It is blocked in the vCPU's thread except inside KVM_RUN, and sent to that thread only; so it interrupts
# KVM_RUN and is never delivered. No handler is needed, hence no main thread, and one that exists is not disturbed.
_KICK: Final = signal.SIGUSR1
_IN_KVM_RUN: Final = KVM_SIGNAL_MASK_STRUCT.pack(8) + struct.pack("<Q", (1 << 64) - 1 ^ 1 << _KICK - 1)


class UnexpectedExitError(IrqrouterError):
    """The guest left ``KVM_RUN`` in a way that needs an answer, and nobody here has one."""


class Vcpu:
    """vCPU ``vcpu_id`` of ``vm``, about to run in real mode at ``entry`` (an offset in code segment 0).

    ``stack`` is SP, in stack segment 0; ``data`` is the base address of DS, a multiple of 16 below 1 MiB. The local
    APIC is in x2APIC mode and software-enabled; interrupts are off until the guest says STI.

    Raises :class:`SpecError` for an address that real mode does not have, :class:`KernelError`, and what
    :func:`~irqrouter.kvm.vm.open_kvm` does.

    The local APIC can be read only while the vCPU is not running: KVM would keep the reader waiting until ``KVM_RUN``
    returns (virt/kvm/kvm_main.c:kvm_vcpu_ioctl). All methods are for one thread at a time, which need not be the main
    one.
    """

    def __init__(self, vm: KvmVm, vcpu_id: int, *, entry: int = 0, stack: int = 0, data: int = 0) -> None:
        self._name = f"vCPU {vcpu_id}"
        self._apic_id = vcpu_id
        for name, value in (("entry", entry), ("stack", stack), ("data >> 4", data >> 4)):
            if not 0 <= value <= _REAL_MODE_LIMIT:
                raise SpecError(self._name, f"{name} {value:#x} must fit 16 bits")
        if data & 0xF:
            raise SpecError(self._name, f"data {data:#x} must be a multiple of 16")
        self._thread: threading.Thread | None = None
        self._stop_requested = False
        self._kicked = threading.Event()
        self._failure: IrqrouterError | None = None
        with contextlib.ExitStack() as undo:
            run_size, cpuid = _kvm_facts()
            self._fd = vm.create_vcpu(vcpu_id)
            undo.callback(self._close_fd)
            self._kvm_run = mmap.mmap(self._fd, run_size)
            undo.callback(self._kvm_run.close)
            self._set_registers(cpuid, entry, stack, data)
            undo.pop_all()

    @property
    def apic_id(self) -> int:
        """The local APIC's x2APIC id, which is the vCPU's (arch/x86/kvm/lapic.c:kvm_x2apic_id)."""
        return self._apic_id

    @property
    def failure(self) -> IrqrouterError | None:
        """What ended the run by itself, if anything did: :meth:`stop` will raise it."""
        return self._failure

    def fileno(self) -> int:
        """The vCPU's descriptor, for ioctls not offered here; -1 once closed."""
        return self._fd

    def irr(self) -> frozenset[int]:
        """The vectors requested and not yet taken (``KVM_GET_LAPIC``). :class:`CallerError` while running."""
        return self._lapic_vectors(APIC_IRR)

    def isr(self) -> frozenset[int]:
        """The vectors in service, that is taken and without EOI yet. :class:`CallerError` while running."""
        return self._lapic_vectors(APIC_ISR)

    def clear_irr(self) -> None:
        """Forget every requested vector (``KVM_SET_LAPIC``). :class:`CallerError` while running.

        What arrives while this runs may be forgotten with them.
        """
        lapic = self._lapic()
        ctypes.memset(ctypes.addressof(lapic) + APIC_IRR, 0, _VECTOR_REGISTERS.size)
        self._ioctl(KVM_SET_LAPIC, "KVM_SET_LAPIC", lapic)

    def start(self) -> None:
        """Run the vCPU on a thread of its own, from where it stopped. :class:`CallerError` while running."""
        self._require_stopped()
        self._stop_requested = False
        self._kicked.clear()
        # A daemon: a vCPU that nobody stops must not keep the process from ending.
        thread = threading.Thread(target=self._run_until_kicked, name=self._name, daemon=True)
        # The thread inherits our mask, so it is born with _KICK blocked; all others are for those who expect them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._thread = thread

    def stop(self) -> None:
        """Stop the vCPU and end its thread; nothing if it is not running.

        Raises :class:`UnexpectedExitError` or :class:`KernelError` if that is what ended the run before.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        assert thread.ident is not None
        self._stop_requested = True
        signal.pthread_kill(thread.ident, _KICK)
        self._kicked.set()
        thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Stop, and close the vCPU's descriptor and shared page. Idempotent. Raises what :meth:`stop` does."""
        try:
            self.stop()
        finally:
            self._kvm_run.close()
            self._close_fd()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _set_registers(self, cpuid: kvm_cpuid2, entry: int, stack: int, data: int) -> None:
        # CPUID first: without its x2APIC bit KVM refuses the APIC base.
        self._ioctl(KVM_SET_CPUID2, "KVM_SET_CPUID2", cpuid)
        sregs = kvm_sregs()
        self._ioctl(KVM_GET_SREGS, "KVM_GET_SREGS", sregs)
        for segment, base in (
            (sregs.cs, 0),
            (sregs.ds, data),
            (sregs.es, 0),
            (sregs.fs, 0),
            (sregs.gs, 0),
            (sregs.ss, 0),
        ):
            segment.base, segment.selector, segment.limit = base, base >> 4, _REAL_MODE_LIMIT
        sregs.apic_base |= _APIC_BASE_X2APIC
        self._ioctl(KVM_SET_SREGS, "KVM_SET_SREGS", sregs)
        lapic = self._lapic()
        struct.pack_into("<I", lapic.regs, APIC_SPIV, _SPIV_ENABLED)
        self._ioctl(KVM_SET_LAPIC, "KVM_SET_LAPIC", lapic)
        self._ioctl(KVM_SET_REGS, "KVM_SET_REGS", kvm_regs(rsp=stack, rip=entry, rflags=_RFLAGS_FIXED))
        self._ioctl(KVM_SET_MP_STATE, "KVM_SET_MP_STATE", KVM_MP_STATE_STRUCT.pack(KVM_MP_STATE_RUNNABLE))
        self._ioctl(KVM_SET_SIGNAL_MASK, "KVM_SET_SIGNAL_MASK", _IN_KVM_RUN)

    def _run_until_kicked(self) -> None:
        try:
            self._run_guest()
        except IrqrouterError as error:
            self._failure = error
        finally:
            # Until the kick is sent this thread must exist: pthread_kill on one that ended is undefined behaviour.
            self._kicked.wait()

    def _run_guest(self) -> None:
        while not self._stop_requested:
            # Not fcntl.ioctl, which is free to retry after EINTR.
            if libc_ioctl(self._fd, KVM_RUN, 0) == 0:
                raise self._unexpected_exit()
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise KernelError(code, "KVM_RUN", self._name)

    def _unexpected_exit(self) -> UnexpectedExitError:
        reason = int.from_bytes(self._kvm_run[_EXIT_REASON], "little")
        name = KVM_EXIT_NAMES.get(reason, f"exit reason {reason}")
        regs = kvm_regs()
        self._ioctl(KVM_GET_REGS, "KVM_GET_REGS", regs)
        return UnexpectedExitError(self._name, f"left KVM_RUN with {name}, rip {regs.rip:#x}")

    def _lapic_vectors(self, offset: int) -> frozenset[int]:
        registers: tuple[int, ...] = _VECTOR_REGISTERS.unpack_from(self._lapic().regs, offset)
        return frozenset(
            32 * index + bit for index, word in enumerate(registers) if word for bit in range(32) if word >> bit & 1
        )

    def _lapic(self) -> kvm_lapic_state:
        self._require_stopped()
        lapic = kvm_lapic_state()
        self._ioctl(KVM_GET_LAPIC, "KVM_GET_LAPIC", lapic)
        return lapic

    def _require_stopped(self) -> None:
        if self._thread is not None:
            raise CallerError(self._name, "is running")

    def _ioctl(self, request: int, call: str, argument: ctypes.Structure | bytes) -> None:
        try:
            fcntl.ioctl(self._fd, request, argument)
        except (OSError, ValueError) as error:
            raise kernel_error(error, call, self._name) from error

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _kvm_facts() -> tuple[int, kvm_cpuid2]:
    """How large ``struct kvm_run`` is, and the CPUID that KVM supports, with x2APIC."""
    cpuid = kvm_cpuid2(nent=KVM_MAX_CPUID_ENTRIES)
    kvm_fd = open_kvm()
    try:
        fcntl.ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid)
        run_size = fcntl.ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0)
    except OSError as error:
        raise kernel_error(error, "KVM_GET_SUPPORTED_CPUID or KVM_GET_VCPU_MMAP_SIZE", "/dev/kvm") from error
    finally:
        os.close(kvm_fd)
    for entry in cpuid.entries[: cpuid.nent]:
        if entry.function == 1:
            entry.ecx |= _CPUID_1_ECX_X2APIC
    return run_size, cpuid
