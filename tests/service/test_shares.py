"""What one VM may use of what is everybody's, on a clock that the test turns."""

import time

import pytest

from irqrouter.service.config import Limits
from irqrouter.service.shares import LOG_LINES_PER_S, SHARE_S, WINDOW_S, FrameShare, LogShare, TimeShare


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_log_lines_beyond_the_share_are_counted(clock: Clock) -> None:
    share = LogShare()
    assert [share.take() for _ in range(LOG_LINES_PER_S + 3)] == [True] * LOG_LINES_PER_S + [False] * 3
    clock.now += 1
    assert share.take()
    assert (share.forget_suppressed(), share.forget_suppressed()) == (3, 0)
    more = LogShare(9)
    assert sum(more.take() for _ in range(20)) == 9


def test_frames_beyond_the_share_wait_until_the_second_is_over(clock: Clock) -> None:
    share, limits = FrameShare(), Limits(frames_per_second=3)
    assert [share.spend(16, limits) for _ in range(2)] == [0, 0]
    clock.now += 0.25
    assert share.spend(16, limits) == pytest.approx(0.75)
    clock.now += 0.75
    assert share.spend(16, limits) == 0


def test_bytes_beyond_the_share_wait_as_well(clock: Clock) -> None:
    share, limits = FrameShare(), Limits(bytes_per_second=1 << 17)
    assert share.spend(65_536, limits) == 0
    assert share.spend(65_536, limits) == pytest.approx(1)


def test_limits_that_change_hold_at_once(clock: Clock) -> None:
    share = FrameShare()
    assert share.spend(16, Limits(frames_per_second=100)) == 0
    assert share.spend(16, Limits(frames_per_second=2)) > 0


def test_loops_time_within_the_share_costs_no_pause() -> None:
    share = TimeShare()
    assert share.spend(SHARE_S / 2, 5.0) == 0
    assert share.spend(SHARE_S / 2 - 1e-6, 5.0 + SHARE_S) == 0


def test_loops_time_beyond_the_share_is_paused_for() -> None:
    share = TimeShare()
    used = SHARE_S * 1.2
    assert share.spend(used, 5.0) == pytest.approx(WINDOW_S * 1.2 - used)


def test_b8_one_turn_longer_than_the_window_is_paused_for_too() -> None:
    """Whoever uses ten windows at once gets no more than its share either."""
    share = TimeShare()
    used = 10 * WINDOW_S
    assert share.spend(used, 5.0) == pytest.approx(used * (WINDOW_S / SHARE_S - 1))


def test_new_window_begins_from_nothing() -> None:
    share = TimeShare()
    assert share.spend(2 * SHARE_S, 5.0) > 0
    assert share.spend(SHARE_S / 2, 5.0 + 3 * WINDOW_S) == 0


@pytest.mark.parametrize("turn", [0.0003, 0.002, 0.007, 0.02, 0.3])
def test_b8_share_of_the_loops_time_holds_for_turns_of_any_length(turn: float) -> None:
    share, now, used = TimeShare(), 5.0, 0.0
    while now < 65.0:
        used += turn
        now += turn
        now += share.spend(turn, now)
    assert used / (now - 5.0) <= SHARE_S / WINDOW_S * 1.7  # the turn that goes beyond it is let run
