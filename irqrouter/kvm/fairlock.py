"""A lock that is handed over in the order it was asked for.

With ``threading.Lock`` a thread that releases and takes it again in a loop, as one that carries out a long batch does,
overtakes a waiting vCPU thousands of times. Here a waiter waits for one holder's turn at most.
"""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """First come, first served. Not re-entrant."""

    def __init__(self) -> None:
        self._held = threading.Lock()
        self._queue: deque[threading.Lock] = deque()
        # Guards the queue's ends. Nobody takes it while nobody waits.
        self._guard = threading.Lock()

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take the lock. With ``blocking=False`` return False at once when somebody has it, or waits for it."""
        if not self._queue and self._held.acquire(blocking=False):
            return True
        if blocking:
            self._wait()
        return blocking

    def release(self) -> None:
        """Hand the lock to whoever has waited longest."""
        self._held.release()
        if self._queue:
            self._pass_on()

    def give_way(self) -> None:
        """The holder, between two turns of its own: let those who wait go first, then hold the lock again."""
        if self._queue:
            self.release()
            self.acquire()

    def _wait(self) -> None:
        turn = threading.Lock()
        turn.acquire()
        try:
            with self._guard:
                self._queue.append(turn)
            self._pass_on()  # whoever held the lock may have let go before seeing us
            turn.acquire()  # released by whoever passes the lock on to us; it stays held all the while
        except BaseException:  # a KeyboardInterrupt: nobody may hand the lock to us any more
            with self._guard:
                waiting = turn in self._queue
                if waiting:
                    self._queue.remove(turn)
            if not waiting:
                self.release()
            raise

    def _pass_on(self) -> None:
        """Give the lock, if it is free, to whoever has waited longest."""
        with self._guard:
            if self._queue and self._held.acquire(blocking=False):
                self._queue.popleft().release()

    def __enter__(self) -> None:
        if self._queue or not self._held.acquire(blocking=False):
            self._wait()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.release()
        if self._queue:
            self._pass_on()
