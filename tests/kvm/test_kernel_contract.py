"""What irqrouter relies on in a kernel, checked on the real one and on the simulated one alike."""

import contextlib
import errno
import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest

from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.kvm.port import BlockingEventfdError, Eventfd, NotAnEventfdError, SemaphoreEventfdError, Vm, WatchSet
from irqrouter.x86.msi import Message, remapped
from tests.kvm.conftest import VCPUS, Bench, errno_of, message

GSI, OTHER_GSI = 24, 25
BROADCAST = 0xFFFFFFFF
COUNT_MAX = 2**64 - 2
NOBODY: set[int] = set()


@pytest.fixture
def vm(bench: Bench) -> Vm:
    """The guest's VM, with GSI 24 at APIC 1, vector 41h, and GSI 25 at APIC 0, vector 42h."""
    bench.guest.vm.set_gsi_routing({GSI: message(1, 0x41), OTHER_GSI: message(0, 0x42)})
    return bench.guest.vm


@pytest.fixture
def fd(bench: Bench) -> int:
    """An eventfd as the VMM has it."""
    return bench.eventfd()


@pytest.fixture
def eventfd(vm: Vm, fd: int) -> Iterator[Eventfd]:
    """Our duplicate of it."""
    eventfd = vm.adopt(fd)
    yield eventfd
    eventfd.close()


@pytest.fixture
def watch(vm: Vm) -> Iterator[WatchSet]:
    watch = vm.watch_set()
    yield watch
    watch.close()


def refused(action: Callable[[], object]) -> int:
    """The errno that ``action`` must fail with."""
    with pytest.raises(KernelError) as caught:
        action()
    return caught.value.errno


def wakes(watch: WatchSet) -> bool:
    """Whether a loop that watches the set would wake up."""
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    return bool(poll.poll(0))


# --- an assigned irqfd -----------------------------------------------------------------------------------------------


def test_signal_while_assigned_is_injected_and_drained(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    bench.signal(fd, 3)
    assert bench.guest.delivered() == {(1, 0x41)}
    assert bench.count(fd) == 0
    assert eventfd.read() == 0


def test_signal_while_assigned_wakes_no_watcher(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet
) -> None:
    watch.arm(eventfd)
    vm.irqfd_assign(eventfd, GSI)
    looking, done = threading.Event(), threading.Event()
    woken: list[bool] = []

    def look() -> None:
        looking.set()
        while not done.is_set():
            if wakes(watch):  # were it for a moment
                woken.append(True)

    loop = threading.Thread(target=look)
    loop.start()
    try:
        assert looking.wait(10)
        for _ in range(2000):
            bench.signal(fd)
    finally:
        done.set()
        loop.join()
    assert woken == []
    assert watch.harvest(8) == []
    assert bench.guest.delivered() == {(1, 0x41)}


def test_write_of_zero_while_assigned_is_injected(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    bench.signal(fd, 0)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_our_own_write_while_assigned_is_injected(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    eventfd.write(1)
    assert bench.guest.delivered() == {(1, 0x41)}
    assert bench.count(fd) == 0


def test_device_signal_while_assigned_is_injected(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    fire = bench.trigger(fd)
    vm.irqfd_assign(eventfd, GSI)
    fire()
    assert bench.guest.delivered() == {(1, 0x41)}


def test_several_eventfds_at_one_gsi_are_all_injected(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    other_fd = bench.eventfd()
    with contextlib.closing(vm.adopt(other_fd)) as other:
        vm.irqfd_assign(eventfd, GSI)
        vm.irqfd_assign(other, GSI)
        for each in fd, other_fd:
            bench.signal(each)
            assert bench.guest.delivered() == {(1, 0x41)}


def test_broadcast_while_assigned_is_injected_by_deferred_work(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.set_gsi_routing({GSI: message(BROADCAST, 0x50)})
    vm.irqfd_assign(eventfd, GSI)
    bench.signal(fd)
    assert bench.count(fd) == 0
    bench.settle()
    assert bench.guest.delivered() == {(apic_id, 0x50) for apic_id in VCPUS}


# --- a count pending at assign ---------------------------------------------------------------------------------------


def test_count_pending_at_assign_is_injected_once_and_stays(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    bench.signal(fd, 5)
    vm.irqfd_assign(eventfd, GSI)
    bench.settle()
    assert bench.guest.delivered() == {(1, 0x41)}
    assert bench.count(fd) == 5
    bench.settle()
    assert bench.guest.delivered() == set()


def test_count_pending_at_assign_is_reported_to_watchers(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet
) -> None:
    bench.signal(fd)
    vm.irqfd_assign(eventfd, GSI)
    watch.arm(eventfd)
    assert watch.harvest(8) == [eventfd.fileno()]


def test_count_pending_at_assign_goes_with_the_next_signal(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet
) -> None:
    bench.signal(fd, 5)
    vm.irqfd_assign(eventfd, GSI)
    watch.arm(eventfd)
    bench.settle()
    assert bench.guest.delivered() == {(1, 0x41)}
    bench.signal(fd)
    assert bench.guest.delivered() == {(1, 0x41)}
    assert bench.count(fd) == 0
    assert not wakes(watch)


def test_count_pending_at_assign_can_be_discarded_by_a_read(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    bench.signal(fd, 5)
    vm.irqfd_assign(eventfd, GSI)
    assert eventfd.read() == 5
    bench.settle()
    assert bench.guest.delivered() == {(1, 0x41)}
    bench.signal(fd)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_count_pending_at_assign_without_route_is_lost(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    bench.signal(fd)
    vm.irqfd_assign(eventfd, 30)
    bench.settle()
    vm.set_gsi_routing({30: message(0, 0x60)})
    bench.settle()
    vm.irqfd_deassign(eventfd, 30)
    assert bench.guest.delivered() == set()
    assert bench.count(fd) == 0


# --- without a route -------------------------------------------------------------------------------------------------


def test_signal_without_route_is_consumed_and_lost(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, 30)
    bench.signal(fd)
    bench.settle()
    vm.set_gsi_routing({30: message(0, 0x60)})
    bench.settle()
    assert bench.guest.delivered() == set()
    assert bench.count(fd) == 0


def test_route_dropped_under_a_live_irqfd_loses_the_next_signal(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd
) -> None:
    vm.irqfd_assign(eventfd, GSI)
    vm.set_gsi_routing({GSI: None})
    bench.signal(fd)
    bench.settle()
    assert bench.guest.delivered() == set()
    assert bench.count(fd) == 0


def test_route_installed_under_a_live_irqfd_serves_the_next_signal(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd
) -> None:
    vm.irqfd_assign(eventfd, 30)
    vm.set_gsi_routing({30: message(0, 0x60)})
    bench.signal(fd)
    assert bench.guest.delivered() == {(0, 0x60)}


# --- EBUSY -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gsi", [GSI, OTHER_GSI])
def test_second_irqfd_of_the_vm_on_an_eventfd_is_busy(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, gsi: int
) -> None:
    vm.irqfd_assign(eventfd, GSI)
    assert refused(lambda: vm.irqfd_assign(eventfd, gsi)) == errno.EBUSY
    bench.signal(fd)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_second_irqfd_through_a_duplicate_is_busy(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    with contextlib.closing(vm.adopt(bench.dup(fd))) as twin:
        assert refused(lambda: vm.irqfd_assign(twin, OTHER_GSI)) == errno.EBUSY


def test_irqfd_of_another_vm_on_an_eventfd_is_busy(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    if not bench.exclusive:
        pytest.skip("this kernel lets irqfds of two VMs share an eventfd, as Linux did before 6.17")
    neighbour = bench.neighbour.vm
    neighbour.set_gsi_routing({GSI: message(0, 0x77)})
    vm.irqfd_assign(eventfd, GSI)
    with contextlib.closing(neighbour.adopt(fd)) as theirs:
        bench.signal(fd)
        assert refused(lambda: neighbour.irqfd_assign(theirs, GSI)) == errno.EBUSY
        bench.signal(fd)
        assert (bench.guest.delivered(), bench.neighbour.delivered()) == ({(1, 0x41)}, set())
        vm.irqfd_deassign(eventfd, GSI)
        neighbour.irqfd_assign(theirs, GSI)
        bench.signal(fd)
        assert (bench.guest.delivered(), bench.neighbour.delivered()) == (set(), {(0, 0x77)})


def test_busy_assign_with_a_pending_count_injects_nothing(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    bench.signal(fd, 2)
    vm.irqfd_assign(eventfd, OTHER_GSI)
    bench.settle()
    assert bench.guest.delivered() == {(0, 0x42)}
    assert refused(lambda: vm.irqfd_assign(eventfd, GSI)) == errno.EBUSY
    bench.settle()
    assert bench.guest.delivered() == set()
    assert bench.count(fd) == 2


# --- deassign --------------------------------------------------------------------------------------------------------


def test_event_after_deassign_is_left_for_userspace(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet
) -> None:
    vm.irqfd_assign(eventfd, GSI)
    watch.arm(eventfd)
    vm.irqfd_deassign(eventfd, GSI)
    assert not wakes(watch)
    bench.signal(fd, 2)
    assert wakes(watch)
    assert watch.harvest(8) == [eventfd.fileno()]
    assert eventfd.read() == 2
    bench.settle()
    assert bench.guest.delivered() == set()


@pytest.mark.parametrize("gsi", [OTHER_GSI, 30, 4095, 4096, 2**32 - 1])
def test_deassign_of_another_gsi_succeeds_and_changes_nothing(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, gsi: int
) -> None:
    bench.signal(fd, 3)
    vm.irqfd_assign(eventfd, GSI)
    bench.settle()
    bench.guest.delivered()
    vm.irqfd_deassign(eventfd, gsi)
    assert bench.count(fd) == 3
    bench.signal(fd)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_deassign_by_another_vm_succeeds_and_changes_nothing(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    bench.neighbour.vm.irqfd_deassign(eventfd, GSI)
    bench.signal(fd)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_deassign_of_what_was_never_assigned_keeps_the_count(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    bench.signal(fd, 4)
    vm.irqfd_deassign(eventfd, GSI)
    assert eventfd.read() == 4


def test_deassign_zeroes_what_was_pending_at_assign(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet
) -> None:
    bench.signal(fd, 5)
    watch.arm(eventfd)
    vm.irqfd_assign(eventfd, GSI)
    vm.irqfd_deassign(eventfd, GSI)
    assert bench.count(fd) == 0
    assert not wakes(watch)


def test_deassign_returns_when_the_pending_count_was_injected(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    bench.signal(fd)
    vm.irqfd_assign(eventfd, GSI)
    vm.irqfd_deassign(eventfd, GSI)
    assert bench.guest.delivered() == {(1, 0x41)}  # without settling
    bench.settle()
    assert bench.guest.delivered() == set()


def test_deassign_returns_when_a_deferred_injection_was_made(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.set_gsi_routing({GSI: message(BROADCAST, 0x50)})
    vm.irqfd_assign(eventfd, GSI)
    bench.signal(fd)
    vm.irqfd_deassign(eventfd, GSI)
    assert bench.guest.delivered() == {(apic_id, 0x50) for apic_id in VCPUS}
    bench.settle()
    assert bench.guest.delivered() == set()


def test_deassign_then_assign_elsewhere_moves_the_interrupt(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    vm.irqfd_deassign(eventfd, GSI)
    vm.irqfd_assign(eventfd, OTHER_GSI)
    bench.signal(fd)
    assert bench.guest.delivered() == {(0, 0x42)}


# --- descriptors -----------------------------------------------------------------------------------------------------


def test_deassign_through_another_duplicate_takes_effect(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    with contextlib.closing(vm.adopt(bench.dup(fd))) as twin:
        assert twin.identity == eventfd.identity
        assert twin.fileno() != eventfd.fileno()
        vm.irqfd_deassign(twin, GSI)
        bench.signal(fd)
        assert twin.read() == 1
    assert bench.guest.delivered() == set()


def test_irqfd_outlives_the_descriptor_we_were_given(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    bench.close(fd)
    eventfd.write(1)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_reused_number_is_another_eventfd(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    bench.close(fd)
    reused = bench.eventfd()
    assert reused == fd
    bench.signal(reused)
    assert bench.guest.delivered() == set()
    with contextlib.closing(vm.adopt(reused)) as stranger:
        assert stranger.identity != eventfd.identity
        vm.irqfd_deassign(stranger, GSI)
        assert stranger.read() == 1
    eventfd.write(1)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_last_close_detaches_the_irqfd(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    while_open, afterwards = bench.trigger(fd), bench.trigger(fd)
    vm.irqfd_assign(eventfd, GSI)
    bench.close(fd)
    while_open()
    assert bench.guest.delivered() == {(1, 0x41)}
    eventfd.close()
    afterwards()
    bench.settle()
    assert bench.guest.delivered() == set()


def test_closed_eventfd_is_refused(vm: Vm, eventfd: Eventfd, watch: WatchSet) -> None:
    eventfd.close()
    eventfd.close()
    assert eventfd.fileno() == -1
    for action in (
        eventfd.read,
        eventfd.pending,
        lambda: eventfd.write(1),
        lambda: vm.irqfd_assign(eventfd, GSI),
        lambda: vm.irqfd_deassign(eventfd, GSI),
    ):
        assert refused(action) == errno.EBADF
    watch.arm(eventfd)
    assert watch.harvest(8) == []


def test_eventfd_count_is_taken_whole_and_asked_without_taking(bench: Bench, fd: int, eventfd: Eventfd) -> None:
    assert not eventfd.pending()
    assert eventfd.read() == 0
    bench.signal(fd, 2)
    eventfd.write(3)
    assert eventfd.pending()
    assert bench.count(fd) == 5
    assert eventfd.read() == 5
    assert not eventfd.pending()


def test_full_eventfd_refuses_one_more(bench: Bench, fd: int, eventfd: Eventfd) -> None:
    eventfd.write(COUNT_MAX)
    assert refused(lambda: eventfd.write(1)) == errno.EAGAIN
    assert eventfd.read() == COUNT_MAX
    assert bench.count(fd) == 0


@pytest.mark.parametrize("count", [-1, COUNT_MAX + 1, 2**64])
def test_write_of_what_no_eventfd_holds_is_a_spec_error(eventfd: Eventfd, count: int) -> None:
    with pytest.raises(SpecError):
        eventfd.write(count)
    assert eventfd.read() == 0


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (os.EFD_NONBLOCK | os.EFD_SEMAPHORE, SemaphoreEventfdError),
        (os.EFD_SEMAPHORE, SemaphoreEventfdError),
        (0, BlockingEventfdError),
    ],
)
def test_adopting_an_unfit_eventfd_is_refused_and_leaves_nothing_open(
    bench: Bench, vm: Vm, flags: int, error: type[CallerError]
) -> None:
    unfit = bench.eventfd(flags=flags | os.EFD_CLOEXEC)
    before = bench.descriptors()
    with pytest.raises(error, match=str(unfit)):
        vm.adopt(unfit)
    assert bench.descriptors() == before


def test_adopting_a_closed_descriptor_is_refused(bench: Bench, vm: Vm, fd: int) -> None:
    bench.close(fd)
    for number in (fd, -1, 2**31):
        with pytest.raises(NotAnEventfdError, match=str(number)):
            vm.adopt(number)


# --- routes ----------------------------------------------------------------------------------------------------------


def test_route_rewrite_takes_effect_on_a_live_irqfd(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    vm.set_gsi_routing({GSI: message(0, 0x51)})
    bench.signal(fd)
    assert bench.guest.delivered() == {(0, 0x51)}


def test_route_rewrite_leaves_other_routes(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.set_gsi_routing({OTHER_GSI: None, 100: message(0, 0x52)})
    vm.irqfd_assign(eventfd, GSI)
    bench.signal(fd)
    assert bench.guest.delivered() == {(1, 0x41)}


def test_routes_of_one_vm_are_no_other_vms(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    bench.neighbour.vm.set_gsi_routing({GSI: message(0, 0x77)})
    vm.irqfd_assign(eventfd, GSI)
    bench.signal(fd)
    assert (bench.guest.delivered(), bench.neighbour.delivered()) == ({(1, 0x41)}, set())


@pytest.mark.parametrize(
    ("gsi", "route", "error"),
    [
        (4096, message(0, 0x60), CallerError),
        (4096, None, CallerError),
        (-1, message(0, 0x60), CallerError),
        (26, Message(0x1_FEE0_0000, 0x60), CallerError),
        (26, Message(0x80_FEE0_0000, 0x60), CallerError),
        (26, Message(1 << 64, 0x60), SpecError),
        (26, Message(0xFEE0_0000, 1 << 32), SpecError),
    ],
)
def test_table_with_one_bad_route_leaves_the_old_routes_delivering(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, gsi: int, route: Message | None, error: type[Exception]
) -> None:
    vm.irqfd_assign(eventfd, GSI)
    with pytest.raises(error):
        vm.set_gsi_routing({GSI: message(0, 0x51), OTHER_GSI: None, gsi: route})
    bench.signal(fd)
    assert bench.guest.delivered() == {(1, 0x41)}
    vm.irqfd_deassign(eventfd, GSI)
    vm.irqfd_assign(eventfd, OTHER_GSI)
    vm.set_gsi_routing({100: message(0, 0x52)})  # what was refused is not in the next table either
    bench.signal(fd)
    assert bench.guest.delivered() == {(0, 0x42)}


def test_table_takes_as_many_routes_as_there_are_gsis(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    assert vm.pins == 24
    assert vm.routes_max == 4096
    vm.set_gsi_routing({gsi: message(gsi % 2, 0x20 + gsi % 200) for gsi in range(4096)})
    for gsi in (0, 23, 24, 4095):
        vm.irqfd_assign(eventfd, gsi)
        bench.signal(fd)
        assert bench.guest.delivered() == {(gsi % 2, 0x20 + gsi % 200)}
        vm.irqfd_deassign(eventfd, gsi)


def test_table_may_be_emptied(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    vm.set_gsi_routing({GSI: None, OTHER_GSI: None, 99: None})
    bench.signal(fd)
    bench.settle()
    assert bench.guest.delivered() == set()


@pytest.mark.parametrize("gsi", [-1, 2**32])
def test_irqfd_at_what_is_no_gsi_is_a_spec_error(vm: Vm, eventfd: Eventfd, gsi: int) -> None:
    for call in (vm.irqfd_assign, vm.irqfd_deassign):
        with pytest.raises(SpecError):
            call(eventfd, gsi)


# --- KVM_SIGNAL_MSI, and where messages go ---------------------------------------------------------------------------


def to(destination: int, *, vector: int = 0x60, dm: int = 0, rh: int = 0, delivery_mode: int = 0) -> Message:
    return remapped(destination=destination, dm=dm, rh=rh, vector=vector, delivery_mode=delivery_mode, tm=0)


# Logical destinations: a cluster of 16 APIC ids in bits 31:16, a mask of them in bits 15:0.
@pytest.mark.parametrize(
    ("msi", "targets"),
    [
        pytest.param(to(1), {1}, id="physical"),
        pytest.param(to(300), {300}, id="physical above 255"),
        pytest.param(to(2), NOBODY, id="physical, nobody's"),
        pytest.param(to(1000), NOBODY, id="physical, above all"),
        pytest.param(to(0xFF), NOBODY, id="physical FFh is no broadcast in x2APIC mode"),
        pytest.param(to(BROADCAST), set(VCPUS), id="broadcast"),
        pytest.param(to(BROADCAST, dm=1), set(VCPUS), id="logical broadcast"),
        pytest.param(to(0b1011, dm=1), {0, 1, 3}, id="logical"),
        pytest.param(to(0xFFFF, dm=1), {0, 1, 3}, id="logical, a whole cluster"),
        pytest.param(to(18 << 16 | 1 << 12, dm=1), {300}, id="logical, cluster 18"),
        pytest.param(to(100 << 16 | 1, dm=1), NOBODY, id="logical, a cluster above all"),
        pytest.param(to(0, dm=1), NOBODY, id="logical, empty mask"),
        pytest.param(to(1, delivery_mode=1), {1}, id="lowest priority, physical"),
        pytest.param(to(1, rh=1), {1}, id="redirection hint, physical"),
        pytest.param(to(0b1011, dm=1, delivery_mode=1, vector=0x60), {0}, id="lowest priority, 60h mod 3 = 0"),
        pytest.param(to(0b1011, dm=1, delivery_mode=1, vector=0x61), {1}, id="lowest priority, 61h mod 3 = 1"),
        pytest.param(to(0b1011, dm=1, delivery_mode=1, vector=0x62), {3}, id="lowest priority, 62h mod 3 = 2"),
        pytest.param(to(0b1011, dm=1, rh=1, vector=0x62), {3}, id="redirection hint, 62h mod 3 = 2"),
        pytest.param(to(0b1111, dm=1, delivery_mode=1, vector=0x62), NOBODY, id="lowest priority picks one who is not"),
        pytest.param(
            to(18 << 16 | 0xFFFF, dm=1, delivery_mode=1, vector=0x67), {300}, id="lowest priority, 67h mod 13 = 12"
        ),
        pytest.param(to(BROADCAST, delivery_mode=1, vector=0x63), {300}, id="lowest priority, broadcast"),
        pytest.param(to(0, vector=0), {0}, id="vector 0"),
        pytest.param(to(0, vector=0xFF), {0}, id="vector FFh"),
        pytest.param(Message(0x0000_1000, 0x60), {1}, id="KVM does not look at FEEh"),
    ],
)
def test_signal_msi_reaches_whom_the_message_names_and_counts_them(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, msi: Message, targets: set[int]
) -> None:
    expected = {(apic_id, msi.data & 0xFF) for apic_id in targets}
    assert vm.signal_msi(msi) == len(targets)
    assert bench.guest.delivered() == expected
    assert bench.neighbour.delivered() == set()
    # An irqfd with this route reaches the same.
    vm.set_gsi_routing({GSI: msi})
    vm.irqfd_assign(eventfd, GSI)
    bench.signal(fd)
    bench.settle()
    assert bench.guest.delivered() == expected


@pytest.mark.parametrize(("delivery_mode", "taken"), [(4, 1), (5, 1), (6, 1), (7, 0)])
def test_signal_msi_of_no_vector_sets_no_irr_bit(bench: Bench, vm: Vm, delivery_mode: int, taken: int) -> None:
    assert vm.signal_msi(to(1, delivery_mode=delivery_mode)) == taken
    assert bench.guest.delivered() == set()


def test_signal_msi_coalesces_in_the_irr(bench: Bench, vm: Vm) -> None:
    assert [vm.signal_msi(to(1)), vm.signal_msi(to(1))] == [1, 1]
    assert bench.guest.delivered() == {(1, 0x60)}
    assert bench.guest.delivered() == set()


def test_signal_msi_needs_no_route(bench: Bench, vm: Vm) -> None:
    vm.set_gsi_routing({GSI: None, OTHER_GSI: None})
    assert vm.signal_msi(to(3)) == 1
    assert bench.guest.delivered() == {(3, 0x60)}


def test_signal_msi_with_reserved_address_bits_is_refused(bench: Bench, vm: Vm) -> None:
    assert refused(lambda: vm.signal_msi(Message(0x1_FEE0_0000, 0x60))) == errno.EINVAL
    for msi in Message(1 << 64, 0), Message(-1, 0), Message(0xFEE0_0000, 1 << 32):
        with pytest.raises(SpecError):
            vm.signal_msi(msi)
    assert bench.guest.delivered() == set()


# --- the watch set ---------------------------------------------------------------------------------------------------


def test_watch_reports_once_until_armed_again(bench: Bench, fd: int, eventfd: Eventfd, watch: WatchSet) -> None:
    watch.arm(eventfd)
    assert not wakes(watch)
    bench.signal(fd)
    assert wakes(watch)
    assert watch.harvest(8) == [eventfd.fileno()]
    bench.signal(fd)
    assert not wakes(watch)
    assert watch.harvest(8) == []
    watch.arm(eventfd)  # polls: what is pending is reported
    assert wakes(watch)
    assert watch.harvest(8) == [eventfd.fileno()]
    assert eventfd.read() == 2
    watch.arm(eventfd)
    assert not wakes(watch)
    bench.signal(fd)
    assert watch.harvest(8) == [eventfd.fileno()]


def test_watch_forgets_what_was_read_meanwhile(bench: Bench, fd: int, eventfd: Eventfd, watch: WatchSet) -> None:
    watch.arm(eventfd)
    bench.signal(fd)
    assert eventfd.read() == 1
    assert not wakes(watch)
    assert watch.harvest(8) == []
    bench.signal(fd)  # and it is still armed
    assert watch.harvest(8) == [eventfd.fileno()]


def test_watch_reports_a_write_of_zero_to_nobody(bench: Bench, fd: int, eventfd: Eventfd, watch: WatchSet) -> None:
    watch.arm(eventfd)
    bench.signal(fd, 0)
    assert watch.harvest(8) == []


def test_watch_harvests_at_most_the_limit_and_keeps_the_rest(bench: Bench, vm: Vm, watch: WatchSet) -> None:
    fds = [bench.eventfd(1) for _ in range(5)]
    with contextlib.ExitStack() as stack:
        eventfds = [stack.enter_context(contextlib.closing(vm.adopt(fd))) for fd in fds]
        for eventfd in eventfds:
            watch.arm(eventfd)
        first = watch.harvest(2)
        assert len(first) == 2
        assert wakes(watch)
        rest = watch.harvest(8)
        assert sorted(first + rest) == sorted(eventfd.fileno() for eventfd in eventfds)
        assert not wakes(watch)


@pytest.mark.parametrize("limit", [0, -1])
def test_watch_harvest_of_less_than_one_is_refused(watch: WatchSet, limit: int) -> None:
    with pytest.raises(CallerError):
        watch.harvest(limit)


def test_watch_forgets_an_eventfd_before_it_closes(bench: Bench, fd: int, eventfd: Eventfd, watch: WatchSet) -> None:
    watch.arm(eventfd)
    bench.signal(fd)
    eventfd.close()
    assert not wakes(watch)
    bench.signal(fd)  # the file lives on in the VMM's descriptor
    assert not wakes(watch)
    assert watch.harvest(8) == []


def test_watch_of_a_reused_number_is_not_its_former_owners(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet
) -> None:
    other_fd = bench.eventfd()
    number = eventfd.fileno()
    watch.arm(eventfd)
    eventfd.close()
    with contextlib.closing(vm.adopt(other_fd)) as other:
        assert other.fileno() == number
        bench.signal(fd)
        bench.signal(other_fd)
        assert watch.harvest(8) == []
        watch.arm(other)
        assert watch.harvest(8) == [number]


def test_watch_in_a_second_set_is_refused(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet) -> None:
    watch.arm(eventfd)
    with contextlib.closing(vm.watch_set()) as second, pytest.raises(CallerError):
        second.arm(eventfd)
    bench.signal(fd)
    assert watch.harvest(8) == [eventfd.fileno()]


def test_watch_closed_frees_its_eventfds(bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet) -> None:
    watch.arm(eventfd)
    watch.close()
    watch.close()
    assert watch.fileno() == -1
    assert refused(lambda: watch.harvest(1)) == errno.EBADF
    assert refused(lambda: watch.arm(eventfd)) == errno.EBADF
    with contextlib.closing(vm.watch_set()) as second:
        second.arm(eventfd)
        bench.signal(fd)
        assert second.harvest(8) == [eventfd.fileno()]


# --- another process -------------------------------------------------------------------------------------------------


def test_ioctls_from_another_process_are_refused_and_do_nothing(bench: Bench, vm: Vm, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    in_another_process = bench.guest.errno_in_another_process
    assert in_another_process(lambda vm: vm.irqfd_assign(eventfd, GSI)) == errno.EIO
    assert in_another_process(lambda vm: vm.irqfd_deassign(eventfd, GSI)) == errno.EIO
    assert in_another_process(lambda vm: vm.set_gsi_routing({GSI: None})) == errno.EIO
    assert in_another_process(lambda vm: vm.signal_msi(to(1))) == errno.EIO
    assert bench.guest.delivered() == set()
    assert in_another_process(lambda _: eventfd.write(1)) == 0
    assert bench.guest.delivered() == {(1, 0x41)}


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_catch_and_reassign_loses_and_repeats_nothing(
    bench: Bench, vm: Vm, fd: int, eventfd: Eventfd, watch: WatchSet
) -> None:
    vm.irqfd_assign(eventfd, GSI)
    watch.arm(eventfd)
    for vector in range(0x60, 0x70):
        bench.signal(fd)
        assert bench.guest.delivered() == {(1, vector - 1 if vector > 0x60 else 0x41)}
        vm.irqfd_deassign(eventfd, GSI)
        bench.signal(fd)
        assert watch.harvest(8) == [eventfd.fileno()]
        assert eventfd.read() == 1
        assert vm.signal_msi(to(1, vector=vector)) == 1
        vm.set_gsi_routing({GSI: to(1, vector=vector)})
        vm.irqfd_assign(eventfd, GSI)
        assert eventfd.read() == 0
        watch.arm(eventfd)
        bench.settle()
        assert bench.guest.delivered() == {(1, vector)}
    assert errno_of(lambda: vm.irqfd_deassign(eventfd, GSI)) == 0
    assert bench.count(fd) == 0
