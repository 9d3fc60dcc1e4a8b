import hypothesis.strategies as st
from hypothesis import given

from irqrouter.core.cookies import CookieIndex
from irqrouter.scope import EVERYTHING, UNINDEXED, Scope

cookies = st.integers(0, UNINDEXED)


@given(st.lists(st.tuples(cookies, st.booleans()), max_size=60), st.tuples(cookies, cookies).map(sorted))
def test_matching_any_history_equals_a_walk_over_all(history: list[tuple[int, bool]], ends: list[int]) -> None:
    index = CookieIndex()
    held: dict[int, int] = {}
    for vector, (cookie, leaves) in enumerate(history):
        index.add(cookie, vector)
        held[vector] = cookie
        if leaves:
            gone = min(held)
            index.discard(held.pop(gone), gone)
    for scope in (Scope(*ends), Scope(ends[0], ends[0]), EVERYTHING):
        assert sorted(index.matching(scope)) == sorted(v for v, cookie in held.items() if cookie in scope)
        assert index.count(scope) == len(index.matching(scope))


def test_matching_of_a_narrow_scope_touches_neither_other_cookies_nor_unindexed_vectors() -> None:
    index = CookieIndex()
    for vector, cookie in enumerate((4, 5, 5, 6, UNINDEXED)):
        index.add(cookie, vector)
    assert sorted(index.matching(Scope(5, 5))) == [1, 2]
    assert sorted(index.matching(Scope(0, 0xFFFF))) == [0, 1, 2, 3]
    assert sorted(index.matching(EVERYTHING)) == [0, 1, 2, 3, 4]


def test_scope_describes_itself() -> None:
    assert [Scope(5, 5).describe(), Scope(5, 0x12).describe(), EVERYTHING.describe()] == [
        "cookie 0x5",
        "cookies 0x5-0x12",
        "every cookie",
    ]
