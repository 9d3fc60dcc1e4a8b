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
        self._guard = threading.Lock()
        self._held = False
        self._queue: deque[threading.Lock] = deque()

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take the lock. With ``blocking=False`` return False at once when somebody has it, or waits for it."""
        with self._guard:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            turn = threading.Lock()
            turn.acquire()
            self._queue.append(turn)
        turn.acquire()  # released by the holder before us; the lock stayed held all the while
        return True

    def release(self) -> None:
        """Hand the lock to whoever has waited longest."""
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
