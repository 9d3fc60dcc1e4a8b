"""Eventfds and the watch set, on the real kernel. None of this needs KVM."""

import errno
import itertools
import os
import resource
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.kvm.eventfd import EpollWatchSet, KvmEventfd
from irqrouter.kvm.port import BlockingEventfdError, NotAnEventfdError, SemaphoreEventfdError

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def fd() -> Iterator[int]:
    """The descriptor that a client would pass."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfd(fd: int) -> Iterator[KvmEventfd]:
    with KvmEventfd(fd) as eventfd:
        yield eventfd


@pytest.fixture
def watch_set() -> Iterator[EpollWatchSet]:
    with EpollWatchSet() as watch_set:
        yield watch_set


def readable(watch_set: EpollWatchSet) -> bool:
    """Whether a loop that watches the set would wake up."""
    poll = select.poll()
    poll.register(watch_set.fileno(), select.POLLIN)
    return bool(poll.poll(0))


# --- the eventfd -----------------------------------------------------------------------------------------------------


def test_eventfd_of_two_descriptors_has_one_identity(fd: int) -> None:
    twin, other = os.dup(fd), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with KvmEventfd(fd) as first, KvmEventfd(twin) as second, KvmEventfd(other) as third:
            assert first.identity == second.identity != third.identity
    finally:
        os.close(twin)
        os.close(other)


def test_eventfd_given_descriptor_closed_and_reused_still_means_the_same() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with KvmEventfd(fd) as eventfd:
        os.close(fd)
        reused = os.eventfd(7, os.EFD_NONBLOCK)
        assert reused == fd
        assert eventfd.read() == 0
        os.close(reused)


def test_eventfd_duplicate_is_not_inherited(eventfd: KvmEventfd) -> None:
    assert not os.get_inheritable(eventfd.fileno())


def test_read_several_signals_takes_the_whole_count_once(fd: int, eventfd: KvmEventfd) -> None:
    os.eventfd_write(fd, 2)
    eventfd.write(3)
    assert [eventfd.pending(), eventfd.read(), eventfd.pending(), eventfd.read()] == [True, 5, False, 0]


def test_write_largest_count_fits_and_one_more_is_refused(eventfd: KvmEventfd) -> None:
    eventfd.write(2**64 - 2)
    with pytest.raises(KernelError) as caught:
        eventfd.write(1)
    assert caught.value.errno == errno.EAGAIN
    assert eventfd.read() == 2**64 - 2


@pytest.mark.parametrize("count", [-1, 2**64 - 1, 2**64])
def test_write_count_out_of_range_raises_and_writes_nothing(eventfd: KvmEventfd, count: int) -> None:
    with pytest.raises(SpecError):
        eventfd.write(count)
    assert not eventfd.pending()


@pytest.mark.parametrize(
    "use", [KvmEventfd.read, KvmEventfd.pending, lambda e: e.write(1)], ids=["read", "pending", "write"]
)
def test_eventfd_closed_answers_ebadf(eventfd: KvmEventfd, use: Callable[[KvmEventfd], object]) -> None:
    eventfd.close()
    eventfd.close()
    assert eventfd.fileno() == -1
    with pytest.raises(KernelError) as caught:
        use(eventfd)
    assert caught.value.errno == errno.EBADF


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, 2**31 - 1, 2**31, 2**64])
def test_eventfd_of_no_descriptor_is_refused(number: int) -> None:
    with pytest.raises(NotAnEventfdError, match=str(number)):
        KvmEventfd(number)


def test_eventfd_of_closed_descriptor_is_refused() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    os.close(fd)
    with pytest.raises(NotAnEventfdError, match="is closed"):
        KvmEventfd(fd)


def test_eventfd_of_another_kind_of_file_is_refused() -> None:
    with select.epoll() as epoll, pytest.raises(NotAnEventfdError, match="is not an eventfd"):
        KvmEventfd(epoll.fileno())


def test_file_of_which_the_kernel_tells_more_than_ascii_is_refused_all_the_same(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """io_uring names the files that are registered with it."""
    monkeypatch.setattr(Path, "read_bytes", lambda _path: b"pos:\t0\nflags:\t02\nUserFiles:\t1\n    0: caf\xc3\xa9\n")
    with pytest.raises(NotAnEventfdError, match="is not an eventfd"):
        KvmEventfd(fd)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (os.EFD_NONBLOCK | os.EFD_SEMAPHORE, SemaphoreEventfdError),
        (os.EFD_SEMAPHORE, SemaphoreEventfdError),
        (0, BlockingEventfdError),
    ],
)
def test_eventfd_with_wrong_flags_is_refused_and_unchanged(flags: int, error: type[CallerError]) -> None:
    fd = os.eventfd(3, flags)
    try:
        with pytest.raises(error, match=f"descriptor {fd}"):
            KvmEventfd(fd)
        assert os.get_blocking(fd) is not bool(flags & os.EFD_NONBLOCK)
        assert os.eventfd_read(fd) == (1 if flags & os.EFD_SEMAPHORE else 3)
    finally:
        os.close(fd)


@pytest.mark.parametrize("line", ["eventfd-id", "eventfd-semaphore"])
def test_eventfd_of_an_older_kernel_is_refused_by_name(fd: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Path(f"/proc/self/fdinfo/{fd}").read_bytes()
    older = b"\n".join(present for present in complete.splitlines() if not present.startswith(line.encode()))
    monkeypatch.setattr(Path, "read_bytes", lambda _path: older)
    with pytest.raises(KernelError, match=line) as caught:
        KvmEventfd(fd)
    assert caught.value.errno == errno.ENOSYS


def test_eventfd_without_a_free_descriptor_raises_emfile(fd: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        with pytest.raises(KernelError) as caught:
            KvmEventfd(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE


# --- the watch set ---------------------------------------------------------------------------------------------------


def test_watch_set_signalled_reports_once_until_armed_again(eventfd: KvmEventfd, watch_set: EpollWatchSet) -> None:
    watch_set.arm(eventfd)
    assert not readable(watch_set)
    eventfd.write(1)
    assert readable(watch_set)
    assert watch_set.harvest(8) == [eventfd.fileno()]
    eventfd.write(1)
    assert not readable(watch_set)
    assert watch_set.harvest(8) == []
    watch_set.arm(eventfd)
    assert watch_set.harvest(8) == [eventfd.fileno()]
    eventfd.read()
    watch_set.arm(eventfd)
    assert watch_set.harvest(8) == []


def test_watch_set_armed_on_pending_count_reports_it(eventfd: KvmEventfd, watch_set: EpollWatchSet) -> None:
    eventfd.write(1)
    watch_set.arm(eventfd)
    assert watch_set.harvest(1) == [eventfd.fileno()]


def test_harvest_with_limit_leaves_the_rest_for_the_next(watch_set: EpollWatchSet) -> None:
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(5)]
    eventfds = [KvmEventfd(fd) for fd in fds]
    for eventfd in eventfds:
        watch_set.arm(eventfd)
    harvests = [watch_set.harvest(2) for _ in range(4)]
    assert [len(harvest) for harvest in harvests] == [2, 2, 1, 0]
    assert sorted(itertools.chain(*harvests)) == sorted(eventfd.fileno() for eventfd in eventfds)
    for eventfd, fd in zip(eventfds, fds, strict=True):
        eventfd.close()
        os.close(fd)


def test_close_armed_eventfd_leaves_the_set_though_its_file_lives_on(fd: int, watch_set: EpollWatchSet) -> None:
    eventfd = KvmEventfd(fd)
    watch_set.arm(eventfd)
    number = eventfd.fileno()
    eventfd.close()
    with KvmEventfd(fd) as second:
        assert second.fileno() == number
        os.eventfd_write(fd, 1)
        assert watch_set.harvest(8) == []
        watch_set.arm(second)  # EEXIST if the first entry had stayed
        assert watch_set.harvest(8) == [number]


def test_arm_closed_eventfd_does_nothing(eventfd: KvmEventfd, watch_set: EpollWatchSet) -> None:
    eventfd.write(1)
    eventfd.close()
    watch_set.arm(eventfd)
    assert watch_set.harvest(8) == []


def test_arm_in_a_second_set_is_refused_until_the_first_is_closed(
    eventfd: KvmEventfd, watch_set: EpollWatchSet
) -> None:
    first = EpollWatchSet()
    first.arm(eventfd)
    with pytest.raises(CallerError, match="another watch set"):
        watch_set.arm(eventfd)
    first.close()
    watch_set.arm(eventfd)
    eventfd.write(1)
    assert watch_set.harvest(8) == [eventfd.fileno()]


def test_close_eventfd_after_its_set_closes_both(eventfd: KvmEventfd) -> None:
    watch_set = EpollWatchSet()
    watch_set.arm(eventfd)
    watch_set.close()
    watch_set.close()
    eventfd.close()
    assert (watch_set.fileno(), eventfd.fileno()) == (-1, -1)


def test_watch_set_closed_answers_ebadf(eventfd: KvmEventfd, watch_set: EpollWatchSet) -> None:
    watch_set.close()
    uses: list[Callable[[], object]] = [lambda: watch_set.harvest(1), lambda: watch_set.arm(eventfd)]
    for use in uses:
        with pytest.raises(KernelError) as caught:
            use()
        assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("limit", [0, -1])
def test_harvest_of_nothing_is_refused(watch_set: EpollWatchSet, limit: int) -> None:
    with pytest.raises(CallerError):
        watch_set.harvest(limit)


class ForeignEventfd:
    """An eventfd of some other kernel: no descriptor that epoll knows."""

    identity = 1

    def fileno(self) -> int:
        return 1_000_000

    def pending(self) -> bool:
        return False

    def read(self) -> int:
        return 0

    def write(self, count: int) -> None:
        raise AssertionError(count)

    def close(self) -> None:
        pass


def test_arm_eventfd_of_another_kernel_is_refused(watch_set: EpollWatchSet) -> None:
    with pytest.raises(CallerError, match="1000000"):
        watch_set.arm(ForeignEventfd())


def test_watch_set_armed_harvested_and_closed_from_threads_reports_only_members(fd: int) -> None:
    """Numbers are reused all the time here; a set that kept a closed eventfd would raise EEXIST or spin."""
    done = threading.Event()
    os.eventfd_write(fd, 1)  # always readable: whatever is armed is reported
    with EpollWatchSet() as watch_set, ThreadPoolExecutor(4) as pool:

        def harvest() -> None:
            while not done.is_set():
                watch_set.harvest(4)

        def arm_and_close() -> None:
            for _ in range(1000):
                with KvmEventfd(fd) as eventfd:
                    rival = pool.submit(eventfd.close)
                    watch_set.arm(eventfd)
                    watch_set.arm(eventfd)
                    eventfd.close()
                    rival.result()

        harvester = pool.submit(harvest)
        workers = [pool.submit(arm_and_close) for _ in range(2)]
        try:
            for worker in workers:
                worker.result(timeout=60)
        finally:
            done.set()
        harvester.result(timeout=60)
        assert watch_set.harvest(8) == []
