"""Cookies: what an invalidation names. A vector carries one; an invalidation covers a range of them.

A cookie is a small integer whose meaning belongs to the remapper: the IRTE index (VT-d), the requester id (AMD-Vi),
the callback (Xen). Narrow invalidations only ever name cookies below ``1 << 16``; a remapper gives a vector that no
narrow invalidation can name (a compatibility-format message, say) the cookie ``UNINDEXED``.
"""

from typing import TypeAlias

import msgspec

Cookie: TypeAlias = int

#: Carried by vectors that only a global invalidation touches.
UNINDEXED: Cookie = 1 << 16


class Scope(msgspec.Struct, frozen=True):
    """The cookies ``first`` to ``last``, both included, that an invalidation covers."""

    first: Cookie
    last: Cookie

    def __contains__(self, cookie: Cookie) -> bool:
        return self.first <= cookie <= self.last

    def describe(self) -> str:
        """``cookies 5-7``, ``cookie 5`` or ``every cookie``."""
        if self == EVERYTHING:
            return "every cookie"
        return f"cookie {self.first:#x}" if self.first == self.last else f"cookies {self.first:#x}-{self.last:#x}"


#: A global invalidation.
EVERYTHING = Scope(0, UNINDEXED)
