"""The fair lock: who gets it next, and that somebody always does."""

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace

import pytest

from irqrouter.kvm import fairlock
from irqrouter.kvm.fairlock import FairLock

pytestmark = [pytest.mark.usefixtures("nothing_leaks"), pytest.mark.timeout(30)]


@pytest.fixture
def lock() -> FairLock:
    return FairLock()


def waiting(lock: FairLock, count: int) -> None:
    """Return when ``count`` threads wait for ``lock``."""
    deadline = time.monotonic() + 20
    while len(lock._queue) != count:
        assert time.monotonic() < deadline, f"{len(lock._queue)} wait, not {count}"
        time.sleep(0)


@contextmanager
def waiters(lock: FairLock, *actions: Callable[[], object]) -> Generator[None]:
    """Threads that wait for ``lock``, in this order, and do their action while they hold it. Ended at the exit."""

    def turn(action: Callable[[], object]) -> None:
        with lock:
            action()

    threads = [threading.Thread(target=turn, args=(action,), daemon=True) for action in actions]
    for already, thread in enumerate(threads, len(lock._queue)):
        thread.start()
        waiting(lock, already + 1)
    yield
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a waiter never got the lock"


def test_release_with_waiters_hands_over_in_the_order_of_asking(lock: FairLock) -> None:
    turns: list[int] = []
    lock.acquire()
    with waiters(lock, *(lambda number=number: turns.append(number) for number in range(8))):
        assert turns == []
        lock.release()
    assert turns == list(range(8))


def test_non_blocking_acquire_of_a_free_lock_takes_it(lock: FairLock) -> None:
    assert lock.acquire(blocking=False)
    assert not lock.acquire(blocking=False)
    lock.release()
    assert lock.acquire(blocking=False)


def test_non_blocking_acquire_never_overtakes_a_waiter(lock: FairLock) -> None:
    got: list[bool] = []
    lock.acquire()
    with waiters(lock, lambda: got.append(lock.acquire(blocking=False))):
        assert not lock.acquire(blocking=False)
        lock.release()
    assert got == [False], "its holder has it, nobody else"
    assert lock.acquire(blocking=False), "free again"


def test_give_way_with_waiters_lets_all_of_them_go_first(lock: FairLock) -> None:
    turns: list[str] = []
    lock.acquire()
    with waiters(lock, lambda: turns.append("first"), lambda: turns.append("second")):
        lock.give_way()
        turns.append("holder")
        assert not lock.acquire(blocking=False), "held again"
        lock.release()
    assert turns == ["first", "second", "holder"]


def test_give_way_without_waiters_keeps_the_lock(lock: FairLock) -> None:
    lock.acquire()
    lock.give_way()
    assert not lock.acquire(blocking=False)
    lock.release()
    assert lock.acquire(blocking=False)


def test_with_statement_that_raises_releases(lock: FairLock) -> None:
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert lock.acquire(blocking=False)


def test_many_threads_hold_it_one_at_a_time(lock: FairLock) -> None:
    holders, most, turns = 0, 0, 0

    def work() -> None:
        nonlocal holders, most, turns
        for _ in range(100):
            with lock:
                holders += 1
                time.sleep(0)  # lets another thread run, and it would count itself as well
                most = max(most, holders)
                turns += 1
                holders -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == (1, 400)


class Interrupted(BaseException):
    """What a signal handler raises, as Python's own does KeyboardInterrupt."""


@contextmanager
def interrupted_by_sigusr1() -> Generator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_waiter_interrupted_in_the_queue_leaves_it_and_those_behind_go_on(lock: FairLock) -> None:
    turns: list[str] = []
    lock.acquire()

    def behind() -> None:
        waiting(lock, 1)
        with waiters(lock, lambda: turns.append("behind")):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            waiting(lock, 1)
            lock.release()

    thread = threading.Thread(target=behind, daemon=True)
    with interrupted_by_sigusr1():
        thread.start()
        with pytest.raises(Interrupted):
            lock.acquire()
    thread.join(20)
    assert turns == ["behind"]
    assert lock.acquire(blocking=False), "handed to a waiter that is gone: nobody ever gets it again"


@pytest.mark.parametrize("handed_over", [False, True])
def test_waiter_interrupted_while_it_is_handed_the_lock_does_not_keep_it(
    lock: FairLock, handed_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Turn:
        """A waiter's own lock, whose second acquire, the wait, is interrupted."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self.release = self._lock.release

        def acquire(self) -> None:
            if not self._lock.acquire(blocking=False):
                if handed_over:
                    lock.release()
                raise Interrupted

    lock.acquire()
    monkeypatch.setattr(fairlock, "threading", SimpleNamespace(Lock=Turn))
    with pytest.raises(Interrupted):
        lock.acquire()
    if not handed_over:
        assert not lock.acquire(blocking=False), "still held by who had it"
        lock.release()
    assert lock.acquire(blocking=False), "handed to a waiter that is gone: nobody ever gets it again"
