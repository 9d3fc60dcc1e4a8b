"""The interleavings of a small world, by running the real code again and again.

The router, its executor and its settler run unchanged, on one thread and on the simulated kernel. Wherever real threads
could be interleaved (the executor's lock is released, a table entry is about to be read or has just been read) the
code comes to a *point*, where other actors may take steps first. Which ones do is a choice; the explorer makes every
combination of choices, depth first, by running the world afresh for each.

Two limits. A run interrupts somebody's step a few times at most (``PREEMPTIONS``); between steps anybody may go on. And
a step taken at a point runs to its end, its own points included, before the interrupted actor goes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol


class InvariantBrokenError(BaseException):
    """One of I1-I7 does not hold; ``trace`` tells how it came to that. Not an Exception: the router survives those."""

    def __init__(self, invariant: str, what: str, trace: list[str]) -> None:
        super().__init__(f"{invariant}: {what}\n" + "\n".join(f"  {n}. {line}" for n, line in enumerate(trace, 1)))
        self.invariant = invariant
        self.trace = trace


class ImpossibleError(BaseException):
    """Threads could not have come this way: one of them would be waiting. The run is given up, and is no finding."""


@dataclass
class Choices:
    """The choices of one run: those of ``prefix`` first, then always the first one."""

    prefix: list[int]
    made: list[tuple[int, int]] = field(default_factory=list)  # (taken, out of)

    def choose(self, options: int) -> int:
        """One of ``options`` alternatives, numbered from 0."""
        at = len(self.made)
        taken = self.prefix[at] if at < len(self.prefix) else 0
        self.made.append((taken, options))
        return taken

    def next_prefix(self) -> list[int] | None:
        """The prefix of the next run in depth-first order; None after the last."""
        made = list(self.made)
        while made:
            taken, options = made.pop()
            if taken + 1 < options:
                return [choice for choice, _ in made] + [taken + 1]
        return None


class Actor(Protocol):
    """Somebody who takes steps."""

    name: str

    def enabled(self) -> bool:
        """Whether a step can be taken now."""
        ...

    def step(self) -> None:
        """Take one."""
        ...


class Script:
    """An actor that follows a script: each item of the generator is one step, told in words."""

    def __init__(self, name: str, steps: Iterator[None]) -> None:
        self.name = name
        self._steps = steps
        self._busy = False
        self.done = False

    def enabled(self) -> bool:
        return not (self._busy or self.done)

    def step(self) -> None:
        self._busy = True  # at a point inside this step others may go on, but not this one
        try:
            next(self._steps)
        except StopIteration:
            self.done = True
        finally:
            self._busy = False


@dataclass
class Report:
    """How much was explored."""

    runs: int
    longest: int


def explore(run: Callable[[Choices], None], *, runs_max: int) -> Report:
    """Run with every combination of choices. Raises what a run raises; ``AssertionError`` if there are too many."""
    prefix: list[int] | None = []
    runs = longest = 0
    while prefix is not None:
        choices = Choices(prefix)
        try:
            run(choices)
        except ImpossibleError:
            pass
        runs += 1
        longest = max(longest, len(choices.made))
        assert runs <= runs_max, f"more than {runs_max} interleavings: make the world smaller"
        prefix = choices.next_prefix()
    return Report(runs, longest)
