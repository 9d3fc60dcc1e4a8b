"""What a VM may use of what is everybody's: frames, lines in the log, and the loop's time."""

import time
from typing import Final

from irqrouter.service.config import Limits

#: Lines that one VM may cause in the log in a second.
LOG_LINES_PER_S: Final = 5

#: While others are attached a VM may use this much of the loop's time in each window, and then pauses until its end.
WINDOW_S: Final = 0.01
SHARE_S: Final = 0.005


class LogShare:
    """How many lines somebody may still cause in the log in this second."""

    def __init__(self, lines_per_s: int = LOG_LINES_PER_S) -> None:
        self._lines_per_s = self._left = lines_per_s
        self._second = 0.0
        self._suppressed = 0

    def take(self) -> bool:
        """Whether there is one left, and take it."""
        now = time.monotonic()
        if now - self._second >= 1:
            self._second, self._left = now, self._lines_per_s
        if self._left:
            self._left -= 1
            return True
        self._suppressed += 1
        return False

    def forget_suppressed(self) -> int:
        """How many were not written since the last that was."""
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


class FrameShare:
    """What a VM may send in a second; what it sends beyond waits in its socket."""

    def __init__(self) -> None:
        self._second = 0.0
        self._frames = self._bytes = 0

    def spend(self, size: int, limits: Limits) -> float:
        """A frame of ``size`` bytes was read: how many seconds to wait before the next."""
        now = time.monotonic()
        if now - self._second >= 1:
            self._second, self._frames, self._bytes = now, 0, 0
        self._frames += 1
        self._bytes += size
        if self._frames < limits.frames_per_second and self._bytes < limits.bytes_per_second:
            return 0
        return self._second + 1 - now


class TimeShare:
    """The loop's time that a VM has used in this window, which is longer where it used more than its share."""

    def __init__(self) -> None:
        self._window = 0.0
        self._used = 0.0

    def spend(self, used: float, now: float) -> float:
        """Until ``now`` (``time.monotonic``) the loop worked for the VM for ``used`` seconds: how many to pause now."""
        if now - used - self._window >= WINDOW_S:
            self._window, self._used = now - used, 0.0
        self._used += used
        if self._used <= SHARE_S:
            return 0.0
        return max(0.0, self._window + WINDOW_S * self._used / SHARE_S - now)
