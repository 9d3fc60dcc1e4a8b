"""Eventfds as irqrouter owns them, and the set in which it watches them."""

# Some facts about eventfds
# =========================
#
# An eventfd is a 64-bit count. write() adds to it, read() takes all of it and leaves zero, poll says whether it is
# above zero. One that KVM has an irqfd on has a few more properties, and everything in this project leans on them.
#
# *KVM stands first in line, alone.* KVM_IRQFD puts an exclusive priority waiter at the head of the eventfd's wait
# queue (virt/kvm/eventfd.c:kvm_irqfd_register). When the device signals, KVM's waiter runs in the signaller's own
# context, takes the count and returns 1, and nobody behind it is woken (irqfd_wakeup). So an epoll set may go on
# watching an eventfd while its irqfd is assigned: it sleeps through all of it. Since Linux 6.17 the place is unique:
# a second irqfd, of any VM, gets EBUSY. Before 5.11 there was no such place, and we would see every event as well.
#
# *Assigning injects a pending count but does not take it.* KVM polls the eventfd while it queues itself, finds the
# count and injects; the count stays until the next signal or until the irqfd is deassigned. Whoever assigns reads
# the eventfd afterwards and throws away what was there. For the same reason a read must never run beside an
# assign: both may take one and the same event, and the guest gets it twice.
#
# *Deassigning leaves nothing behind.* When the ioctl returns, KVM has unhooked its waiter and zeroed what it had
# already injected, so a count found later is an event that KVM has not seen.
#
# *A count can vanish between the wakeup and the read.* KVM may have taken it. Without O_NONBLOCK that read would
# hang the loop, hence BlockingEventfdError. We do not set the flag ourselves: it belongs to the open file
# description, not to our descriptor, so the VMM's thread which blocks in read() on the same eventfd would begin to
# see EAGAIN. (uvloop's add_reader sets it, silently, in every process that holds the file; asyncio's does not.
# That is one reason for watching through a private epoll set whose own descriptor is all that the loop sees.)
#
# *EFD_SEMAPHORE breaks all of this.* A read, KVM's too, then takes one of many: three events, one injection, and a
# residue that looks like a new event. Hence SemaphoreEventfdError. The flag is fixed when the eventfd is made and no
# system call reports it; /proc/self/fdinfo does, and where it does not we refuse, because the only other way to find
# out is to signal somebody's eventfd.
#
# *A descriptor number is not an eventfd.* The number that a client passed may be closed and given to something else
# at any time, and KVM finds its irqfd by the eventfd behind the number: a deassign through a reused number
# succeeds and does nothing. So we duplicate at once, check the duplicate, and use only the duplicate. "Is this the
# eventfd that I have already?" is a question about the kernel's id, which fdinfo gives as eventfd-id.
#
# *An epoll set holds files, not numbers.* Closing a descriptor takes the eventfd out of the set only if it was the
# file's last one, which with duplicates in two processes it never is: the entry lives on, reports a number that
# means something else by now, and can no longer be removed. So leaving the set comes strictly before close, and
# KvmEventfd.close does both under one lock.
#
# *Oneshot, because an answer takes time.* From the moment a count is reported until it has been read, a
# level-triggered watch would report it again and again. With EPOLLONESHOT the report disarms the watch. Arming it
# again (EPOLL_CTL_MOD) polls the eventfd afresh, so nothing that happened in between is missed.

import errno
import fcntl
import os
import select
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.kvm.port import BlockingEventfdError, Eventfd, NotAnEventfdError, SemaphoreEventfdError

_COUNT_MAX = (1 << 64) - 2  # eventfd(2): the largest value an eventfd holds
_WATCHED = select.EPOLLIN | select.EPOLLONESHOT


class KvmEventfd:
    """An eventfd of the real kernel (:class:`irqrouter.kvm.port.Eventfd`): a duplicate of ``fd``, checked and owned.

    Raises :class:`NotAnEventfdError`, :class:`SemaphoreEventfdError` or :class:`BlockingEventfdError`, and
    :class:`KernelError` where ``fd`` cannot be duplicated or the kernel's fdinfo lacks a line we need (``ENOSYS``).
    ``fd`` itself stays the caller's.

    :meth:`close` and being armed may race; ``read``, ``write`` and the ioctls that use the descriptor are ordered by
    the caller.
    """

    def __init__(self, fd: int) -> None:
        self._fd = _duplicate(fd)
        try:
            self._identity = _checked_identity(self._fd, f"descriptor {fd}")
        except BaseException:
            os.close(self._fd)
            raise
        self._watched_by: select.epoll | None = None
        self._lock = threading.Lock()

    @property
    def identity(self) -> int:
        """``eventfd-id``: equal for two descriptors of one eventfd (fs/eventfd.c:eventfd_show_fdinfo)."""
        return self._identity

    def fileno(self) -> int:
        """The duplicate's number; -1 once closed."""
        return self._fd

    def pending(self) -> bool:
        """Whether the count is above zero, without taking it."""
        poll = select.poll()
        try:
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(0))
        except (OSError, ValueError) as error:
            raise kernel_error(error, "poll", f"eventfd {self._fd}") from error

    def read(self) -> int:
        """Take and return the whole count; 0 when it was empty."""
        try:
            # Not os.eventfd_read: O_NONBLOCK belongs to the open file description, and whoever else holds that may
            # have cleared it since. A read that blocks here would hold the executor's lock for ever.
            os.preadv(self._fd, [count := bytearray(8)], -1, os.RWF_NOWAIT)
            return int.from_bytes(count, sys.byteorder)
        except BlockingIOError:
            return 0
        except (OSError, ValueError) as error:
            raise kernel_error(error, "read", f"eventfd {self._fd}") from error

    def write(self, count: int) -> None:
        """Add ``count``. ``EAGAIN`` when the sum would pass 2**64 - 2; :class:`SpecError` when ``count`` does."""
        if not 0 <= count <= _COUNT_MAX:
            raise SpecError(f"eventfd count {count}", "must be between 0 and 2**64 - 2")
        try:
            os.eventfd_write(self._fd, count)
        except (OSError, ValueError) as error:
            raise kernel_error(error, "write", f"eventfd {self._fd}") from error

    def arm_in(self, epoll: select.epoll) -> None:
        """Be reported once by ``epoll``: what :meth:`EpollWatchSet.arm` does. Descriptor and membership live here."""
        with self._lock:
            if self._fd < 0:
                return
            known = self._watched_by is not None and not self._watched_by.closed
            if known and self._watched_by is not epoll:
                raise CallerError(f"eventfd {self._fd}", "is in another watch set")
            try:
                (epoll.modify if known else epoll.register)(self._fd, _WATCHED)
            except (OSError, ValueError) as error:
                raise kernel_error(error, "epoll_ctl", f"eventfd {self._fd}") from error
            self._watched_by = epoll

    def close(self) -> None:
        """Leave the watch set, then close the duplicate. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            if self._watched_by is not None:
                try:
                    self._watched_by.unregister(fd)
                except ValueError:
                    pass  # the set was closed first, and took its entries with it
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class EpollWatchSet:
    """A watch set of the real kernel (:class:`irqrouter.kvm.port.WatchSet`): one private epoll set.

    Any thread may arm, harvest or close an eventfd at any time. A number harvested just before its eventfd is closed
    may by then be another one's; that costs an empty read, and is harmless.
    """

    def __init__(self) -> None:
        try:
            self._epoll = select.epoll()
        except OSError as error:
            raise kernel_error(error, "epoll_create1", "watch set") from error

    def fileno(self) -> int:
        """The epoll descriptor, itself pollable; -1 once closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def arm(self, eventfd: Eventfd) -> None:
        """Watch ``eventfd``, once, from now on: ``EPOLL_CTL_ADD`` the first time and ``EPOLL_CTL_MOD`` later.

        One that was closed meanwhile is left alone. Raises :class:`CallerError` for an eventfd that is not this
        kernel's or is in another set.
        """
        if not isinstance(eventfd, KvmEventfd):
            raise CallerError(f"eventfd {eventfd.fileno()}", "is not the kernel's: an epoll set cannot watch it")
        eventfd.arm_in(self._epoll)

    def harvest(self, limit: int) -> list[int]:
        """The descriptor numbers that became readable, at most ``limit`` (1 or more). Does not wait."""
        if limit < 1:
            raise CallerError("watch set", f"cannot harvest at most {limit}")
        try:
            return [fd for fd, _ in self._epoll.poll(0, limit)]
        except (OSError, ValueError) as error:
            raise kernel_error(error, "epoll_wait", "watch set") from error

    def close(self) -> None:
        """Close the set. The eventfds stay open and may enter another. Idempotent."""
        self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def kernel_error(error: OSError | ValueError, call: str, object: str) -> KernelError:  # noqa: A002 - KernelError's name
    """The :class:`KernelError` for what Python raised; ValueError is its word for a descriptor closed already."""
    code = error.errno if isinstance(error, OSError) else errno.EBADF
    return KernelError(errno.EIO if code is None else code, call, object)


def _duplicate(fd: int) -> int:
    if not 0 <= fd < 1 << 31:
        raise NotAnEventfdError(f"descriptor {fd}", "is no descriptor number")
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise NotAnEventfdError(f"descriptor {fd}", "is closed") from error
        raise kernel_error(error, "F_DUPFD_CLOEXEC", f"descriptor {fd}") from error


def _checked_identity(fd: int, given: str) -> int:
    # Asked of the duplicate: the number we were given may mean something else by now.
    path = Path(f"/proc/self/fdinfo/{fd}")
    try:
        # Of what is no eventfd it may have any bytes, those of paths for example.
        lines = path.read_bytes().decode("ascii", "replace").splitlines()
    except OSError as error:
        raise kernel_error(error, f"reading {path}", given) from error
    info = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "eventfd-count" not in info:
        raise NotAnEventfdError(given, "is not an eventfd")
    for name in ("eventfd-id", "eventfd-semaphore"):
        if name not in info:  # an older kernel: see "EFD_SEMAPHORE breaks all of this"
            raise KernelError(errno.ENOSYS, f"finding {name} in {path}", given)
    if int(info["eventfd-semaphore"]):
        raise SemaphoreEventfdError(given, "was made with EFD_SEMAPHORE")
    if not int(info["flags"], 8) & os.O_NONBLOCK:
        raise BlockingEventfdError(given, "lacks EFD_NONBLOCK")
    return int(info["eventfd-id"])
