"""What systemd and a service tell each other: sockets handed over, readiness, the watchdog.

The protocols are a few lines each (``sd_listen_fds(3)``, ``sd_notify(3)``, ``sd_watchdog_enabled(3)``), and are spoken
here by hand. Every function takes the environment it reads, and removes from it what it has read: what systemd said to
this process must not reach another one.
"""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

import msgspec

from irqrouter.errors import CallerError

#: The first descriptor that is passed; the others follow it.
LISTEN_FDS_START: Final = 3

#: For this long a message may wait for room in systemd's socket. A watchdog's does not wait at all.
_SEND_S: Final = 1.0


class ActivationError(CallerError):
    """What systemd passed is not what this service can use."""


class Activated(msgspec.Struct, frozen=True):
    """The listening sockets that systemd passed; None where it passed none."""

    agent: socket.socket | None = None
    admin: socket.socket | None = None


def activated(environ: MutableMapping[str, str], first: int = LISTEN_FDS_START) -> Activated:
    """Take the sockets that were passed to this process.

    A socket unit has one ``FileDescriptorName=`` for all its sockets, so their *type* tells them apart: agents speak
    ``SOCK_SEQPACKET``, varlink ``SOCK_STREAM``. A socket that is named ``agent`` or ``admin`` must be that.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    environ.pop("LISTEN_PIDFDID", None)
    if not count or pid != str(os.getpid()):
        return Activated()
    if not (count.isascii() and count.isdecimal()):
        raise ActivationError(f"LISTEN_FDS {count!r}", "must be a number")
    named = names.split(":") if names else []
    sockets = [_taken(first + at, named[at] if at < len(named) else "") for at in range(int(count))]
    found: dict[int, socket.socket] = {}
    for taken in sockets:
        if found.setdefault(taken.type, taken) is not taken:
            for each in sockets:
                each.close()
            raise ActivationError("LISTEN_FDS", f"has two {taken.type.name} sockets, and there is use for one")
    return Activated(found.get(socket.SOCK_SEQPACKET), found.get(socket.SOCK_STREAM))


_TYPES: Final = {"agent": socket.SOCK_SEQPACKET, "admin": socket.SOCK_STREAM}


def _taken(fd: int, name: str) -> socket.socket:
    what = f"descriptor {fd}" + (f" ({name})" if name else "")
    try:
        taken = socket.socket(fileno=fd)
    except OSError as error:
        raise ActivationError(what, f"must be a socket: {error.strerror}") from None
    taken.set_inheritable(False)
    try:
        _check(taken, what, name)
    except ActivationError:
        taken.close()
        raise
    taken.setblocking(False)
    return taken


def _check(taken: socket.socket, what: str, name: str) -> None:
    if taken.family != socket.AF_UNIX or taken.type not in _TYPES.values():
        raise ActivationError(what, "must be an AF_UNIX socket, SOCK_SEQPACKET or SOCK_STREAM")
    if not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ActivationError(what, "must be listening (Accept=no)")
    if _TYPES.get(name, taken.type) != taken.type:
        raise ActivationError(what, f"must be {_TYPES[name].name}, and is {socket.SocketKind(taken.type).name}")


class Notifier:
    """Tells systemd how the service is doing. Where nobody wants to know, it tells nobody."""

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        if address is None:
            return
        if not address.startswith(("/", "@")):
            raise ActivationError(f"NOTIFY_SOCKET {address!r}", "must be a path, or the name of an abstract socket")
        # Not connected: systemd may be executed anew and bind its socket again.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> "Notifier":
        """One that talks to ``NOTIFY_SOCKET``."""
        return cls(environ.pop("NOTIFY_SOCKET", None) or None)

    def __bool__(self) -> bool:
        """Whether anybody wants to know."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """It serves; after :meth:`reloading`: it serves by the new configuration."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """It has begun to read its configuration again: ``Type=notify-reload`` insists on this, ``notify`` shows it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """It has begun to stop."""
        self._send("STOPPING=1", "STATUS=Stopping")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={status}")

    def alive(self) -> None:
        """It is alive. Never waits: where there is no room, systemd has older news of us to read."""
        self._send("WATCHDOG=1", wait_s=0)

    def close(self) -> None:
        """Tell nothing more. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *fields: str, wait_s: float = _SEND_S) -> None:
        if self._socket is None:
            return
        message = "\n".join(field.replace("\n", " ") for field in fields).encode()
        # Whom we cannot tell does not keep us from serving; systemd notices by what it did not hear.
        with contextlib.suppress(OSError):
            self._socket.settimeout(wait_s)  # MSG_DONTWAIT is not enough: Python waits all the same
            self._socket.sendto(message, self._address)


def watchdog_interval_s(environ: MutableMapping[str, str]) -> float | None:
    """How often to say that the service is alive: twice in the time after which systemd would kill it; None: never."""
    usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not usec or (pid and pid != str(os.getpid())):
        return None
    if not (usec.isascii() and usec.isdecimal() and int(usec)):
        raise ActivationError(f"WATCHDOG_USEC {usec!r}", "must be a number of microseconds above 0")
    return int(usec) / 2e6
