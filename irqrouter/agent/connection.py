"""One connection with the service: its two sockets, and who waits for which reply.

Any thread may ask; only the agent's thread receives. A thread that waits holds no lock, and each waits for an event of
its own.
"""

import array
import errno
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Final

from irqrouter.agent.page import Doorbell
from irqrouter.errors import IrqrouterError
from irqrouter.service import wire
from irqrouter.service.wire import Code, Command, Frame, WireError

_ANCILLARY: Final = socket.CMSG_SPACE(wire.DESCRIPTORS_MAX * array.array("i").itemsize)
_IDS: Final = 0xFFFF
#: A send that may wait tries again after this, doubling.
_RETRY_MIN_S, _RETRY_MAX_S = 0.0001, 0.01
#: What a send fails with when the service does not keep up; ETOOMANYREFS: with the descriptors.
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS})


class UnansweredError(IrqrouterError):
    """The service did not answer in time, or nothing can be sent to it now, or it is gone."""


class TimedOutError(UnansweredError):
    """It did not answer in time."""


class Waiter:
    """One who waits for a reply."""

    __slots__ = ("command", "descriptors", "done", "error", "payloads")

    def __init__(self, command: Command) -> None:
        self.command = command
        self.payloads: list[bytes] = []
        self.descriptors: list[int] = []
        self.error: IrqrouterError | None = None
        self.done = threading.Event()

    def result(self) -> list[bytes]:
        """The payloads of the reply's frames. Raises what the reply says, or :class:`UnansweredError`."""
        if self.error is not None:
            raise self.error
        return self.payloads

    def close_descriptors(self) -> None:
        """Close those that came with the reply. Idempotent."""
        while self.descriptors:
            os.close(self.descriptors.pop())


class Connection:
    """The request socket ``request``, our end ``batch`` of the batch socket, and the doorbell; all are owned."""

    def __init__(self, request: socket.socket, batch: socket.socket, doorbell: Doorbell) -> None:
        self.request = request
        self.batch = batch
        self.doorbell = doorbell
        #: What was agreed on, once it is.
        self.welcome: wire.Welcome | None = None
        #: The vectors, by id, that the service has been told of or is about to be.
        self.introduced: set[int] = set()
        #: Whether a wide invalidation went unanswered, and no PING has been answered since.
        self.breaker_open = False
        #: Why the connection must end, once another thread has found out.
        self.broken: IrqrouterError | None = None
        self._waiting: dict[int, Waiter | None] = {}  # by id; None where nobody waits any more
        self._burnt: set[int] = set()
        self._last_id = 0
        self._replies: deque[bytes] = deque()  # the agent's thread's alone
        self._lock = threading.Lock()  # who waits for what
        self._sending = threading.Lock()  # so that nobody sends through a number that has been closed
        self._closed = False

    # --- commands, from any thread -------------------------------------------------------------------------------

    def ask(self, command: Command, payload: bytes, *, within_s: float) -> list[bytes]:
        """Send a command without waiting, and wait for its reply; returns the payloads of the reply's frames.

        Raises :class:`UnansweredError` (:class:`TimedOutError` if it waited in vain; a reply that comes later is
        dropped), and :class:`~irqrouter.service.wire.WireError` with what the service says.
        """
        number, waiter = self.begin(command)
        if not self.send(number, command, payload):
            self.withdraw(number)
            raise UnansweredError("the service", "does not read what it is sent")
        waiter.done.wait(within_s)
        self.end(number, waiter)
        return waiter.result()

    def ask_patiently(
        self, command: Command, payload: bytes, descriptors: Sequence[int], *, within_s: float
    ) -> list[bytes]:
        """The same with descriptors, and sending may wait too. A service that does not answer this is given up."""
        until = time.monotonic() + within_s
        number, waiter = self.begin(command)
        try:
            self.send_by(until, number, command, payload, descriptors)
            waiter.done.wait(max(0.0, until - time.monotonic()))
            self.end(number, waiter)
        except UnansweredError as error:
            self.broken = self.broken or error
            raise
        if isinstance(waiter.error, UnansweredError):
            self.broken = self.broken or waiter.error
        return waiter.result()

    def begin(self, command: Command) -> tuple[int, Waiter]:
        """An id for a command, and who will have its reply."""
        waiter = Waiter(command)
        with self._lock:
            if self._closed:
                raise UnansweredError("the service", "is gone")
            if len(self._waiting) >= wire.UNANSWERED_MAX or len(self._burnt) >= _IDS - wire.UNANSWERED_MAX:
                raise UnansweredError("the service", "leaves too much unanswered")
            number = self._last_id
            while True:
                number = number % _IDS + 1
                if number not in self._waiting and number not in self._burnt:
                    break
            self._last_id = number
            self._waiting[number] = waiter
        return number, waiter

    def withdraw(self, number: int) -> None:
        """The command was never sent."""
        with self._lock:
            self._waiting.pop(number, None)

    def end(self, number: int, waiter: Waiter) -> None:
        """Stop waiting. If there is no reply its id is burnt: whatever comes for it must never be carried out."""
        with self._lock:
            if not waiter.done.is_set():
                waiter.error = TimedOutError(f"command {waiter.command.name}", "was not answered in time")
                if number in self._waiting:
                    self._waiting[number] = None
                    self._burnt.add(number)

    def send(self, number: int, command: Command, payload: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Send a command if that needs no waiting. Raises :class:`UnansweredError` if nobody is there."""
        packet = wire.encode(Frame(number, command, payload))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with self._sending:
            if self._closed:
                raise UnansweredError("the service", "is gone")
            return _sent(self.request, packet, ancillary)

    def send_by(self, until: float, number: int, command: Command, payload: bytes, descriptors: Sequence[int]) -> None:
        """Send a command, by the time ``until`` of the monotonic clock; :class:`UnansweredError` otherwise."""
        pause = _RETRY_MIN_S
        while not self.send(number, command, payload, descriptors):
            if time.monotonic() + pause > until:
                self.withdraw(number)
                raise UnansweredError(f"command {command.name}", "could not be sent in time")
            time.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)

    # --- what the service sends, on the agent's thread -----------------------------------------------------------

    def receive_replies(self) -> None:
        """Take every reply that has come to its waiter.

        Raises :class:`~irqrouter.service.wire.WireError` for what is none, and :class:`UnansweredError` at the end of
        the connection.
        """
        while (received := _receive(self.request)) is not None:
            frame, descriptors = received
            with _closing(descriptors):
                self._take(frame, descriptors)

    def _take(self, frame: Frame, descriptors: list[int]) -> None:
        what = f"reply {frame.id} of command {frame.command}"
        with self._lock:
            if not frame.reply or frame.id not in self._waiting:
                raise WireError(Code.FRAME, what, "answers nothing that was asked")
            waiter = self._waiting[frame.id]
            if not frame.more:
                del self._waiting[frame.id]
            if waiter is None:
                return  # too late
            if frame.command != waiter.command:
                raise WireError(Code.FRAME, what, f"answers a {waiter.command.name}")
            if descriptors and waiter.command is not Command.HELLO:
                raise WireError(Code.FRAME, what, "has descriptors")
            waiter.descriptors += descriptors
            descriptors.clear()
            if frame.errno:
                waiter.error = wire.error_of(frame)
            elif frame.payload and waiter.command in (Command.MEMORY, Command.PING):
                raise WireError(Code.PAYLOAD, what, f"has {len(frame.payload)} bytes, must have none")
            waiter.payloads.append(frame.payload)
            if len(waiter.payloads) > wire.REPLY_FRAMES_MAX:
                raise WireError(Code.FRAME, what, f"has more than {wire.REPLY_FRAMES_MAX} frames")
            if not frame.more:
                waiter.done.set()

    def receive_command(self) -> Frame | None:
        """The next command on the batch socket, if there is one and its reply can be sent. Raises as above."""
        received = None if self._replies else _receive(self.batch)
        if received is None:
            return None
        frame, descriptors = received
        with _closing(descriptors):
            if frame.reply or descriptors:
                raise WireError(Code.FRAME, f"frame {frame.id} of command {frame.command}", "is no command of these")
        return frame

    def reply(self, frame: Frame, payload: bytes) -> None:
        """Answer a command, now or when the service makes room: until then no other is received."""
        self._replies.append(wire.encode(Frame(frame.id, frame.command, payload, reply=True)))
        self.flush()

    def flush(self) -> bool:
        """Send what replies can be sent; whether that was all."""
        while self._replies and _sent(self.batch, self._replies[0], []):
            self._replies.popleft()
        return not self._replies

    def close(self) -> None:
        """Close the sockets and the doorbell; whoever waits has :class:`UnansweredError`. Idempotent."""
        with self._sending, self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, {}
            self.request.close()
            self.batch.close()
        self.doorbell.close()
        for waiter in waiting.values():
            if waiter is not None:
                waiter.error = waiter.error or UnansweredError("the service", "is gone")
                waiter.close_descriptors()
                waiter.done.set()


def _sent(sock: socket.socket, packet: bytes, ancillary: "Sequence[tuple[int, int, array.array[int]]]") -> bool:
    try:
        sock.sendmsg([packet], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        if error.errno in _FULL:
            return False
        raise UnansweredError("the service", f"is gone: {error.strerror}") from error
    return True


def _receive(sock: socket.socket) -> tuple[Frame, list[int]] | None:
    """A frame and its descriptors; None when there is none yet."""
    try:
        packet, ancillary, flags, _ = sock.recvmsg(
            wire.FRAME_MAX, _ANCILLARY, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
    except BlockingIOError:
        return None
    except OSError as error:
        raise UnansweredError("the service", f"is gone: {error.strerror}") from error
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    try:
        return _whole(packet, flags), list(descriptors)
    except BaseException:
        _close_all(descriptors)
        raise


def _whole(packet: bytes, flags: int) -> Frame:
    if not packet:
        raise UnansweredError("the service", "has closed the connection")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        what = f"has over {wire.FRAME_MAX} bytes or {wire.DESCRIPTORS_MAX} descriptors"
        raise WireError(Code.FRAME, "a frame", what)
    return wire.decode(packet)


@contextmanager
def _closing(descriptors: list[int]) -> Generator[None]:
    """Close those of ``descriptors`` that nobody has taken out."""
    try:
        yield
    finally:
        _close_all(descriptors)


def _close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.close(fd)
