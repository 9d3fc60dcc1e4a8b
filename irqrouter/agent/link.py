"""The agent's thread: connects, says again what the service must know, then receives; for ever."""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from irqrouter.agent.connection import Connection, TimedOutError, UnansweredError, Waiter
from irqrouter.agent.page import Doorbell, Shown, StatePage
from irqrouter.core.vectors import Vector
from irqrouter.errors import CallerError, IrqrouterError, KernelError
from irqrouter.kvm.executor import Executor
from irqrouter.memory import MemfdMemory, MemoryRegion, RegionError
from irqrouter.service import wire
from irqrouter.service.wire import Code, Command, Frame, Kind, Operation, WireError

log = structlog.get_logger("irqrouter")

#: Pauses between attempts to connect.
PAUSE_MIN_S, PAUSE_MAX_S = 0.01, 1.0
#: How long the service has to answer HELLO, MEMORY or one ADD.
PATIENCE_S = 2.0
#: Where a PING cannot be sent it is tried again after this.
PING_AGAIN_S = 0.01

#: What an agent that has no ``PREPARE`` carries out.
_IN_BATCH: Final = wire.IN_BATCH - {Kind.PREPARE}
#: What the reply to INVALIDATE may have.
_IN_WIDE: Final = frozenset({Kind.SET_ROUTE})


class Memory(msgspec.Struct):
    """Guest memory as ``MEMORY`` tells it."""

    payload: bytes
    descriptors: list[int]


class Link:
    """The connection to the service at ``path``, as long as there is one, and the thread that sees to it.

    ``carry_out`` is given a batch's operations and ``translated`` those of a TRANSLATE; None: there is none to expect.
    """

    def __init__(
        self,
        path: str,
        hello: wire.Hello,
        shown: Shown,
        executor: Executor,
        *,
        carry_out: Callable[[Sequence[Operation]], list[int]],
        translated: Callable[[Sequence[Operation]], list[Operation]] | None,
    ) -> None:
        self._path = path
        self._hello = hello
        self._hello_payload = wire.encode_hello(hello)
        self._shown = shown
        self._executor = executor
        self._carry_out = carry_out
        self._translated = translated
        self._memory: Memory | None = None
        self._setting_memory = threading.Lock()  # taken by set_memory alone, and held while it waits
        self._ready: Connection | None = None
        self._lock = threading.Lock()  # _ready, _memory, and which vectors were introduced to whom
        self._connected = threading.Event()
        #: How often a service came to know everything.
        self.times_connected = 0
        self._closing = threading.Event()
        self._wake = Doorbell()
        self._thread = threading.Thread(target=self._run, name="irqrouter-agent", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # --- for the verbs -------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the service knows all there is to know."""
        return self._ready is not None

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until it does, or not."""
        return self._connected.wait(timeout_s)

    def wide(self) -> Connection | None:
        """The connection on which a wide invalidation may be asked for now."""
        ready = self._ready
        if ready is None or ready.breaker_open or ready.broken is not None or ready.welcome is None:
            return None
        return ready if wire.Feature.WIDE in ready.welcome.features else None

    def invalidate(self, connection: Connection, payload: bytes, within_s: float) -> list[Operation]:
        """The routes for a wide invalidation; :class:`UnansweredError`: there are none, and the breaker may be open."""
        try:
            payloads = connection.ask(Command.INVALIDATE, payload, within_s=within_s)
        except TimedOutError:
            connection.breaker_open = True
            self._wake.ring()  # it sends a PING
            raise
        return self._operations(connection, payloads, _IN_WIDE)

    def seat(self, vectors: Sequence[Vector]) -> Connection | None:
        """Give ``vectors`` their slots; returns the connection on which the caller must introduce them.

        None: there is none now, and whichever comes next will be told.
        """
        with self._lock:
            self._shown.seat(vectors)
            self._executor.show(vectors)  # before anybody is told of them
            if self._ready is not None:
                self._ready.introduced.update(vector.id for vector in vectors)
            return self._ready

    def introduce(self, connection: Connection, vectors: Sequence[Vector]) -> list[Operation]:
        """``ADD`` new vectors; what to do about them. :class:`~irqrouter.service.wire.WireError`: they were refused."""
        operations: list[Operation] = []
        for at in range(0, len(vectors), wire.DESCRIPTORS_MAX):
            added, descriptors = self._added(vectors[at : at + wire.DESCRIPTORS_MAX], new=True)
            try:
                if not added:
                    continue
                payload = wire.encode_add(added)
                payloads = connection.ask_patiently(Command.ADD, payload, descriptors, within_s=PATIENCE_S)
            except UnansweredError:
                self._wake.ring()  # the next connection is told of all of them
                raise
            finally:
                _close_all(descriptors)
            operations += self._operations(connection, payloads, wire.IN_REPLY)
        return operations

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Tell the service where guest memory is, now and in every later connection."""
        memory = _memory(regions)
        with self._setting_memory:
            with self._lock:
                if self._closing.is_set():
                    _close_all(memory.descriptors)
                    raise CallerError("the agent", "is closed")
                before, self._memory = self._memory, memory
                ready = self._ready
                descriptors = _duplicates(memory.descriptors) if ready is not None else []
                _close_all([] if before is None else before.descriptors)
            if ready is None:
                return
            try:
                ready.ask_patiently(Command.MEMORY, memory.payload, descriptors, within_s=PATIENCE_S)
            except UnansweredError:
                self._wake.ring()  # the next connection is told
            finally:
                _close_all(descriptors)

    def close(self) -> None:
        """Leave the service and end the thread. Idempotent."""
        if threading.current_thread() is self._thread:
            raise CallerError("the agent", "cannot be closed from one of its own callbacks")
        self._closing.set()
        self._wake.ring()
        self._thread.join()
        self._wake.close()
        with self._lock:
            memory, self._memory = self._memory, None
        _close_all([] if memory is None else memory.descriptors)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause, complained = PAUSE_MIN_S, False
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                self._hold_a_connection()
            except (OSError, IrqrouterError) as error:
                if self._closing.is_set():
                    return
                if not complained:
                    log.warning("no service", vm=self._hello.name, path=self._path, reason=str(error))
            except Exception:  # a callback of the embedder's, or a bug: the VM must not be left without a service
                log.exception("the connection with the service is given up", vm=self._hello.name)
            complained = True
            if time.monotonic() - began > PAUSE_MAX_S:  # it has been there: this is another outage
                pause, complained = PAUSE_MIN_S, False
            self._pause(pause)
            pause = min(2 * pause, PAUSE_MAX_S)

    def _pause(self, pause_s: float) -> None:
        until = time.monotonic() + pause_s
        while not self._closing.is_set() and (left := until - time.monotonic()) > 0:
            _poll({self._wake.fileno(): select.POLLIN}, left)
            self._hear()

    def _hold_a_connection(self) -> None:
        connection, theirs = self._connect()
        try:
            self._greet(connection, theirs)
            self._replay(connection)
            log.info("connected", vm=self._hello.name, path=self._path)
            self._connected.set()
            ping: Waiter | None = None
            while True:
                ping = self._close_breaker(connection, ping)
                again = connection.breaker_open and ping is None
                self._turn(connection, PING_AGAIN_S if again else None)
        finally:
            with self._lock:
                self._ready = None
            self._connected.clear()
            self._shown.detach()
            connection.close()

    def _connect(self) -> tuple[Connection, socket.socket]:
        """A new connection, and the service's end of its batch socket."""
        with _Opened() as opened:
            request = opened.socket(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            request.setblocking(False)  # a service that is stopped has a full backlog, perhaps
            request.connect(self._path)
            ours, theirs = (opened.socket(each) for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            ours.setblocking(False)
            connection = Connection(request, ours, Doorbell())
            opened.keep()
        return connection, theirs

    def _greet(self, connection: Connection, theirs: socket.socket) -> None:
        """Say HELLO, and fill the page that comes with the reply."""
        number, waiter = connection.begin(Command.HELLO)
        try:
            with theirs:
                descriptors = [theirs.fileno(), connection.doorbell.fileno()]
                until = time.monotonic() + PATIENCE_S
                connection.send_by(until, number, Command.HELLO, self._hello_payload, descriptors)
            welcome = wire.decode_welcome(b"".join(self._receive_until(connection, number, waiter)))
            if welcome.features & ~self._hello.features or len(waiter.descriptors) != 1:
                raise WireError(Code.PAYLOAD, "HELLO's reply", "must have one descriptor, and no feature not offered")
            page = StatePage(waiter.descriptors[0], self._hello.slots)
        finally:
            waiter.close_descriptors()
        connection.welcome = welcome
        self._shown.attach(page, connection.doorbell)
        self._executor.show(self._shown.seated())
        self._shown.ring()

    def _replay(self, connection: Connection) -> None:
        """Tell a new connection everything. When there is nothing left to tell, it is the one that verbs use."""
        told: Memory | None = None
        while True:
            with self._lock:
                memory = self._memory
                strangers = [each for each in self._shown.seated() if each.id not in connection.introduced]
                strangers = strangers[: wire.DESCRIPTORS_MAX]
                if memory is told and not strangers:
                    self._ready = connection
                    self.times_connected += 1
                    return
                descriptors = [] if memory is None or memory is told else _duplicates(memory.descriptors)
                connection.introduced.update(vector.id for vector in strangers)
            try:
                if memory is not told and memory is not None:
                    told = memory
                    self._tell(connection, Command.MEMORY, memory.payload, descriptors)
            finally:
                _close_all(descriptors)
            self._introduce_again(connection, strangers)

    def _introduce_again(self, connection: Connection, vectors: Sequence[Vector]) -> None:
        left = list(vectors)
        while True:
            added, descriptors = self._added(left, new=False)
            if not added:
                return
            try:
                refused = self._tell(connection, Command.ADD, wire.encode_add(added), descriptors)
            finally:
                _close_all(descriptors)
            self._shown.ring()
            if refused is None or refused.index is None or refused.index >= len(added):
                return
            # All or none: the rest without that one, whose events have to wait.
            born = added[refused.index].born
            left = [vector for vector in left if vector.born != born]

    def _tell(
        self, connection: Connection, command: Command, payload: bytes, descriptors: Sequence[int]
    ) -> WireError | None:
        """Send a command on the agent's own thread; returns the service's refusal, which nobody else would hear of."""
        number, waiter = connection.begin(command)
        connection.send_by(time.monotonic() + PATIENCE_S, number, command, payload, descriptors)
        try:
            self._receive_until(connection, number, waiter)
        except WireError as error:
            if waiter.error is not error:
                raise
            refusal = error
        else:
            return None
        log.error("refused by the service", vm=self._hello.name, command=command.name, reason=str(refusal))
        return refusal

    def _receive_until(self, connection: Connection, number: int, waiter: Waiter) -> list[bytes]:
        """Take turns until ``waiter`` has its reply."""
        until = time.monotonic() + PATIENCE_S
        while not waiter.done.is_set() and (left := until - time.monotonic()) > 0:
            self._turn(connection, left)
        connection.end(number, waiter)
        return waiter.result()

    def _turn(self, connection: Connection, timeout_s: float | None) -> None:
        """Wait for something to happen, and see to it. Raises when the connection is over."""
        batch = select.POLLIN if connection.flush() else select.POLLOUT
        ready = _poll(
            {
                self._wake.fileno(): select.POLLIN,
                connection.request.fileno(): select.POLLIN,
                connection.batch.fileno(): batch,
            },
            timeout_s,
        )
        if self._wake.fileno() in ready:
            self._hear()
        if self._closing.is_set():
            raise UnansweredError("the agent", "is being closed")
        if connection.broken is not None:
            raise connection.broken
        if connection.request.fileno() in ready:
            connection.receive_replies()
        if connection.batch.fileno() in ready:
            frame = connection.receive_command()
            if frame is not None:
                connection.reply(frame, self._answer(frame))

    def _hear(self) -> None:
        try:
            os.eventfd_read(self._wake.fileno())
        except BlockingIOError:
            pass

    def _answer(self, frame: Frame) -> bytes:
        """Do what the service wants; the reply's payload."""
        if frame.command == Command.BATCH:
            return wire.encode_errnos(self._carry_out(wire.decode_operations(frame.payload, _IN_BATCH)))
        if frame.command == Command.TRANSLATE and self._translated is not None:
            return wire.encode_operations(self._translated(wire.decode_operations(frame.payload, wire.IN_TRANSLATE)))
        raise WireError(Code.COMMAND, f"command {frame.command}", "is none that this agent knows")

    def _close_breaker(self, connection: Connection, ping: Waiter | None) -> Waiter | None:
        """Ask a service that did not answer whether it is there again; returns the PING that is out."""
        if ping is not None and ping.done.is_set():
            connection.breaker_open = False
            return None
        if ping is not None or not connection.breaker_open:
            return ping
        try:
            number, ping = connection.begin(Command.PING)
        except UnansweredError:
            return None
        if connection.send(number, Command.PING, b""):
            return ping
        connection.withdraw(number)
        return None

    # --- small parts ---------------------------------------------------------------------------------------------

    def _added(self, vectors: Sequence[Vector], *, new: bool) -> tuple[list[wire.Added], list[int]]:
        """``ADD``'s entries, and the descriptors, which the caller closes. Without those removed meanwhile."""
        added: list[wire.Added] = []
        descriptors: list[int] = []
        for vector, descriptor in self._executor.duplicates(vectors):
            slot = self._shown.slot_of(vector)
            if slot is None:
                os.close(descriptor)
                continue
            added.append(wire.Added(slot, vector.born, new))
            descriptors.append(descriptor)
        return added, descriptors

    def _operations(self, connection: Connection, payloads: Sequence[bytes], kinds: frozenset[Kind]) -> list[Operation]:
        """The operations of a reply; if it is malformed the connection ends."""
        try:
            return [op for payload in payloads for op in wire.decode_operations(payload, kinds)]
        except WireError as error:
            connection.broken = error
            self._wake.ring()
            raise UnansweredError("the service", f"answered rubbish: {error}") from error


class _Opened:
    """Sockets that are closed unless kept."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def socket(self, opened: socket.socket) -> socket.socket:
        """Own ``opened``."""
        self._sockets.append(opened)
        return opened

    def keep(self) -> None:
        """They are somebody else's from now on."""
        self._sockets.clear()

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        for each in self._sockets:
            each.close()


def _poll(events: dict[int, int], timeout_s: float | None) -> set[int]:
    poll = select.poll()
    for fd, mask in events.items():
        poll.register(fd, mask)
    return {fd for fd, _ in poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)}


def _memory(regions: Sequence[MemoryRegion]) -> Memory:
    """``regions``, checked, with descriptors of our own, one for each of theirs."""
    MemfdMemory(regions).close()
    numbers = {fd: index for index, fd in enumerate(dict.fromkeys(region.fd for region in regions))}
    if not regions or len(numbers) > wire.DESCRIPTORS_MAX:
        raise RegionError("guest memory", f"must be in 1 to {wire.DESCRIPTORS_MAX} files")
    payload = wire.encode_memory(
        [wire.Region(region.gpa, region.size, region.offset, numbers[region.fd]) for region in regions]
    )
    return Memory(payload, _duplicates(list(numbers)))


def _duplicates(descriptors: Sequence[int]) -> list[int]:
    made: list[int] = []
    try:
        for fd in descriptors:
            made.append(os.dup(fd))  # noqa: PERF401 - what was made must be known when one fails
    except OSError as error:
        _close_all(made)
        raise KernelError(error.errno or 0, "dup", "guest memory") from error
    return made


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
