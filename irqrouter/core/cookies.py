"""Which vectors carry which cookie."""

import bisect

from irqrouter.scope import Cookie, Scope


class CookieIndex:
    """Vectors by cookie. An invalidation costs what it matches, never a walk over every vector.

    ``matching`` is O(log n + matches) for any range. A vector id may stand under one cookie only.
    """

    def __init__(self) -> None:
        self._vectors: dict[Cookie, set[int]] = {}
        self._sorted: list[Cookie] = []  # the keys of _vectors, for ranges

    def add(self, cookie: Cookie, vector: int) -> None:
        """Put ``vector`` under ``cookie``."""
        holders = self._vectors.get(cookie)
        if holders is None:
            self._vectors[cookie] = {vector}
            bisect.insort(self._sorted, cookie)
        else:
            holders.add(vector)

    def discard(self, cookie: Cookie, vector: int) -> None:
        """Take ``vector`` away from ``cookie``."""
        holders = self._vectors[cookie]
        holders.discard(vector)
        if not holders:
            del self._vectors[cookie]
            del self._sorted[bisect.bisect_left(self._sorted, cookie)]

    def matching(self, scope: Scope) -> list[int]:
        """The vectors whose cookie is in ``scope``, in the order of their cookies."""
        if scope.first == scope.last:
            return list(self._vectors.get(scope.first, ()))
        return [vector for cookie in self._within(scope) for vector in self._vectors[cookie]]

    def count(self, scope: Scope) -> int:
        """How many vectors have a cookie in ``scope``."""
        if scope.first == scope.last:
            return len(self._vectors.get(scope.first, ()))
        return sum(len(self._vectors[cookie]) for cookie in self._within(scope))

    def _within(self, scope: Scope) -> list[Cookie]:
        start = bisect.bisect_left(self._sorted, scope.first)
        return self._sorted[start : bisect.bisect_right(self._sorted, scope.last)]
