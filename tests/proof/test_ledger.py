"""The books must find every broken rule, and accuse nobody wrongly: histories made by hand."""

from collections.abc import Sequence

import pytest

from irqrouter.errors import InternalError
from irqrouter.proof.ledger import FAULT, HELD, Ledger, Outcome, Rule, Totals, Violation

A, B, C = 100, 101, 102
PATIENCE = 1.0


class Entries:
    """A history in a list; everything is acknowledged unless a test says otherwise."""

    def __init__(self, *entries: Outcome, kept: int = 1000) -> None:
        self.written = list(entries)
        self.acked = len(entries) - 1
        self.kept = kept

    def newest(self) -> int:
        return len(self.written) - 1

    def acknowledged(self) -> int:
        return self.acked

    def entries(self, first: int, last: int) -> Sequence[Outcome] | None:
        return self.written[first : last + 1] if len(self.written) - first <= self.kept else None

    def write(self, outcome: Outcome, *, acknowledged: bool = True) -> None:
        self.written.append(outcome)
        if acknowledged:
            self.acked = self.newest()


def ledger(history: Entries) -> Ledger:
    return Ledger(7, history, patience=PATIENCE)


def rules(violations: Sequence[Violation]) -> list[Rule]:
    return [violation.rule for violation in violations]


def test_ledger_event_delivered_once_to_its_target_balances() -> None:
    books = ledger(Entries(HELD, A))
    books.signal()
    before = books.settled
    assert books.count(A) == []
    assert (before, books.settled) == (False, True)
    assert books.totals() == Totals(events=1, delivered=1)
    assert not books.totals().broken


def test_ledger_event_recorded_as_fault_while_broken_balances() -> None:
    books = ledger(Entries(A, FAULT))
    books.signal()
    assert books.count(FAULT) == []
    assert books.totals() == Totals(events=1, faults=1)


def test_ledger_delivery_to_target_before_the_acknowledged_one_is_stale() -> None:
    books = ledger(Entries(A, B))
    books.signal()
    (violation,) = books.count(A)
    assert violation == Violation(Rule.STALE, 7, 1, A, acknowledged=1, newest=1, first=0, entries=(A, B))
    assert books.totals() == Totals(events=1, delivered=1, stale=1)


@pytest.mark.parametrize("outcome", [A, B])
def test_ledger_delivery_while_the_change_is_not_acknowledged_may_be_old_or_new(outcome: Outcome) -> None:
    history = Entries(A)
    books = ledger(history)
    history.write(B, acknowledged=False)
    books.signal()
    assert books.count(outcome) == []


def test_ledger_acknowledgement_after_the_signal_does_not_make_the_delivery_stale() -> None:
    history = Entries(A)
    books = ledger(history)
    books.signal()
    history.write(B)
    assert books.count(A) == []


def test_ledger_delivery_to_target_written_after_the_signal_balances() -> None:
    history = Entries(A)
    books = ledger(history)
    books.signal()
    history.write(B)
    history.write(C, acknowledged=False)
    assert books.count(C) == []


def test_ledger_fault_while_the_entry_is_valid_is_stale() -> None:
    books = ledger(Entries(FAULT, A))
    books.signal()
    assert rules(books.count(FAULT)) == [Rule.STALE]


def test_ledger_delivery_while_broken_is_stale() -> None:
    books = ledger(Entries(A, FAULT))
    books.signal()
    assert rules(books.count(A)) == [Rule.STALE]


def test_ledger_delivery_while_held_is_stale() -> None:
    books = ledger(Entries(A, HELD))
    books.signal()
    assert rules(books.count(A)) == [Rule.STALE]


def test_ledger_event_signalled_while_held_may_be_delivered_afterwards() -> None:
    history = Entries(A, HELD)
    books = ledger(history)
    books.signal()
    history.write(B, acknowledged=False)
    assert books.count(B) == []


def test_ledger_event_signalled_while_held_and_delivered_to_target_before_is_stale() -> None:
    history = Entries(A, HELD)
    books = ledger(history)
    books.signal()
    history.write(B)
    assert rules(books.count(A)) == [Rule.STALE]


def test_ledger_second_delivery_of_one_event_is_duplicated() -> None:
    books = ledger(Entries(A))
    books.signal()
    assert books.count(A) == []
    assert rules(books.count(A)) == [Rule.DUPLICATED]
    assert books.totals() == Totals(events=1, delivered=2, duplicated=1)


def test_ledger_two_deliveries_seen_at_once_are_one_duplicate() -> None:
    books = ledger(Entries(A))
    books.signal()
    assert rules(books.count(A, times=2)) == [Rule.DUPLICATED]


def test_ledger_delivery_and_fault_of_one_event_are_one_duplicate() -> None:
    history = Entries(A)
    books = ledger(history)
    books.signal()
    history.write(FAULT)
    assert books.count(A) == []
    assert rules(books.count(FAULT)) == [Rule.DUPLICATED]


def test_ledger_delivery_without_any_event_is_duplicated() -> None:
    assert rules(ledger(Entries(A)).count(A)) == [Rule.DUPLICATED]


def test_ledger_event_without_outcome_is_lost_once_patience_is_over() -> None:
    books = ledger(Entries(A))
    books.signal()
    assert books.wait(PATIENCE) == []
    assert rules(books.wait(0.1)) == [Rule.LOST]
    assert books.wait(10 * PATIENCE) == []
    assert books.totals() == Totals(events=1, lost=1)
    assert books.totals().coalesced == 0


def test_ledger_waiting_is_not_counted_while_held() -> None:
    history = Entries(A)
    books = ledger(history)
    books.signal()
    assert books.wait(0.6) == []
    history.write(HELD)
    assert books.wait(100 * PATIENCE) == []
    history.write(B)
    assert books.wait(0.3) == []
    assert rules(books.wait(0.3)) == [Rule.LOST]


def test_ledger_holding_again_and_again_does_not_hide_a_loss() -> None:
    history = Entries(A)
    books = ledger(history)
    books.signal()
    found: list[Rule] = []
    for _ in range(12):
        history.write(HELD)
        found += rules(books.wait(0.1))
        history.write(A)
        found += rules(books.wait(0.1))
    assert found == [Rule.LOST]


def test_ledger_each_event_has_the_whole_patience() -> None:
    books = ledger(Entries(A))
    for _ in range(5):
        books.signal()
        assert books.wait(0.9) == []
        assert books.count(A) == []
    assert not books.totals().broken


def test_ledger_burst_with_one_delivery_after_its_last_event_coalesces() -> None:
    books = ledger(Entries(A))
    for _ in range(5):
        books.signal()
    assert books.count(A) == []
    assert books.settled
    assert books.totals().coalesced == 4


def test_ledger_burst_delivered_only_before_its_last_event_is_lost() -> None:
    books = ledger(Entries(A))
    books.signal()
    books.signal()
    assert books.count(A) == []
    books.signal()
    assert not books.settled
    assert rules(books.wait(2 * PATIENCE)) == [Rule.LOST]


def test_ledger_burst_with_more_deliveries_than_events_is_duplicated() -> None:
    books = ledger(Entries(A))
    for _ in range(3):
        books.signal()
    assert rules(books.count(A, times=4)) == [Rule.DUPLICATED]
    assert books.totals().duplicated == 1


def test_ledger_late_delivery_of_an_earlier_burst_is_not_stale() -> None:
    history = Entries(A)
    books = ledger(history)
    books.signal()
    books.signal()
    assert books.count(A) == []
    history.write(B)
    books.signal()
    assert books.count(A) == []  # of the first burst, perhaps: the books cannot tell
    assert books.count(B) == []


def test_ledger_history_no_longer_kept_accuses_nobody() -> None:
    history = Entries(A, kept=2)
    books = ledger(history)
    books.signal()
    for cell in (B, C, B, C):
        history.write(cell)
    assert books.count(A) == []


def test_ledger_count_left_in_the_eventfd_when_all_is_accounted_for_is_duplicated() -> None:
    books = ledger(Entries(A))
    books.signal()
    books.count(A)
    assert books.leftover(0) == []
    assert rules(books.leftover(1)) == [Rule.DUPLICATED]


def test_ledger_count_left_in_the_eventfd_with_open_events_is_lost() -> None:
    books = ledger(Entries(A))
    books.signal()
    books.signal()
    books.count(A)
    assert rules(books.leftover(1)) == [Rule.LOST]


@pytest.mark.parametrize(("outcome", "times"), [(HELD, 1), (A, 0)])
def test_ledger_impossible_count_is_refused(outcome: Outcome, times: int) -> None:
    with pytest.raises(InternalError):
        ledger(Entries(A)).count(outcome, times)


def test_totals_add_up() -> None:
    one = Totals(events=6, delivered=5, faults=1, lost=1, stale=2, duplicated=3)
    assert one + Totals() == one
    assert (one + one).events == 12
    # 6 events: 1 lost, 3 = 5 + 1 - 3 with an outcome of their own, so 2 shared one.
    assert one.coalesced == 2
