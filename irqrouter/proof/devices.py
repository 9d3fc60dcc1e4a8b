"""Devices that fire, and keep the books of what became of it.

On a real kernel they are a process of their own (``python -m irqrouter.proof.devices``) which has inherited the
eventfds, guest memory and the notice board: it fires while the router's process decides, neither holding up the other
with its interpreter lock. On the simulated kernel they are a thread, because its eventfds exist only in one process.

A device has one *burst* of events outstanding per vector, and fires the next when there was an outcome after the last
event of the one before. With bursts of one event (a handshake) every event is told from every other and must be
accounted for by itself; in longer bursts events may coalesce (``ledger.py``).
"""

import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Final, Protocol

import msgspec

from irqrouter.errors import InternalError, IrqrouterError
from irqrouter.proof.board import AHEAD, Board, BoardHistory
from irqrouter.proof.guest import Pairs, Ram
from irqrouter.proof.ledger import FAULT, Ledger, Totals, Violation

#: How often the clock is looked at: long against a round of the loop below, short against any patience.
_TICK_S: Final = 0.02

#: Before one event in this many a vector rests, for at most so long: see :meth:`_Source.rests`.
_RESTS_ONE_IN: Final = 32
_REST_MAX_NS: Final = 4_000_000

#: Violations a report quotes in full. The totals count them all.
_QUOTED: Final = 20


class Plan(msgspec.Struct, frozen=True):
    """What one device process is to do.

    ``eventfds`` maps the device vectors it fires to their descriptors; ``ram`` and ``board`` are descriptors too.
    ``events`` is how many it fires at most (None: until told to stop), in bursts of 1 to ``burst``. With more than
    ``events_per_change`` events to one of the drivers' changes it waits for the drivers. An event is lost when nothing
    came of it in ``patience`` seconds.
    """

    device: int
    eventfds: dict[int, int]
    ram: int
    board: int
    vcpus: int
    vectors: int
    events: int | None
    burst: int
    events_per_change: int
    seed: str
    patience: float


class Report(msgspec.Struct, frozen=True):
    """What a device process has in its books at the end."""

    totals: Totals
    violations: list[Violation]


class DevicesFailedError(IrqrouterError):
    """A device process ended without a report."""


class Devices(Protocol):
    """Devices that were started, wherever they run."""

    @property
    def failed(self) -> bool:
        """They ended before their time; :meth:`report` says why."""
        ...

    def report(self, timeout: float) -> Report:
        """Wait for the end and return what is in the books. Raises :class:`DevicesFailedError`."""
        ...

    def close(self) -> None:
        """End them if they still run. Idempotent."""
        ...


class _Source:
    """One vector, as the device sees it: it signals the eventfd, and looks at the counters and the fault record."""

    def __init__(
        self, ledger: Ledger, history: BoardHistory, fd: int, ram: Ram, cells: range, rng: random.Random
    ) -> None:
        self.ledger = ledger
        self.fd = fd
        self._rng = rng
        self._resume_ns = 0
        self._history = history
        self._ram = ram
        self._first, self._last = cells.start, cells.stop
        self._snapshot = ram.snapshot(self._first, self._last)
        self._counts = list(ram.cells[self._first : self._last])
        self._faults = history.faults()

    def rests(self, now_ns: int) -> bool:
        """Whether to let the vector be for now, although its next event may be fired.

        A second delivery of an event can only be told from the delivery of the next one while there is no next one. And
        interrupts are not always busy when they are changed.
        """
        if self._resume_ns:
            if now_ns < self._resume_ns:
                return True
            self._resume_ns = 0
        elif not self._rng.randrange(_RESTS_ONE_IN):
            self._resume_ns = now_ns + 1 + self._rng.randrange(_REST_MAX_NS)
            return True
        return False

    def burst(self, longest: int) -> int:
        """How many events to fire now, at most ``longest``."""
        return self._rng.randint(1, longest)

    def fire(self, signal: Callable[[int], None], burst: int) -> list[Violation]:
        """Signal ``burst`` events."""
        broken: list[Violation] = []
        for _ in range(burst):
            broken += self.look()
            self.ledger.signal()
            signal(self.fd)
        self._history.say_events(self.ledger.events)
        return broken

    def look(self) -> list[Violation]:
        """Book every outcome since the last look."""
        snapshot = self._ram.snapshot(self._first, self._last)
        faults = self._history.faults()
        if snapshot == self._snapshot and faults == self._faults:
            return []
        broken: list[Violation] = []
        # The snapshot is a copy that need not be atomic; what is counted is loaded cell by cell. A count that comes
        # after the snapshot makes the next comparison differ once for nothing.
        self._snapshot = snapshot
        for index, old in enumerate(self._counts):
            cell = self._first + index
            new = self._ram.cells[cell]
            if new != old:
                self._counts[index] = new
                broken += self.ledger.count(cell, (new - old) % (1 << 32))
        if faults != self._faults:
            times, self._faults = (faults - self._faults) % (1 << 32), faults
            broken += self.ledger.count(FAULT, times)
        return broken


def fire(
    plan: Plan,
    ram: Ram,
    board: Board,
    *,
    signal: Callable[[int], None],
    pending: Callable[[int], int],
    relax: Callable[[], None],
    abandoned: Callable[[], bool],
) -> Report:
    """Fire until the plan's events are used up or the board says stop, and until every event is accounted for.

    ``signal(fd)`` adds one to an eventfd and ``pending(fd)`` tells what it holds; ``relax()`` is called when there was
    nothing to do. A broken rule ends the firing, is told on the board, and stands in the report. Raises
    :class:`DevicesFailedError` when ``abandoned()``.
    """
    pairs = Pairs(plan.vcpus, plan.vectors)
    sources: list[_Source] = []
    for vector, fd in plan.eventfds.items():
        history = board.history(vector)
        ledger = Ledger(vector, history, patience=plan.patience)
        rng = random.Random(f"{plan.seed}/{vector}")
        sources.append(_Source(ledger, history, fd, ram, pairs.cells(vector), rng))
    left = plan.events
    violations: list[Violation] = []
    looked_ns = time.monotonic_ns()
    while not violations:
        firing = not board.stop and (left is None or left > 0)
        if not firing:
            board.say_drained(plan.device)
        waits = board.lead(plan.events_per_change) > AHEAD
        waiting = progress = 0
        now_ns = time.monotonic_ns()
        for source in sources:
            violations += source.look()
            if not source.ledger.settled:
                waiting += 1
            elif firing and not waits and (left is None or left > 0) and not source.rests(now_ns):
                burst = source.burst(plan.burst if left is None else min(plan.burst, left))
                if left is not None:
                    left -= burst
                violations += source.fire(signal, burst)
                progress += 1
        if not firing and not waiting:
            break
        seconds = (now_ns - looked_ns) / 1e9
        if seconds > _TICK_S:
            looked_ns = now_ns
            if abandoned():
                raise DevicesFailedError(f"device process {plan.device}", "nobody waits for its report any more")
            for source in sources:
                # A process that was not run for long must look before it complains.
                violations += source.look() or source.ledger.wait(min(seconds, 10 * _TICK_S))
        if not progress:
            relax()
    if not violations:
        violations += _at_rest(sources, pending, relax, plan.patience)
    board.say_drained(plan.device)
    if violations:
        board.say_violated()
    totals = sum((source.ledger.totals() for source in sources), Totals())
    return Report(totals, violations[:_QUOTED])


def _at_rest(
    sources: Sequence[_Source], pending: Callable[[int], int], relax: Callable[[], None], patience: float
) -> list[Violation]:
    """Every event is accounted for: now no eventfd may hold a count, nor a counter move any more.

    A count may be there for a moment: the one that the router discards after it has assigned an irqfd.
    """
    deadline = time.monotonic() + patience
    while any(pending(source.fd) for source in sources) and time.monotonic() < deadline:
        relax()
    violations: list[Violation] = []
    for source in sources:
        violations += source.look()
        violations += source.ledger.leftover(pending(source.fd))
    return violations


class DeviceProcess:
    """``fire`` in a process of its own."""

    def __init__(self, plan: Plan) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, msgspec.json.encode(plan).decode()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=[*plan.eventfds.values(), plan.ram, plan.board],
            # Ctrl-C is for the command: it stops the run, and the devices with it.
            process_group=0,
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def failed(self) -> bool:
        """It ended with an error."""
        return bool(self._process.poll())

    def report(self, timeout: float) -> Report:
        """See :meth:`Devices.report`."""
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise DevicesFailedError(
                f"device process {self._process.pid}", f"must report within {timeout:.0f} s"
            ) from None
        if self._process.returncode:
            raise DevicesFailedError(
                f"device process {self._process.pid}", f"ended with status {self._process.returncode}"
            )
        return msgspec.json.decode(output, type=Report)

    def close(self) -> None:
        """See :meth:`Devices.close`."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        _pipe(self._process.stdout).close()


class DeviceThread:
    """``fire`` on a thread, for eventfds which only this process has."""

    def __init__(
        self,
        plan: Plan,
        ram: Ram,
        board: Board,
        *,
        signal: Callable[[int], None],
        pending: Callable[[int], int],
    ) -> None:
        self._report: Report | None = None
        self._error: BaseException | None = None
        self._closing = threading.Event()

        def run() -> None:
            try:
                self._report = fire(
                    plan,
                    ram,
                    board,
                    signal=signal,
                    pending=pending,
                    relax=lambda: time.sleep(0),  # lets go of the interpreter lock
                    abandoned=self._closing.is_set,
                )
            except Exception as error:  # noqa: BLE001 - handed on by report(), whatever it is
                self._error = error

        self._thread = threading.Thread(target=run, name=f"devices-{plan.device}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """It ended with an error."""
        return self._error is not None

    def report(self, timeout: float) -> Report:
        """See :meth:`Devices.report`."""
        self._thread.join(timeout)
        if self._report is None:
            raise DevicesFailedError(self._thread.name, f"must report within {timeout:.0f} s") from self._error
        return self._report

    def close(self) -> None:
        """See :meth:`Devices.close`."""
        self._closing.set()
        self._thread.join()


def _relax() -> None:
    # Sleep, not spin: the grace periods behind KVM_IRQFD and KVM_SET_GSI_ROUTING are worked off by kernel threads, and
    # on a machine with few CPUs a spinning process makes each of their steps wait for its turn.
    time.sleep(0.00005)


class _Eventfds:
    """The eventfds of a device process: signalled by a write, watched by ``poll``, which takes nothing."""

    def __init__(self) -> None:
        self._poll = select.poll()

    def signal(self, fd: int) -> None:
        os.eventfd_write(fd, 1)

    def pending(self, fd: int) -> int:
        self._poll.register(fd, select.POLLIN)
        ready = self._poll.poll(0)
        self._poll.unregister(fd)
        return len(ready)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise InternalError("a device process", "its standard output is a pipe")
    return stream


def main(arguments: Sequence[str]) -> int:
    """The device process: the plan as JSON in the only argument; the report as JSON on standard output."""
    plan = msgspec.json.decode(arguments[0], type=Plan)
    eventfds = _Eventfds()
    parent = os.getppid()
    try:
        with Ram(plan.ram) as ram, Board(plan.board, plan.vectors) as board:
            report = fire(
                plan,
                ram,
                board,
                signal=eventfds.signal,
                pending=eventfds.pending,
                relax=_relax,
                abandoned=lambda: os.getppid() != parent,
            )
    except (DevicesFailedError, OSError) as error:
        print(f"device process {plan.device}: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
