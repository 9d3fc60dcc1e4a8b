"""What only the simulated kernel has, and a comparison of the two kernels on random histories."""

import asyncio
import contextlib
import errno
import functools
import os
import select
import threading
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irqrouter.errors import CallerError, IrqrouterError, KernelError, SpecError
from irqrouter.kvm.eventfd import EpollWatchSet, KvmEventfd
from irqrouter.kvm.port import Eventfd, Vm, WatchSet
from irqrouter.kvm.simulated import Call, SimulatedKernel, SimulatedVm
from irqrouter.kvm.vm import ForeignVmError
from irqrouter.x86.msi import Message, remapped
from tests.kvm import needs_dev_kvm
from tests.kvm.conftest import Bench, errno_of, message, open_bench

pytestmark = pytest.mark.usefixtures("nothing_leaks")

GSI, OTHER_GSI = 24, 25
COUNT_MAX = 2**64 - 2

ASSIGN: Call = "KVM_IRQFD"
DEASSIGN: Call = "KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN"
ROUTING: Call = "KVM_SET_GSI_ROUTING"
MSI: Call = "KVM_SIGNAL_MSI"


@pytest.fixture
def kernel() -> SimulatedKernel:
    return SimulatedKernel()


@pytest.fixture
def vm(kernel: SimulatedKernel) -> SimulatedVm:
    """Two vCPUs; GSI 24 at APIC 1, vector 41h."""
    vm = kernel.vm(vcpus=range(2))
    vm.set_gsi_routing({GSI: message(1, 0x41)})
    return vm


@pytest.fixture
def fd(kernel: SimulatedKernel) -> int:
    return kernel.eventfd()


@pytest.fixture
def eventfd(vm: SimulatedVm, fd: int) -> Eventfd:
    return vm.adopt(fd)


def in_threads(*targets: Callable[[], None]) -> None:
    """Run them side by side, and pass on what one raises."""
    start = threading.Barrier(len(targets))

    def run(target: Callable[[], None]) -> None:
        start.wait(10)
        target()

    with ThreadPoolExecutor(len(targets)) as pool:
        for future in [pool.submit(run, target) for target in targets]:
            future.result(timeout=60)


def wakes(watch: WatchSet) -> bool:
    """Whether a loop that watches the set would wake up."""
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    return bool(poll.poll(0))


# --- deferred work ---------------------------------------------------------------------------------------------------


def test_deferred_work_waits_until_it_is_run(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    kernel.deferred = True
    kernel.signal(fd)
    vm.irqfd_assign(eventfd, GSI)
    assert vm.irr(1) == set()
    assert kernel.run_deferred() == 1
    assert vm.irr(1) == {0x41}
    assert kernel.run_deferred() == 0


def test_deferred_work_goes_by_the_table_when_it_runs(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    kernel.deferred = True
    kernel.signal(fd)
    vm.irqfd_assign(eventfd, GSI)
    vm.set_gsi_routing({GSI: message(0, 0x51)})
    kernel.run_deferred()
    assert vm.deliveries() == [(0, 0x51)]


def test_deferred_work_saves_an_unrouted_event_when_the_route_comes_first(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    kernel.deferred = True
    vm.irqfd_assign(eventfd, OTHER_GSI)
    kernel.signal(fd)
    vm.set_gsi_routing({OTHER_GSI: message(0, 0x42)})
    kernel.run_deferred()
    assert vm.deliveries() == [(0, 0x42)]


def test_deferred_work_queued_twice_runs_once(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    kernel.deferred = True
    vm.set_gsi_routing({GSI: message(0xFFFFFFFF, 0x50)})
    vm.irqfd_assign(eventfd, GSI)
    kernel.signal(fd)
    kernel.signal(fd)
    assert kernel.run_deferred() == 1
    assert vm.deliveries() == [(0, 0x50), (1, 0x50)]


def test_deferred_work_runs_in_deassign_by_the_table_of_then(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    kernel.deferred = True
    kernel.signal(fd)
    vm.irqfd_assign(eventfd, GSI)
    vm.set_gsi_routing({GSI: message(0, 0x51)})
    vm.irqfd_deassign(eventfd, GSI)
    assert vm.deliveries() == [(0, 0x51)]
    assert kernel.run_deferred() == 0


def test_deferred_work_runs_at_once_when_deferring_ends(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    kernel.deferred = True
    kernel.signal(fd)
    vm.irqfd_assign(eventfd, GSI)
    kernel.deferred = False
    assert not kernel.deferred
    assert vm.deliveries() == [(1, 0x41)]


# --- faults and counters ---------------------------------------------------------------------------------------------


def act(call: Call, vm: Vm, eventfd: Eventfd) -> None:
    """Make ``call``, so that it changes something."""
    if call == ASSIGN:
        vm.irqfd_assign(eventfd, OTHER_GSI)
    elif call == DEASSIGN:
        vm.irqfd_deassign(eventfd, GSI)
    elif call == ROUTING:
        vm.set_gsi_routing({GSI: None})
    elif call == MSI:
        vm.signal_msi(message(0, 0x60))
    elif call == "read":
        eventfd.read()
    else:
        eventfd.write(1)


@pytest.mark.parametrize("call", get_args(Call))
def test_call_told_to_fail_fails_once_and_does_nothing(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, call: Call
) -> None:
    kernel.signal(fd, 2)
    eventfd = vm.adopt(fd)
    if call == DEASSIGN:
        vm.irqfd_assign(eventfd, GSI)
    before = vm.irqfds(), vm.routes(), vm.deliveries(), kernel.count(fd)
    kernel.fail_next(call, errno.ENOMEM)
    kernel.fail_next(call, errno.EINTR)
    for code in errno.ENOMEM, errno.EINTR:
        with pytest.raises(KernelError) as caught:
            act(call, vm, eventfd)
        assert (caught.value.errno, caught.value.call) == (code, call)
        assert (vm.irqfds(), vm.routes(), vm.deliveries(), kernel.count(fd)) == before
    act(call, vm, eventfd)
    assert (vm.irqfds(), vm.routes(), vm.deliveries(), kernel.count(fd)) != before


def test_failing_table_write_leaves_the_old_routes_delivering(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    vm.irqfd_assign(eventfd, GSI)
    kernel.fail_next(ROUTING, errno.ENOMEM)
    with pytest.raises(KernelError):
        vm.set_gsi_routing({GSI: message(0, 0x51)})
    kernel.signal(fd)
    assert vm.deliveries() == [(1, 0x41)]


def test_calls_are_counted_and_nothing_else_is(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    def counts() -> list[int]:
        return [kernel.calls(call) for call in (ASSIGN, DEASSIGN, ROUTING, MSI, "read", "write")]

    assert counts() == [0, 0, 1, 0, 0, 0]  # the fixture's table
    vm.irqfd_assign(eventfd, GSI)
    kernel.signal(fd)
    kernel.fail_next(DEASSIGN, errno.EIO)
    with pytest.raises(ForeignVmError):
        vm.irqfd_deassign(eventfd, GSI)
    with pytest.raises(CallerError):
        vm.set_gsi_routing({4096: None})
    assert counts() == [1, 1, 1, 0, 0, 0]
    vm.irqfd_deassign(eventfd, GSI)
    vm.signal_msi(message(0, 0x60))
    eventfd.write(1)
    eventfd.read()
    eventfd.pending()
    assert counts() == [1, 2, 1, 1, 1, 1]


# --- the guest -------------------------------------------------------------------------------------------------------


def test_accept_takes_the_highest_vector(vm: SimulatedVm) -> None:
    for vector in (0x41, 0x80, 0x42, 0x80):
        vm.signal_msi(message(0, vector))
    assert vm.irr(0) == {0x41, 0x42, 0x80}
    assert vm.deliveries() == [(0, 0x41), (0, 0x80), (0, 0x42), (0, 0x80)]
    assert [vm.accept(0) for _ in range(4)] == [0x80, 0x42, 0x41, None]
    assert vm.irr(0) == set()


def test_delivery_callback_may_use_the_vm(kernel: SimulatedKernel) -> None:
    taken: list[tuple[int, int, int | None]] = []

    def take(apic_id: int, vector: int) -> None:
        taken.append((apic_id, vector, machine.accept(apic_id)))

    machine = kernel.vm(vcpus=[7, 9], on_delivery=take)
    assert machine.signal_msi(message(0xFFFFFFFF, 0x50)) == 2
    assert taken == [(7, 0x50, 0x50), (9, 0x50, 0x50)]


def test_delivery_callback_is_made_on_the_thread_that_delivered(kernel: SimulatedKernel) -> None:
    told: Counter[int] = Counter()
    machine = kernel.vm(on_delivery=lambda _apic_id, _vector: told.update([threading.get_ident()]))

    def deliver() -> None:
        for number in range(1, 201):
            machine.signal_msi(message(0, 0x50))
            own.append(told[threading.get_ident()] == number)

    own: list[bool] = []
    in_threads(deliver, deliver)
    assert own == [True] * 400


def test_vm_without_vcpus_has_nobody_to_deliver_to(kernel: SimulatedKernel) -> None:
    assert kernel.vm(vcpus=()).signal_msi(message(0xFFFFFFFF, 0x50)) == 0


def test_vm_with_impossible_vcpus_is_refused(kernel: SimulatedKernel) -> None:
    for vcpus in ([0xFFFFFFFF], [-1]):
        with pytest.raises(SpecError):
            kernel.vm(vcpus=vcpus)
    with pytest.raises(CallerError):
        kernel.vm(vcpus=[1, 1])
    with pytest.raises(CallerError):
        kernel.vm(pins=4097)


def test_irr_of_an_unknown_vcpu_is_refused(vm: SimulatedVm) -> None:
    for look in vm.irr, vm.accept:
        with pytest.raises(CallerError):
            look(2)


def test_small_table_bounds_its_gsis(kernel: SimulatedKernel) -> None:
    vm = kernel.vm(routes_max=32)
    vm.set_gsi_routing({31: message(0, 0x50)})
    with pytest.raises(CallerError):
        vm.set_gsi_routing({32: message(0, 0x50)})
    assert vm.routes() == {31: message(0, 0x50)}


def test_closed_vm_detaches_its_irqfds(kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd) -> None:
    vm.irqfd_assign(eventfd, GSI)
    assert vm.irqfds() == {eventfd.identity: GSI}
    vm.close()
    vm.close()
    assert vm.irqfds() == {}
    kernel.signal(fd)
    assert kernel.count(fd) == 1
    assert vm.deliveries() == []
    assert errno_of(lambda: vm.irqfd_assign(eventfd, GSI)) == errno.EBADF


# --- descriptors -----------------------------------------------------------------------------------------------------


def test_descriptors_are_the_lowest_free_and_none_of_the_process(kernel: SimulatedKernel) -> None:
    first, second, third = kernel.eventfd(), kernel.eventfd(), kernel.eventfd()
    assert (second, third) == (first + 1, first + 2)
    kernel.close(third)
    kernel.close(first)
    assert [kernel.dup(second), kernel.eventfd(), kernel.eventfd()] == [first, third, third + 1]
    assert not Path(f"/proc/self/fd/{first}").is_symlink()


def test_closed_descriptor_is_refused(kernel: SimulatedKernel, fd: int) -> None:
    kernel.close(fd)
    for call in (kernel.close, kernel.dup, kernel.count, kernel.trigger, kernel.signal):
        assert errno_of(functools.partial(call, fd)) == errno.EBADF


def test_eventfd_that_linux_would_refuse_is_refused(kernel: SimulatedKernel) -> None:
    with pytest.raises(SpecError):
        kernel.eventfd(1 << 32)
    assert errno_of(lambda: kernel.eventfd(flags=1 << 20)) == errno.EINVAL


def test_eventfd_of_another_kernel_is_refused(vm: SimulatedVm) -> None:
    other = SimulatedKernel()
    theirs = other.vm().adopt(other.eventfd())
    with pytest.raises(CallerError):
        vm.irqfd_assign(theirs, GSI)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with KvmEventfd(fd) as real, contextlib.closing(vm.watch_set()) as watch:
            with pytest.raises(CallerError):
                vm.irqfd_assign(real, GSI)
            with pytest.raises(CallerError):
                watch.arm(real)
    finally:
        os.close(fd)
    with EpollWatchSet() as real_watch, pytest.raises(CallerError):
        real_watch.arm(theirs)


# --- the watch set ---------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_watch_set_wakes_a_loop_from_another_thread(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    loop = asyncio.get_running_loop()
    harvested: list[int] = []
    done = asyncio.Event()

    def wake() -> None:
        harvested.extend(watch.harvest(8))
        done.set()

    with contextlib.closing(vm.watch_set()) as watch:
        loop.add_reader(watch.fileno(), wake)
        try:
            for _ in range(3):
                done.clear()
                watch.arm(eventfd)
                thread = threading.Thread(target=kernel.signal, args=(fd,))
                thread.start()
                async with asyncio.timeout(10):
                    await done.wait()
                thread.join()
                assert eventfd.read() == 1
        finally:
            loop.remove_reader(watch.fileno())
    assert harvested == [eventfd.fileno()] * 3


def test_signals_from_many_threads_are_all_accounted_for(
    kernel: SimulatedKernel, vm: SimulatedVm, fd: int, eventfd: Eventfd
) -> None:
    caught_fd = kernel.eventfd()
    caught = vm.adopt(caught_fd)
    vm.irqfd_assign(eventfd, GSI)
    total = 0

    def signal() -> None:
        for _ in range(300):
            kernel.signal(fd)
            kernel.signal(caught_fd)

    def catch() -> None:
        nonlocal total
        while total < 900:
            watch.arm(caught)
            if wakes(watch):
                assert watch.harvest(8) == [caught.fileno()]
                total += caught.read()

    with contextlib.closing(vm.watch_set()) as watch:
        in_threads(catch, signal, signal, signal)
        assert not wakes(watch)
    assert total == len(vm.deliveries()) == 900


# --- one history, two kernels ----------------------------------------------------------------------------------------


SLOTS = range(3)
MESSAGES: list[Message] = [
    message(1, 0x41),
    message(0, 0x42),
    message(300, 0x43),
    message(2, 0x44),  # nobody's
    message(0xFFFFFFFF, 0x45),
    remapped(destination=1, dm=0, rh=0, vector=0x46, delivery_mode=4, tm=0),  # NMI
    remapped(destination=0b1011, dm=1, rh=0, vector=0x47, delivery_mode=0, tm=0),
    remapped(destination=0b1111, dm=1, rh=0, vector=0x48, delivery_mode=1, tm=0),
    remapped(destination=3, dm=0, rh=0, vector=0x49, delivery_mode=0, tm=1),
    Message(0x1_FEE0_0000, 0x4A),  # refused
]


class History:
    """Three eventfds on a bench, two VMs and a watch set; every method is a step, and says what it observed."""

    def __init__(self, bench: Bench, stack: contextlib.ExitStack) -> None:
        self._bench = bench
        self._guests = (bench.guest, bench.neighbour)
        self._watch = stack.enter_context(contextlib.closing(bench.guest.vm.watch_set()))
        self._fds = [bench.eventfd() for _ in SLOTS]
        self._open = [True for _ in SLOTS]
        self._eventfds = [bench.guest.vm.adopt(fd) for fd in self._fds]
        stack.callback(self._close_all)
        for number, guest in enumerate(self._guests):
            guest.vm.set_gsi_routing({GSI: message(number, 0x31), OTHER_GSI: message(300, 0x32)})

    def signal(self, *, slot: int, count: int) -> None:
        if self._open[slot]:
            self._bench.signal(self._fds[slot], count)

    def read(self, *, slot: int) -> object:
        return self._eventfds[slot].read()

    def write(self, *, slot: int, count: int) -> None:
        self._eventfds[slot].write(count)

    def pending(self, *, slot: int) -> object:
        return self._eventfds[slot].pending()

    def assign(self, *, slot: int, guest: int, gsi: int) -> None:
        self._guests[guest].vm.irqfd_assign(self._eventfds[slot], gsi)

    def deassign(self, *, slot: int, guest: int, gsi: int) -> None:
        self._guests[guest].vm.irqfd_deassign(self._eventfds[slot], gsi)

    def route(self, *, guest: int, changes: dict[int, Message | None]) -> None:
        self._guests[guest].vm.set_gsi_routing(changes)

    def signal_msi(self, *, guest: int, msi: Message) -> object:
        return self._guests[guest].vm.signal_msi(msi)

    def arm(self, *, slot: int) -> None:
        self._watch.arm(self._eventfds[slot])

    def harvest(self) -> object:
        numbers = [eventfd.fileno() for eventfd in self._eventfds]
        return sorted(numbers.index(number) for number in self._watch.harvest(8))

    def close(self, *, slot: int) -> None:
        """The VMM closes its descriptor."""
        if self._open[slot]:
            self._bench.close(self._fds[slot])
            self._open[slot] = False

    def release(self, *, slot: int) -> None:
        """We close ours."""
        self._eventfds[slot].close()

    def renew(self, *, slot: int) -> None:
        """Another eventfd takes the slot, and most likely the numbers."""
        self.release(slot=slot)
        self.close(slot=slot)
        self._fds[slot] = self._bench.eventfd()
        self._open[slot] = True
        self._eventfds[slot] = self._bench.guest.vm.adopt(self._fds[slot])

    def observe(self, step: "Step") -> object:
        """Take a step; all that can be seen afterwards, once the kernel has done what it deferred."""
        try:
            result = step(self)
        except IrqrouterError as error:
            result = type(error).__name__, getattr(error, "errno", None)
        self._bench.settle()
        counts = [self._bench.count(fd) for fd, is_open in zip(self._fds, self._open, strict=True) if is_open]
        return result, [guest.delivered() for guest in self._guests], counts, wakes(self._watch)

    def _close_all(self) -> None:
        for eventfd in self._eventfds:
            eventfd.close()


Step = Callable[[History], object]


def step(method: Callable[..., object], **arguments: st.SearchStrategy[object]) -> st.SearchStrategy[Step]:
    return st.builds(functools.partial, st.just(method), **arguments)


def steps() -> st.SearchStrategy[Step]:
    # Few of each and uneven, so that steps meet.
    slot, guest = st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([0, 0, 0, 1])
    gsi = st.sampled_from([GSI, GSI, OTHER_GSI, 4095])
    route = st.sampled_from([*MESSAGES, None])
    irqfd = {"slot": slot, "guest": guest, "gsi": gsi}
    return st.one_of(
        step(History.signal, slot=slot, count=st.just(1)),
        step(History.signal, slot=slot, count=st.sampled_from([0, 1, 3, COUNT_MAX])),
        step(History.write, slot=slot, count=st.sampled_from([0, 1, COUNT_MAX])),
        step(History.read, slot=slot),
        step(History.pending, slot=slot),
        step(History.assign, **irqfd),
        step(History.assign, **irqfd),
        step(History.deassign, **irqfd),
        step(History.route, guest=guest, changes=st.dictionaries(gsi, route, min_size=1)),
        step(History.route, guest=guest, changes=st.dictionaries(gsi | st.just(4096), route, min_size=1)),
        step(History.signal_msi, guest=guest, msi=st.sampled_from(MESSAGES)),
        step(History.arm, slot=slot),
        step(History.harvest),
        st.sampled_from([History.close, History.release, History.renew, History.renew]).flatmap(
            lambda method: step(method, slot=slot)
        ),
    )


@contextlib.contextmanager
def history(kernel: str) -> Generator[History]:
    with open_bench(kernel) as bench, contextlib.ExitStack() as stack:
        if not bench.exclusive:
            pytest.skip("the simulated kernel is Linux 6.17 or later; this kernel lets two VMs share an eventfd")
        yield History(bench, stack)


@needs_dev_kvm
def test_random_history_is_the_same_on_both_kernels() -> None:
    @settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(steps(), min_size=20, max_size=30), st.sampled_from(["simulated", "simulated, deferred"]))
    def same(taken: list[Step], simulated: str) -> None:
        with history("kvm") as real, history(simulated) as model:
            for number, each in enumerate(taken):
                assert real.observe(each) == model.observe(each), f"step {number}: {each}"

    same()
