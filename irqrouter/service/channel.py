"""One ``SOCK_SEQPACKET`` socket on the event loop: frames in, frames out, descriptors with them.

asyncio's transports know streams and datagrams, not this; so the socket is watched with ``add_reader``, the same on
uvloop and the stdlib's loop.
"""

import array
import asyncio
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Final

from irqrouter.errors import IrqrouterError
from irqrouter.service import wire
from irqrouter.service.wire import Code, Frame, WireError

#: Room for all the descriptors that a packet can have (include/net/scm.h: ``SCM_MAX_FD``), though a frame must have
#: fewer: those that find no room the kernel closes in our thread, and some closes wait, see :class:`_Closer`.
_ANCILLARY: Final = socket.CMSG_SPACE(253 * array.array("i").itemsize)

#: What brings descriptors: SCM_RIGHTS, which the peer sends, and SCM_PIDFD (include/linux/socket.h), which the kernel
#: adds to every packet if the socket has SO_PASSPIDFD. The batch socket came from the peer, which may set that.
_WITH_DESCRIPTORS: Final = frozenset({socket.SCM_RIGHTS, 4})

_NO_LINGER: Final = struct.pack("ii", 0, 0)


class GoneError(IrqrouterError):
    """The peer has closed its end, or died."""


def is_eventfd(fd: int) -> bool:
    """Whether ``fd`` is an eventfd. Asks the kernel alone, never a file's owner as ``fstat`` may (FUSE)."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"  # noqa: PTH115 - eight times as fast
    except OSError:
        return False


class _Closer:
    """Closes descriptors that may be anything, each batch on a thread of its own.

    ``close`` waits for as long as somebody else likes where it is a FUSE file (the flush), or the last descriptor of
    a TCP socket with ``SO_LINGER``; on the loop's thread that would stop the service for everybody.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = 0

    @property
    def busy(self) -> int:
        """How many batches are not closed yet."""
        return self._busy

    def close(self, descriptors: Sequence[int]) -> "asyncio.Future[None]":
        """Close ``descriptors``; the future is done when that is."""
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._busy += 1
        threading.Thread(
            target=self._run, args=(descriptors, loop, closed), name="irqrouter-closer", daemon=True
        ).start()
        return closed

    def _run(self, descriptors: Sequence[int], loop: asyncio.AbstractEventLoop, closed: "asyncio.Future[None]") -> None:
        for fd in descriptors:
            _no_lingering(fd)
            os.close(fd)
        with self._lock:
            self._busy -= 1
        try:
            loop.call_soon_threadsafe(_settle, closed)
        except RuntimeError:
            pass  # the loop was closed meanwhile


closer: Final = _Closer()


class Packet:
    """A frame's bytes and the descriptors that came with it. Those nobody took are closed by :meth:`close`."""

    __slots__ = ("_descriptors", "data", "truncated")

    def __init__(self, packet: bytes, descriptors: list[int], *, truncated: bool) -> None:
        self.data = packet
        self.truncated = truncated
        self._descriptors = descriptors

    @property
    def descriptors(self) -> Sequence[int]:
        """The descriptors, which stay the packet's."""
        return self._descriptors

    def take(self, index: int) -> int:
        """Own descriptor ``index`` from now on. It stays in the list, as -1."""
        fd, self._descriptors[index] = self._descriptors[index], -1
        return fd

    def frame(self, *, with_descriptors: bool = False) -> Frame:
        """The frame, checked. Raises :class:`~irqrouter.service.wire.WireError`."""
        if self.truncated:
            raise WireError(Code.FRAME, "a frame", f"has over {wire.FRAME_MAX} bytes, or did not arrive whole")
        if len(self._descriptors) > wire.DESCRIPTORS_MAX:
            raise WireError(
                Code.FRAME, f"a frame with {len(self._descriptors)} descriptors", f"has over {wire.DESCRIPTORS_MAX}"
            )
        frame = wire.decode(self.data)
        if self._descriptors and not with_descriptors:
            raise WireError(Code.FRAME, f"frame {frame.id} of command {frame.command}", "has descriptors")
        return frame

    def close(self) -> "asyncio.Future[None] | None":
        """Close the descriptors that nobody took. Idempotent.

        Returns what to wait for, before more is accepted from the same peer, where they may be of a kind whose closing
        takes time.
        """
        strange: list[int] = []
        for index, fd in enumerate(self._descriptors):
            if fd >= 0:
                self._descriptors[index] = -1
                if is_eventfd(fd) or _has_seals(fd):
                    os.close(fd)
                else:
                    strange.append(fd)
        return closer.close(strange) if strange else None


class Channel:
    """One end of a connection. ``sock`` is owned from now on."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None

    def receive_now(self) -> Packet | None:
        """The next packet; None when there is none yet. Raises :class:`GoneError`."""
        try:
            packet, ancillary, flags, _ = self._sock.recvmsg(
                wire.FRAME_MAX, _ANCILLARY, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise GoneError("the connection", f"broke: {error.strerror}") from error
        descriptors = _descriptors(ancillary)
        if not packet and not descriptors:  # also an empty packet, which is no frame: either way there is no more
            raise GoneError("the connection", "was closed by the other side")
        return Packet(packet, descriptors, truncated=bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)))

    async def receive(self) -> Packet:
        """The next packet. Raises :class:`GoneError`."""
        while (packet := self.receive_now()) is None:
            self._readable = self._loop.create_future()
            self._loop.add_reader(self._sock.fileno(), _settle, self._readable)
            try:
                await self._readable
            finally:
                self._remove_reader()
        return packet

    def on_readable(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever there may be a packet, instead of :meth:`receive`."""
        self._loop.add_reader(self._sock.fileno(), callback)

    def ignore(self) -> None:
        """Undo :meth:`on_readable`."""
        self._remove_reader()

    def send_now(self, frame: Frame, descriptors: Sequence[int] = ()) -> bool:
        """Send ``frame``; False where that would have to wait. Raises :class:`GoneError`."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._sock.sendmsg([wire.encode(frame)], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise GoneError("the connection", f"broke: {error.strerror}") from error
        return True

    async def send(self, frame: Frame, descriptors: Sequence[int] = ()) -> None:
        """Send ``frame``, waiting for the peer to read if need be. Raises :class:`GoneError`."""
        while not self.send_now(frame, descriptors):
            self._writable = self._loop.create_future()
            self._loop.add_writer(self._sock.fileno(), _settle, self._writable)
            try:
                await self._writable
            finally:
                self._remove_writer()

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, once, when something can be sent again."""

        def once() -> None:
            self._remove_writer()
            callback()

        self._loop.add_writer(self._sock.fileno(), once)

    def close(self) -> None:
        """Leave the loop, then close. Idempotent."""
        if self._sock.fileno() >= 0:
            self._remove_reader()
            self._remove_writer()
            self._drain()
            self._sock.close()

    def _drain(self) -> None:
        """Receive what nobody has read: the kernel would close its descriptors in our thread (see :class:`_Closer`)."""
        try:
            self._sock.shutdown(socket.SHUT_RD)  # no more from now on
            while (packet := self.receive_now()) is not None:
                packet.close()
        except (OSError, GoneError):
            pass

    def _remove_reader(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())

    def _remove_writer(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_writer(self._sock.fileno())


def _no_lingering(fd: int) -> None:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return  # no socket
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    except OSError:
        pass
    sock.detach()


def _has_seals(fd: int) -> bool:
    """Whether ``fd`` is a memfd, or another shmem or hugetlbfs file (mm/memfd.c:memfd_file_seals_ptr)."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind in _WITH_DESCRIPTORS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
