"""The notice board, between processes that do not wait for one another."""

import subprocess
import sys

import pytest

from irqrouter.proof.board import KEPT, Board
from irqrouter.proof.ledger import HELD

# The other process appends, and its entry number n says n + 2 (0 and 1 have meanings of their own).
_WRITER = """
import sys
from irqrouter.proof.board import Board
with Board(int(sys.argv[1]), 2) as board:
    history = board.history(1)
    for number in range(1, int(sys.argv[2])):
        assert history.append(number + 2) == number
        history.acknowledge(number)
"""


def test_history_begins_held_and_acknowledged() -> None:
    with Board.create(3) as board:
        history = board.history(2)
        assert (history.newest(), history.acknowledged()) == (0, 0)
        assert history.entries(0, 0) == [HELD]


def test_history_entry_is_seen_and_acknowledged_by_number() -> None:
    with Board.create(2) as board:
        history = board.history(0)
        assert history.append(70) == 1
        assert history.append(71) == 2
        history.acknowledge(1)
        assert history.entries(0, 2) == [HELD, 70, 71]
        assert history.acknowledged() == 1
        assert board.history(1).newest() == 0


def test_history_older_than_what_is_kept_is_none() -> None:
    with Board.create(1) as board:
        history = board.history(0)
        for number in range(1, KEPT + 10):
            history.append(number + 2)
        newest = history.newest()
        assert history.entries(newest - KEPT + 1, newest) is None
        assert history.entries(newest - KEPT + 2, newest) == list(range(newest - KEPT + 4, newest + 3))


def test_history_read_while_another_process_writes_is_never_torn() -> None:
    count = 100_000
    with Board.create(2) as board:
        history = board.history(1)
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(board.fd), str(count)], pass_fds=[board.fd])
        looks = 0
        while writer.poll() is None:
            acknowledged = history.acknowledged()
            newest = history.newest()
            assert acknowledged <= newest
            first = max(1, newest - 5)
            entries = history.entries(first, newest)
            assert entries is None or entries == list(range(first + 2, newest + 3))
            looks += bool(newest)
        assert writer.wait() == 0
        assert looks > 0
        assert history.acknowledged() == history.newest() == count - 1


def test_board_sums_over_vectors() -> None:
    with Board.create(3) as board:
        board.history(0).say_events(5)
        board.history(2).say_events(7)
        board.history(1).say_fault()
        board.history(1).say_fault()
        assert (board.events(), board.faults()) == (12, 2)
        assert board.history(1).faults() == 2


def test_board_lead_counts_changes_of_all_drivers() -> None:
    with Board.create(3) as board:
        board.say_steps(0, 3)
        board.say_steps(1, 4)
        board.history(0).say_events(50)
        board.history(2).say_events(59)
        assert board.lead(10) == 10 - 7
        assert board.lead(100) == 1 - 7


def test_board_is_drained_when_all_its_devices_are() -> None:
    with Board.create(1) as board:
        board.say_drained(1)
        assert not board.drained(2)
        board.say_drained(0)
        assert board.drained(2)


@pytest.mark.usefixtures("nothing_leaks")
def test_board_close_twice_leaves_no_descriptor() -> None:
    board = Board.create(4)
    board.close()
    board.close()
