"""One run of the proof: a VM, devices that fire, a guest's driver that changes everything meanwhile, and the books.

Where everything runs:

* the caller's event loop: the router (or, where an agent routes, nothing), and :func:`prove` itself, which only waits
  and watches;
* ``drivers`` threads: the guest's driver, each with vectors of its own (``driver.py``);
* device processes: they fire and keep the books (``devices.py``);
* a thread for each vCPU, inside ``KVM_RUN`` all the time (``machine.py``).

Nothing here waits for ever: every wait has an end, after which the run fails and says where it stood.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, Final

import msgspec

from irqrouter.core.vectors import Vector, VectorStatus
from irqrouter.errors import CallerError, IrqrouterError
from irqrouter.eventfd_loop import Router
from irqrouter.iommu.fault import Fault
from irqrouter.iommu_remap import VtdFault, VtdRemapper
from irqrouter.proof.board import AHEAD, WORKERS_MAX, Board
from irqrouter.proof.devices import Devices, Plan, Report
from irqrouter.proof.driver import IRTA, SLOTS, Driver, Wire
from irqrouter.proof.guest import Pairs
from irqrouter.proof.ledger import Totals, Violation
from irqrouter.proof.machine import Machine
from irqrouter.proof.routing import Opener, Side

#: How often the run looks at the board.
_LOOK_S: Final = 0.05
#: How long a driver waits for the devices before it goes on, and how often it looks.
_AHEAD_S: Final = 0.005
_AHEAD_LOOK_S: Final = 0.0002
#: Vectors of one device, which share its requester id.
_FUNCTION_VECTORS: Final = 4


class StalledError(IrqrouterError):
    """The run did not get on; the router, or the harness, hangs."""


class EscapedError(IrqrouterError):
    """An exception left a thread of the router, or a callback on its loop. It is this error's cause."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is to be.

    It ends after ``events`` events; or, with None, after ``seconds``, and then as soon as ``events_min`` events and
    ``invalidations_min`` invalidations have been reached.

    ``device_processes`` and ``drivers`` (threads) share the ``vectors`` out evenly. Devices fire bursts of 1 to
    ``burst`` events. Drivers make one change for every ``events_per_change`` events, and whoever is ahead waits, so
    that a run contains the same on a busy machine as on an idle one; ``steady_drivers`` of them remove and add nothing.
    An event is lost when nothing came of it in ``patience`` seconds. ``seed`` decides every choice.
    """

    vcpus: int
    vectors: int
    device_processes: int
    drivers: int
    seed: int
    events_per_change: int
    steady_drivers: int = 0
    events: int | None = None
    seconds: float = 0.0
    events_min: int = 0
    invalidations_min: int = 0
    burst: int = 1
    patience: float = 10.0


class Progress(msgspec.Struct, frozen=True):
    """How far a run has come."""

    seconds: float
    events: int
    invalidations: int
    faults: int
    wakeups: int
    wakeups_while_assigned: int
    vectors: list[VectorStatus]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """How a run came out. ``strays`` are deliveries that the guest counted and no event explains."""

    backend: str
    seed: int
    totals: Totals
    strays: int
    invalidations: int
    steps: int
    caught: int
    wakeups: int
    wakeups_while_assigned: int
    seconds: float
    violations: list[Violation]
    #: Who caught, and what is known about wakeups and by whom, if anything is: for people.
    catcher: str = "the loop"
    asleep: str = ""

    @property
    def duplicated(self) -> int:
        """Deliveries that were one too many. A stray count is a delivery that no event asked for."""
        return self.totals.duplicated + abs(self.strays)

    @property
    def good(self) -> bool:
        """Every rule held."""
        return not (self.totals.broken or self.strays or self.wakeups_while_assigned)


class Embedded(Side[Vector]):
    """A router on the caller's event loop."""

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self._router = router

    def caught(self, vector: Vector) -> int:
        """See :meth:`Side.caught`."""
        return vector.caught

    def wakeups(self) -> int:
        """See :meth:`Side.wakeups`."""
        return self._router.wakeups

    def wakeups_while_assigned(self) -> int:
        """See :meth:`Side.wakeups_while_assigned`."""
        return self._router.wakeups_while_assigned


@contextlib.asynccontextmanager
async def embedded(machine: Machine, board: Board) -> AsyncGenerator[Embedded]:
    """A router on this event loop, with a VT-d unit over the machine's memory."""
    memory = machine.ram.memory()
    try:
        remapper = VtdRemapper(memory)
        remapper.set_interrupt_remap_table(IRTA)
        remapper.set_remapping(True)
        async with Router(machine.vm, remapper, on_fault=_recorder(board)) as router:
            yield Embedded(router)
    finally:
        memory.close()


async def prove(
    scenario: Scenario,
    machine: Machine,
    watch: Callable[[Progress], None],
    *,
    watch_every: float = 0.25,
    opener: Opener = embedded,
) -> Summary:
    """Run ``scenario`` on ``machine``, which is left to the caller to close, with the routing side of ``opener``.

    ``watch`` is told how it goes, on a thread of its own. Raises :class:`StalledError`,
    :class:`~irqrouter.proof.devices.DevicesFailedError`, what a verb raised, and what :meth:`Side.check` does.
    """
    pairs = Pairs(scenario.vcpus, scenario.vectors)
    for name, count in ("device processes", scenario.device_processes), ("drivers", scenario.drivers):
        if not 1 <= count <= min(scenario.vectors, WORKERS_MAX):
            raise CallerError(f"{count} {name}", f"must be 1 to {min(scenario.vectors, WORKERS_MAX)}")
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(Board.create(scenario.vectors))
        wires: list[Wire] = []
        for number in range(scenario.vectors):
            eventfd = machine.eventfd()
            stack.callback(machine.close_eventfd, eventfd)
            wires.append(Wire(number, eventfd, requester=(number // _FUNCTION_VECTORS + 1) << 3))
        errors = stack.enter_context(_escaping())
        async with opener(machine, board) as side:
            run = _Run(scenario, machine, board, side, pairs, wires, errors)
            try:
                await run.begin()
                await run.watch(watch, watch_every)
                reports = await run.finish()
                summary = await asyncio.to_thread(run.summary, reports)
            finally:
                await run.close()
        if errors:
            raise errors[0]
        # The side is closed: nothing is delivered any more.
        totals, strays = _with_late(summary.totals, sum(machine.ram.cells))
        return msgspec.structs.replace(summary, totals=totals, strays=strays)


def _with_late(totals: Totals, counted: int) -> tuple[Totals, int]:
    """The totals with what the guest ``counted`` after the books were closed, and how much of that is too much.

    Nothing is delivered any more. Events that coalesced may have had an outcome after all. What
    is left was delivered twice, too late, or to somebody else.
    """
    if totals.broken:  # which ended the run at once, with events on their way
        return totals, 0
    late = counted - totals.delivered
    outcomes = min(max(0, late), totals.coalesced)
    return msgspec.structs.replace(totals, delivered=totals.delivered + outcomes), late - outcomes


def _recorder(board: Board) -> Callable[[Vector, Fault], None]:
    """The fault record: it counts each fault for the vector whose IRTE it names."""
    histories = [board.history(number) for number in range(board.vectors)]

    def record(vector: Vector, fault: Fault) -> None:
        del vector  # a handle; it is given out only after faults may have come of it
        if isinstance(fault, VtdFault) and fault.index is not None:
            histories[fault.index // SLOTS].say_fault()

    return record


@contextlib.contextmanager
def _escaping() -> Generator[list[BaseException]]:
    """Gather the exceptions that leave a thread or a callback, which otherwise nobody would hear of."""
    errors: list[BaseException] = []
    loop = asyncio.get_running_loop()
    loop_handler, thread_hook = loop.get_exception_handler(), threading.excepthook

    def add(where: str, error: object) -> None:
        escaped = EscapedError(where, f"let escape {error!r}")
        escaped.__cause__ = error if isinstance(error, BaseException) else None
        errors.append(escaped)

    def from_loop(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        add("the event loop", context.get("exception"))
        loop.default_exception_handler(context)

    def from_thread(arguments: threading.ExceptHookArgs) -> None:
        add(arguments.thread.name if arguments.thread else "a thread", arguments.exc_value)
        thread_hook(arguments)

    loop.set_exception_handler(from_loop)
    threading.excepthook = from_thread
    try:
        yield errors
    finally:
        threading.excepthook = thread_hook
        loop.set_exception_handler(loop_handler)


class _Run:
    """The threads and processes of one run."""

    def __init__(
        self,
        scenario: Scenario,
        machine: Machine,
        board: Board,
        side: Side[Any],
        pairs: Pairs,
        wires: Sequence[Wire],
        errors: list[BaseException],
    ) -> None:
        self._began = time.monotonic()
        self.drivers: list[Driver[Any]] = [
            Driver(
                side,
                machine.ram,
                board,
                pairs,
                wires[number :: scenario.drivers],
                f"{scenario.seed}/driver/{number}",
                replug=number >= scenario.steady_drivers,
            )
            for number in range(scenario.drivers)
        ]
        self._scenario = scenario
        self._machine = machine
        self._board = board
        self._side = side
        self._wires = wires
        self._devices: list[Devices] = []
        self._stop = threading.Event()
        self._errors = errors
        self._threads = [
            # Daemons: one that hangs in a verb must not keep the process alive.
            threading.Thread(target=self._drive, args=(number, driver), name=f"driver-{number}", daemon=True)
            for number, driver in enumerate(self.drivers)
        ]

    @property
    def seconds(self) -> float:
        """Since the first event."""
        return time.monotonic() - self._began

    @property
    def invalidations(self) -> int:
        """Invalidations so far, of all drivers."""
        return sum(driver.invalidations for driver in self.drivers)

    async def begin(self) -> None:
        """Add the vectors, start the devices, start the drivers."""
        for driver in self.drivers:
            await asyncio.to_thread(driver.populate)
        async with self._side.quiet(self._board, self._scenario.device_processes):
            self._start_devices()
        for thread in self._threads:
            thread.start()

    def _start_devices(self) -> None:
        scenario = self._scenario
        self._began = time.monotonic()
        for number in range(scenario.device_processes):
            events = None
            if scenario.events is not None:
                events = scenario.events // scenario.device_processes + (
                    number < scenario.events % scenario.device_processes
                )
            plan = Plan(
                device=number,
                eventfds={wire.number: wire.eventfd for wire in self._wires[number :: scenario.device_processes]},
                ram=self._machine.ram.fd,
                board=self._board.fd,
                vcpus=scenario.vcpus,
                vectors=scenario.vectors,
                events=events,
                burst=scenario.burst,
                events_per_change=scenario.events_per_change,
                seed=f"{scenario.seed}/device",
                patience=scenario.patience,
            )
            self._devices.append(self._machine.devices(plan, self._board))

    async def watch(self, watch: Callable[[Progress], None], every: float) -> None:
        """Until the devices have fired their last event, or something went wrong."""
        next_watch = 0.0
        while not (self._board.drained(self._scenario.device_processes) or self._board.violated):
            await asyncio.sleep(_LOOK_S)
            self._check()
            if self._enough():
                self._board.say_stop()
            if self.seconds >= next_watch:
                next_watch = self.seconds + every
                await asyncio.to_thread(lambda: watch(self._progress()))
        await asyncio.to_thread(lambda: watch(self._progress()))

    async def finish(self) -> list[Report]:
        """Let everything come to rest and collect the books."""
        self._board.say_stop()
        await self._stop_drivers()
        self._check()
        patience = 3 * self._scenario.patience
        return [await asyncio.to_thread(devices.report, patience) for devices in self._devices]

    def summary(self, reports: Sequence[Report]) -> Summary:
        """How it came out, as long as the side is there to be asked. The guest's counts are still to be compared."""
        totals = sum((report.totals for report in reports), Totals())
        return Summary(
            backend=self._machine.backend,
            seed=self._scenario.seed,
            totals=totals,
            strays=0,
            invalidations=self.invalidations,
            steps=sum(driver.steps for driver in self.drivers),
            caught=sum(driver.caught() for driver in self.drivers),
            wakeups=self._side.wakeups(),
            wakeups_while_assigned=self._side.wakeups_while_assigned(),
            seconds=self.seconds,
            violations=[violation for report in reports for violation in report.violations],
            catcher=self._side.catcher,
            asleep=self._side.asleep(totals.events),
        )

    async def close(self) -> None:
        """Whatever happened: stop the drivers, end the devices."""
        try:
            await self._stop_drivers()
        finally:
            for devices in self._devices:
                devices.close()

    def _enough(self) -> bool:
        scenario = self._scenario
        return (
            scenario.events is None
            and self.seconds >= scenario.seconds
            and self._board.events() >= scenario.events_min
            and self.invalidations >= scenario.invalidations_min
            and self._side.enough()
        )

    def _progress(self) -> Progress:
        return Progress(
            seconds=self.seconds,
            events=self._board.events(),
            invalidations=self.invalidations,
            faults=self._board.faults(),
            wakeups=self._side.wakeups(),
            wakeups_while_assigned=self._side.wakeups_while_assigned(),
            vectors=self._side.routing.vectors(),
        )

    def _check(self) -> None:
        if self._errors:
            raise self._errors[0]
        self._side.check()
        for devices in self._devices:
            if devices.failed:
                devices.report(0)

    def _drive(self, number: int, driver: Driver[Any]) -> None:
        try:
            while not self._stop.is_set():
                self._await_events()
                driver.step()
                self._board.say_steps(number, driver.steps)
            driver.release()
        except Exception as error:  # noqa: BLE001 - handed on by _check(), whatever it is
            self._errors.append(error)

    def _await_events(self) -> None:
        """Wait while the drivers are ahead of the devices, but not for long: all that could fire may be held by us."""
        deadline = time.monotonic() + _AHEAD_S
        while self._board.lead(self._scenario.events_per_change) < -AHEAD and time.monotonic() < deadline:
            self._stop.wait(_AHEAD_LOOK_S)

    async def _stop_drivers(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.ident is None:
                continue  # begin() did not get so far
            await asyncio.to_thread(thread.join, self._scenario.patience)
            if thread.is_alive():
                raise StalledError(thread.name, f"did not come back from a verb in {self._scenario.patience} s")
