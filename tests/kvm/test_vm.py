"""The VM on the real KVM: what was delivered is read back from the local APICs."""

import errno
import fcntl
import os
import platform
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from irqrouter.errors import CallerError, IrqrouterError, KernelError, SpecError
from irqrouter.kvm import vm as vm_module
from irqrouter.kvm.eventfd import KvmEventfd
from irqrouter.kvm.port import Vm
from irqrouter.kvm.vcpu import Vcpu
from irqrouter.kvm.vm import (
    ForeignVmError,
    KvmMissingError,
    KvmPermissionError,
    KvmUnsupportedError,
    KvmVm,
    NotAVmError,
    open_kvm,
)
from irqrouter.x86.msi import Message
from tests.kvm import needs_dev_kvm

pytestmark = [needs_dev_kvm, pytest.mark.usefixtures("nothing_leaks")]

GSI = 24
VECTOR = 0x41
NOBODY = Message(0xFEE07000, VECTOR)
RELEASE = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def msi(vector: int) -> Message:
    """An MSI with ``vector`` for the vCPU with id 0."""
    return Message(0xFEE00000, vector)


@pytest.fixture
def vm() -> Iterator[KvmVm]:
    with KvmVm.create() as vm:
        yield vm


@pytest.fixture
def vcpu(vm: KvmVm) -> Iterator[Vcpu]:
    with Vcpu(vm, 0) as vcpu:
        yield vcpu


@pytest.fixture
def eventfd() -> Iterator[KvmEventfd]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with KvmEventfd(fd) as eventfd:
        os.close(fd)
        yield eventfd


def delivered(vm: KvmVm, vcpu: Vcpu, gsi: int) -> frozenset[int]:
    """The vectors that ``gsi`` leads to by the kernel's table, as it is now."""
    vcpu.clear_irr()
    vm.irq_line(gsi, 1)
    return vcpu.irr()


def in_child(action: Callable[[], object]) -> str:
    """``repr`` of what ``action`` raises or returns in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = repr(action())
        except IrqrouterError as error:
            answer = f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 - nothing may escape into the child's copy of pytest
            answer = f"unexpected {error!r}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


# --- creating --------------------------------------------------------------------------------------------------------


def test_create_has_the_limits_of_kvm_and_is_the_ports_vm() -> None:
    with KvmVm.create(pins=48) as vm:
        port: Vm = vm
        assert (port.pins, port.routes_max) == (48, 4096)


@pytest.mark.parametrize("pins", [-1, 4097])
def test_create_with_impossible_pins_is_refused(pins: int) -> None:
    with pytest.raises(CallerError, match=f"{pins} pins"):
        KvmVm.create(pins=pins)


def test_create_without_dev_kvm_raises_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vm_module, "_DEV_KVM", str(tmp_path / "kvm"))
    with pytest.raises(KvmMissingError, match="open failed: ENOENT"):
        KvmVm.create()


def test_create_on_something_else_than_kvm_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_module, "_DEV_KVM", os.devnull)
    with pytest.raises(KernelError, match="/dev/null: KVM_GET_API_VERSION failed: ENOTTY"):
        KvmVm.create()


def test_create_without_permission_raises_permission() -> None:
    if os.geteuid() != 0 or Path("/dev/kvm").stat().st_mode & 0o006:
        pytest.skip("needs root, which can become somebody who may not open /dev/kvm, and such a /dev/kvm")

    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        KvmVm.create().close()

    assert in_child(as_nobody).startswith(f"{KvmPermissionError.__name__}: /dev/kvm: open failed: EACCES")


def test_create_with_another_api_version_raises_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_module, "KVM_API_VERSION", 13)
    with pytest.raises(KvmUnsupportedError, match="KVM API version 12"):
        open_kvm()


@pytest.mark.parametrize("name", ["KVM_CAP_IRQFD", "KVM_CAP_SIGNAL_MSI", "KVM_CAP_SPLIT_IRQCHIP", "KVM_CAP_X2APIC_API"])
def test_create_without_a_capability_names_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(vm_module, name, 0x7FFFFFFF)
    with pytest.raises(KvmUnsupportedError, match=name):
        KvmVm.create()


def test_vm_made_by_somebody_else_is_used_through_a_duplicate(vm: KvmVm, vcpu: Vcpu) -> None:
    with KvmVm(vm.fileno()) as second:
        assert second.fileno() != vm.fileno()
        vm.close()
        assert second.signal_msi(msi(VECTOR)) == 1
    assert vcpu.irr() == {VECTOR}


def test_vm_of_another_descriptor_is_refused(eventfd: KvmEventfd) -> None:
    kvm_fd = open_kvm()
    try:
        for fd in (kvm_fd, eventfd.fileno(), -1, 2**31 - 1, 2**64):
            with pytest.raises(NotAVmError, match=f"descriptor {fd}"):
                KvmVm(fd)
    finally:
        os.close(kvm_fd)


# --- irqfds ----------------------------------------------------------------------------------------------------------


def test_irqfd_signalled_injects_its_route_and_takes_the_count(vm: KvmVm, vcpu: Vcpu, eventfd: KvmEventfd) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    vm.irqfd_assign(eventfd, GSI)
    eventfd.write(3)
    assert (vcpu.irr(), eventfd.read()) == (frozenset({VECTOR}), 0)


def test_irqfd_assigned_is_silent_in_the_watch_set_until_deassigned(vm: KvmVm, vcpu: Vcpu, eventfd: KvmEventfd) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    with vm.watch_set() as watch_set:
        watch_set.arm(eventfd)
        vm.irqfd_assign(eventfd, GSI)
        eventfd.write(1)
        assert (vcpu.irr(), watch_set.harvest(8)) == (frozenset({VECTOR}), [])
        vm.irqfd_deassign(eventfd, GSI)
        vcpu.clear_irr()
        eventfd.write(1)
        assert (vcpu.irr(), watch_set.harvest(8), eventfd.read()) == (frozenset(), [eventfd.fileno()], 1)


def test_irqfd_assigned_on_pending_count_injects_once_without_taking_it(
    vm: KvmVm, vcpu: Vcpu, eventfd: KvmEventfd
) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    eventfd.write(5)
    vm.irqfd_assign(eventfd, GSI)
    assert eventfd.pending()
    vm.irqfd_deassign(eventfd, GSI)  # waits for the injection, which a kernel worker makes
    assert (vcpu.irr(), eventfd.read()) == (frozenset({VECTOR}), 0)


def test_irqfd_deassigned_where_nothing_matches_succeeds(vm: KvmVm, vcpu: Vcpu, eventfd: KvmEventfd) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    vm.irqfd_assign(eventfd, GSI)
    vm.irqfd_deassign(eventfd, GSI + 1)
    eventfd.write(1)
    assert vcpu.irr() == {VECTOR}


def test_irqfd_assigned_twice_in_one_vm_raises_ebusy(vm: KvmVm, eventfd: KvmEventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    with pytest.raises(KernelError, match=f"eventfd {eventfd.fileno()} at gsi {GSI + 1}: KVM_IRQFD failed: EBUSY"):
        vm.irqfd_assign(eventfd, GSI + 1)


@pytest.mark.skipif(RELEASE < (6, 17), reason="before Linux 6.17 two VMs could share an eventfd")
def test_irqfd_of_another_vm_raises_ebusy(vm: KvmVm, eventfd: KvmEventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    with KvmVm.create() as second:
        with pytest.raises(KernelError) as caught:
            second.irqfd_assign(eventfd, GSI)
        assert caught.value.errno == errno.EBUSY
        vm.irqfd_deassign(eventfd, GSI)
        second.irqfd_assign(eventfd, GSI)


@pytest.mark.parametrize("call", [KvmVm.irqfd_assign, KvmVm.irqfd_deassign])
def test_irqfd_of_closed_eventfd_raises_ebadf(
    vm: KvmVm, eventfd: KvmEventfd, call: Callable[[KvmVm, KvmEventfd, int], None]
) -> None:
    eventfd.close()
    with pytest.raises(KernelError) as caught:
        call(vm, eventfd, GSI)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("gsi", [-1, 1 << 32])
def test_irqfd_at_gsi_that_does_not_fit_is_refused(vm: KvmVm, eventfd: KvmEventfd, gsi: int) -> None:
    for call in (vm.irqfd_assign, vm.irqfd_deassign):
        with pytest.raises(SpecError, match=f"gsi {gsi}"):
            call(eventfd, gsi)


# --- routes ----------------------------------------------------------------------------------------------------------


def test_routing_rewrite_moves_an_assigned_irqfd(vm: KvmVm, vcpu: Vcpu, eventfd: KvmEventfd) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    vm.irqfd_assign(eventfd, GSI)
    vm.set_gsi_routing({GSI: msi(0x51)})
    eventfd.write(1)
    assert vcpu.irr() == {0x51}


def test_routing_change_keeps_the_other_routes(vm: KvmVm, vcpu: Vcpu) -> None:
    vm.set_gsi_routing({24: msi(0x24), 25: msi(0x25), 26: msi(0x26)})
    vm.set_gsi_routing({24: None, 26: msi(0x36), 27: msi(0x27)})
    vm.set_gsi_routing({})
    assert [delivered(vm, vcpu, gsi) for gsi in range(24, 29)] == [set(), {0x25}, {0x36}, {0x27}, set()]


def test_routing_dropped_gsi_that_had_no_route_is_nothing(vm: KvmVm, vcpu: Vcpu) -> None:
    vm.set_gsi_routing({GSI: None})
    assert delivered(vm, vcpu, GSI) == set()


def test_routing_of_every_gsi_fits(vm: KvmVm, vcpu: Vcpu) -> None:
    vm.set_gsi_routing({gsi: msi(0x10 + gsi % 0xF0) for gsi in range(vm.routes_max)})
    last = vm.routes_max - 1
    assert delivered(vm, vcpu, 0) == {0x10}
    assert delivered(vm, vcpu, last) == {0x10 + last % 0xF0}
    vm.set_gsi_routing(dict.fromkeys(range(1, last)))
    assert delivered(vm, vcpu, last) == {0x10 + last % 0xF0}


@pytest.mark.parametrize("gsi", [-1, 4096, 1 << 32])
def test_routing_gsi_out_of_range_changes_nothing(vm: KvmVm, vcpu: Vcpu, gsi: int) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    with pytest.raises(CallerError, match=f"gsi {gsi}: must be below 4096"):
        vm.set_gsi_routing({GSI: msi(0x51), gsi: msi(0x52)})
    assert delivered(vm, vcpu, GSI) == {VECTOR}
    vm.set_gsi_routing({})
    assert delivered(vm, vcpu, GSI) == {VECTOR}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Message(0x1_FEE00000, VECTOR), CallerError),
        (Message(0x80_FEE00000, VECTOR), CallerError),
        (Message(1 << 64, VECTOR), SpecError),
        (Message(-1, VECTOR), SpecError),
        (Message(0xFEE00000, 1 << 32), SpecError),
    ],
)
def test_routing_message_that_kvm_refuses_changes_nothing(
    vm: KvmVm, vcpu: Vcpu, message: Message, error: type[IrqrouterError]
) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    with pytest.raises(error):
        vm.set_gsi_routing({GSI: msi(0x51), GSI + 1: message})
    vm.set_gsi_routing({})
    assert delivered(vm, vcpu, GSI) == {VECTOR}


def test_routing_of_x2apic_destination_above_255_reaches_it(vm: KvmVm, vcpu: Vcpu, eventfd: KvmEventfd) -> None:
    with Vcpu(vm, 0x1FF) as wide:
        vm.set_gsi_routing({GSI: Message(0x1 << 40 | 0xFEE00000 | 0xFF << 12, VECTOR)})
        vm.irqfd_assign(eventfd, GSI)
        eventfd.write(1)
        assert (wide.irr(), vcpu.irr()) == (frozenset({VECTOR}), frozenset())


def test_routing_refused_by_the_kernel_leaves_both_tables_as_they_were(vm: KvmVm, vcpu: Vcpu) -> None:
    expected = {24: {0x24}, 25: {0x25}, 26: {0x26}, 27: set[int]()}
    vm.set_gsi_routing({24: msi(0x24), 25: msi(0x25), 26: msi(0x26)})
    kept = fcntl.fcntl(vm.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, vm.fileno(), inheritable=False)  # now KVM_SET_GSI_ROUTING gets ENOTTY
    try:
        with pytest.raises(KernelError, match="KVM_SET_GSI_ROUTING failed: ENOTTY"):
            vm.set_gsi_routing({24: None, 25: msi(0x99), 27: msi(0x27)})
    finally:
        os.dup2(kept, vm.fileno(), inheritable=False)
        os.close(kept)
        os.close(null)
    assert {gsi: delivered(vm, vcpu, gsi) for gsi in expected} == expected
    vm.set_gsi_routing({})  # sends the table remembered here
    assert {gsi: delivered(vm, vcpu, gsi) for gsi in expected} == expected


@pytest.mark.parametrize("seed", range(5))
def test_routing_random_changes_equal_a_dictionary(vm: KvmVm, vcpu: Vcpu, seed: int) -> None:
    choose = random.Random(seed)
    model: dict[int, Message] = {}
    for _ in range(60):
        gsis = choose.sample(range(16), choose.randint(0, 6))
        changes = {gsi: choose.choice([None, msi(choose.randint(0x10, 0xFE))]) for gsi in gsis}
        vm.set_gsi_routing(changes)
        for gsi, message in changes.items():
            model.pop(gsi, None)
            if message is not None:
                model[gsi] = message
    found = {gsi: vectors for gsi in range(16) if (vectors := delivered(vm, vcpu, gsi))}
    assert found == {gsi: {message.data} for gsi, message in model.items()}


def test_routing_changed_from_many_threads_keeps_every_change(vm: KvmVm, vcpu: Vcpu) -> None:
    def change(first: int) -> None:
        gsis = range(first, 64, 4)
        for _ in range(20):
            for gsi in gsis:
                vm.set_gsi_routing({gsi: msi(0x10 + gsi)})
            for gsi in gsis[::2]:
                vm.set_gsi_routing({gsi: None})

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places in the middle of everything
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(change, range(4)))
    finally:
        sys.setswitchinterval(interval)
    found = {gsi for gsi in range(64) if delivered(vm, vcpu, gsi) == {0x10 + gsi}}
    assert found == {gsi for gsi in range(64) if gsi // 4 % 2}
    assert all(delivered(vm, vcpu, gsi) == set() for gsi in range(64) if gsi not in found)


# --- delivering now --------------------------------------------------------------------------------------------------


def test_signal_msi_counts_who_took_it(vm: KvmVm, vcpu: Vcpu) -> None:
    assert (vm.signal_msi(msi(VECTOR)), vm.signal_msi(NOBODY)) == (1, 0)
    assert vcpu.irr() == {VECTOR}


def test_signal_msi_before_the_first_vcpu_is_taken_by_nobody(vm: KvmVm) -> None:
    assert vm.signal_msi(msi(VECTOR)) == 0


@pytest.mark.parametrize("message", [Message(1 << 64, 0x41), Message(-1, 0x41), Message(0xFEE00000, 1 << 32)])
def test_signal_msi_that_does_not_fit_is_refused(vm: KvmVm, message: Message) -> None:
    with pytest.raises(SpecError, match="MSI"):
        vm.signal_msi(message)


def test_signal_msi_with_reserved_address_bits_raises_einval(vm: KvmVm) -> None:
    with pytest.raises(KernelError, match="MSI 00000001:FEE00000/00000041: KVM_SIGNAL_MSI failed: EINVAL"):
        vm.signal_msi(Message(0x1_FEE00000, 0x41))


def test_irq_line_low_delivers_nothing(vm: KvmVm, vcpu: Vcpu) -> None:
    vm.set_gsi_routing({GSI: msi(VECTOR)})
    vm.irq_line(GSI, 0)
    assert vcpu.irr() == set()


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda vm, eventfd: vm.irqfd_assign(eventfd, GSI),
        lambda vm, eventfd: vm.irqfd_deassign(eventfd, GSI),
        lambda vm, _eventfd: vm.set_gsi_routing({GSI: msi(VECTOR)}),
        lambda vm, _eventfd: vm.signal_msi(msi(VECTOR)),
        lambda vm, _eventfd: KvmVm(vm.fileno()),
    ],
    ids=["assign", "deassign", "routing", "signal_msi", "open"],
)
def test_vm_used_by_a_forked_child_says_whose_it_is(
    vm: KvmVm, eventfd: KvmEventfd, use: Callable[[KvmVm, KvmEventfd], object]
) -> None:
    answer = in_child(lambda: use(vm, eventfd))
    assert answer.startswith(f"{ForeignVmError.__name__}: ")
    assert "EIO" in answer
    assert "the VM belongs to another process" in answer


def test_vm_closed_answers_ebadf(vm: KvmVm, eventfd: KvmEventfd) -> None:
    vm.close()
    vm.close()
    assert vm.fileno() == -1
    uses: list[Callable[[], object]] = [
        lambda: vm.irqfd_assign(eventfd, GSI),
        lambda: vm.irqfd_deassign(eventfd, GSI),
        lambda: vm.set_gsi_routing({GSI: msi(VECTOR)}),
        lambda: vm.signal_msi(msi(VECTOR)),
        lambda: vm.irq_line(GSI, 1),
        lambda: vm.create_vcpu(0),
    ]
    for use in uses:
        with pytest.raises(KernelError) as caught:
            use()
        assert caught.value.errno == errno.EBADF


def test_memory_that_is_not_page_aligned_raises_einval(vm: KvmVm) -> None:
    with pytest.raises(KernelError, match="memory slot 3: KVM_SET_USER_MEMORY_REGION failed: EINVAL"):
        vm.set_user_memory_region(3, 0, 100, 0)


def test_memory_that_does_not_fit_is_refused(vm: KvmVm) -> None:
    with pytest.raises(SpecError, match="memory slot 0"):
        vm.set_user_memory_region(0, 1 << 64, 4096, 0)
