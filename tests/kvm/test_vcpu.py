"""vCPUs on the real KVM: what arrived, and running a small real-mode guest."""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.kvm.abi import APIC_ID, APIC_ISR, KVM_GET_LAPIC, KVM_SET_LAPIC, kvm_lapic_state
from irqrouter.kvm.vcpu import UnexpectedExitError, Vcpu
from irqrouter.kvm.vm import KvmVm
from irqrouter.x86.msi import Message
from tests.kvm import needs_dev_kvm

pytestmark = [needs_dev_kvm, pytest.mark.usefixtures("nothing_leaks")]

VECTOR = 0x41
MSI = Message(0xFEE00000, VECTOR)
HANDLER, IDLE, COUNTING, WRITING_A_PORT = 0x1000, 0x2000, 0x2100, 0x2200
STACK, DATA = 0x7000, 0x8000


class Guest:
    """A VM with 64 KiB of memory and a few real-mode programs in it. Each counts in the first dword at DATA."""

    def __init__(self, vm: KvmVm, ram: mmap.mmap) -> None:
        self.vm = vm
        self._ram = ram
        ram[VECTOR * 4 : VECTOR * 4 + 4] = struct.pack("<HH", HANDLER, 0)
        count = b"\x66\xff\x06\x00\x00"  # inc dword [0]
        eoi = b"\x66\xb9\x0b\x08\x00\x00\x66\x31\xc0\x66\x31\xd2\x0f\x30"  # mov ecx, 0x80b; xor eax/edx; wrmsr
        for address, code in (
            (HANDLER, count + eoi + b"\xcf"),  # iret
            (IDLE, b"\xfb\xf4\xeb\xfc"),  # sti; hlt; jmp to sti
            (COUNTING, count + b"\xeb\xf9"),  # jmp to count
            (WRITING_A_PORT, b"\xe6\x80"),  # out 0x80, al
        ):
            ram[address : address + len(code)] = code

    def count(self) -> int:
        return int.from_bytes(self._ram[DATA : DATA + 4], "little")

    def vcpu(self, vcpu_id: int = 0, entry: int = IDLE) -> Vcpu:
        return Vcpu(self.vm, vcpu_id, entry=entry, stack=STACK, data=DATA)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with mmap.mmap(-1, 1 << 16) as ram, KvmVm.create() as vm:
        vm.set_user_memory_region(0, 0, len(ram), ctypes.addressof(ctypes.c_char.from_buffer(ram)))
        yield Guest(vm, ram)


def until(condition: Callable[[], bool]) -> None:
    """Guest memory cannot be awaited: look until ``condition``, for ten seconds at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


# --- what arrived ----------------------------------------------------------------------------------------------------


def test_irr_new_vcpu_is_empty(guest: Guest) -> None:
    with guest.vcpu() as vcpu:
        assert (vcpu.irr(), vcpu.isr()) == (frozenset(), frozenset())


def test_irr_delivered_vectors_are_seen_until_cleared(guest: Guest) -> None:
    vectors = {0x10, 0x1F, 0x20, VECTOR, 0x80, 0xFF}
    with guest.vcpu() as vcpu:
        for vector in vectors:
            assert guest.vm.signal_msi(Message(0xFEE00000, vector)) == 1
        assert vcpu.irr() == vectors
        vcpu.clear_irr()
        assert vcpu.irr() == frozenset()
        guest.vm.signal_msi(MSI)
        assert vcpu.irr() == {VECTOR}


def test_irr_of_two_vcpus_is_told_apart(guest: Guest) -> None:
    with guest.vcpu(0) as first, guest.vcpu(1) as second:
        guest.vm.signal_msi(Message(0xFEE00000 | second.apic_id << 12, 0x31))
        assert (first.irr(), second.irr()) == (frozenset(), frozenset({0x31}))


def test_vcpu_with_apic_id_above_255_is_reached_by_it_alone(guest: Guest) -> None:
    with guest.vcpu(300 & 0xFF) as narrow, guest.vcpu(300) as wide:
        assert wide.apic_id == 300
        address = 0xFEE00000 | (300 & 0xFF) << 12 | 300 >> 8 << 40
        assert guest.vm.signal_msi(Message(address, VECTOR)) == 1
        assert (narrow.irr(), wide.irr()) == (frozenset(), frozenset({VECTOR}))


def test_isr_shows_what_the_apic_page_holds_and_survives_clear_irr(guest: Guest) -> None:
    with guest.vcpu() as vcpu:
        # Written as a migration would: whether a guest between interrupt and EOI can be caught is up to the KVM.
        lapic = kvm_lapic_state()
        fcntl.ioctl(vcpu.fileno(), KVM_GET_LAPIC, lapic)
        for vector in (0x20, VECTOR, 0xFF):
            lapic.regs[APIC_ISR + vector // 32 * 16 + vector % 32 // 8] |= 1 << vector % 8
        fcntl.ioctl(vcpu.fileno(), KVM_SET_LAPIC, lapic)
        guest.vm.signal_msi(MSI)
        vcpu.clear_irr()
        assert (vcpu.irr(), vcpu.isr()) == (frozenset(), frozenset({0x20, VECTOR, 0xFF}))


def test_apic_id_is_the_one_in_the_apic_page(guest: Guest) -> None:
    with guest.vcpu(300) as vcpu:
        lapic = kvm_lapic_state()
        fcntl.ioctl(vcpu.fileno(), KVM_GET_LAPIC, lapic)
        assert int.from_bytes(lapic.regs[APIC_ID : APIC_ID + 4], "little") == vcpu.apic_id == 300


# --- running ---------------------------------------------------------------------------------------------------------


def test_running_guest_takes_every_interrupt(guest: Guest) -> None:
    with guest.vcpu() as vcpu:
        vcpu.start()
        for delivered in range(1, 201):
            guest.vm.signal_msi(MSI)
            until(lambda: guest.count() == delivered)  # noqa: B023 - called before the loop goes on
        vcpu.stop()
        assert (vcpu.irr(), vcpu.isr()) == (frozenset(), frozenset())


def test_stop_and_start_continue_where_the_guest_was(guest: Guest) -> None:
    with guest.vcpu(entry=COUNTING) as vcpu:
        for _ in range(20):
            before = guest.count()
            vcpu.start()
            until(lambda: guest.count() > before)  # noqa: B023 - called before the loop goes on
            vcpu.stop()
            stopped = guest.count()
            vcpu.irr()
            assert guest.count() == stopped


def test_stop_right_after_start_ends_the_thread(guest: Guest) -> None:
    with guest.vcpu(entry=COUNTING) as vcpu:
        for _ in range(100):
            vcpu.start()
            vcpu.stop()
        assert threading.active_count() == 1


def test_start_and_stop_from_other_threads_than_the_main_one(guest: Guest) -> None:
    with guest.vcpu() as vcpu:
        for step in (
            vcpu.start,
            lambda: guest.vm.signal_msi(MSI),
            lambda: until(lambda: guest.count() == 1),
            vcpu.stop,
        ):
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
        assert guest.count() == 1
        assert vcpu.isr() == frozenset()  # not running: readable


def test_stop_leaves_the_process_handlers_and_mask_alone(guest: Guest) -> None:
    received: list[int] = []
    handler = signal.signal(signal.SIGUSR1, lambda number, _frame: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with guest.vcpu() as vcpu:
            vcpu.start()
            vcpu.stop()
            vcpu.start()
            os.kill(os.getpid(), signal.SIGUSR1)  # one that is meant for the process goes to the main thread
            until(lambda: bool(received))
            vcpu.stop()
        assert received == [signal.SIGUSR1]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    finally:
        signal.signal(signal.SIGUSR1, handler)


def test_running_vcpu_refuses_to_be_read_or_started(guest: Guest) -> None:
    with guest.vcpu() as vcpu:
        vcpu.start()
        for use in (vcpu.irr, vcpu.isr, vcpu.clear_irr, vcpu.start):
            with pytest.raises(CallerError, match="vCPU 0: is running"):
                use()
        vcpu.stop()
        vcpu.stop()


def test_close_running_vcpu_stops_it(guest: Guest) -> None:
    vcpu = guest.vcpu(entry=COUNTING)
    vcpu.start()
    vcpu.close()
    vcpu.close()
    with pytest.raises(KernelError) as caught:
        vcpu.irr()
    assert caught.value.errno == errno.EBADF


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_unexpected_exit_is_raised_by_stop_once_and_named(guest: Guest) -> None:
    with guest.vcpu(3, entry=WRITING_A_PORT) as vcpu:
        vcpu.start()
        until(lambda: vcpu.failure is not None)
        with pytest.raises(UnexpectedExitError, match="vCPU 3: left KVM_RUN with KVM_EXIT_IO, rip 0x2202"):
            vcpu.stop()
        assert vcpu.failure is None
        vcpu.stop()


def test_unexpected_exit_is_raised_by_close_which_closes_all_the_same(guest: Guest) -> None:
    vcpu = guest.vcpu(entry=WRITING_A_PORT)
    vcpu.start()
    until(lambda: vcpu.failure is not None)
    with pytest.raises(UnexpectedExitError):
        vcpu.close()
    assert vcpu.fileno() == -1
    vcpu.close()


@pytest.mark.parametrize(
    ("where", "value"),
    [("entry", 0x10000), ("entry", -1), ("stack", 0x10000), ("data", 1 << 20), ("data", 8), ("data", -16)],
)
def test_vcpu_outside_real_mode_is_refused(guest: Guest, where: str, value: int) -> None:
    with pytest.raises(SpecError, match=where):
        Vcpu(guest.vm, 0, **{where: value})


def test_vcpu_whose_id_is_taken_raises_eexist(guest: Guest) -> None:
    with guest.vcpu(5):
        with pytest.raises(KernelError, match="vCPU 5: KVM_CREATE_VCPU") as caught:
            guest.vcpu(5)
        assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize("vcpu_id", [-1, 1 << 20, 1 << 40])
def test_vcpu_with_impossible_id_is_refused(guest: Guest, vcpu_id: int) -> None:
    with pytest.raises((KernelError, SpecError), match=f"vCPU {vcpu_id}"):
        guest.vcpu(vcpu_id)
