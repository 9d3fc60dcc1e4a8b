"""The protocols between systemd and a service, on real sockets."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from irqrouter.service.notify import Activated, ActivationError, Notifier, activated, watchdog_interval_s


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


@pytest.fixture
def notifier(listener: socket.socket) -> Iterator[Notifier]:
    notifier = Notifier(listener.getsockname())
    yield notifier
    notifier.close()


def test_notify_says_what_systemd_understands(listener: socket.socket, notifier: Notifier) -> None:
    before = time.monotonic_ns() // 1000
    notifier.ready("Serving\nwell")
    notifier.alive()
    notifier.status("Busy")
    notifier.reloading()
    notifier.stopping()
    assert listener.recv(4096) == b"READY=1\nSTATUS=Serving well"
    assert listener.recv(4096) == b"WATCHDOG=1"
    assert listener.recv(4096) == b"STATUS=Busy"
    reloading, _, stamp = listener.recv(4096).partition(b"\nMONOTONIC_USEC=")
    assert reloading == b"RELOADING=1"
    assert before <= int(stamp) <= time.monotonic_ns() // 1000
    assert listener.recv(4096) == b"STOPPING=1\nSTATUS=Stopping"


def test_notify_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0irqrouter-test-{os.getpid()}")
        sock.settimeout(10)
        environ = {"NOTIFY_SOCKET": f"@irqrouter-test-{os.getpid()}", "HOME": "/"}
        notifier = Notifier.from_environment(environ)
        notifier.alive()
        notifier.close()
        assert sock.recv(4096) == b"WATCHDOG=1"
    assert environ == {"HOME": "/"}  # what systemd told us is for nobody else


def test_notify_nobody_wants_to_know() -> None:
    notifier = Notifier.from_environment({})
    assert not notifier
    notifier.ready("Serving")
    notifier.close()


def test_notify_refuses_an_address_that_is_none() -> None:
    with pytest.raises(ActivationError, match="NOTIFY_SOCKET 'vsock:2:1'"):
        Notifier.from_environment({"NOTIFY_SOCKET": "vsock:2:1"})


def test_notify_systemd_gone_or_full_keeps_nobody_from_serving(
    tmp_path: Path, listener: socket.socket, notifier: Notifier
) -> None:
    for _ in range(4096):  # far more than the socket's queue holds: none of them waits
        notifier.alive()
    listener.close()
    notifier.stopping()
    notifier.close()
    notifier.close()
    notifier.alive()


# --- sockets -----------------------------------------------------------------------------------------------------


def passed(*sockets: socket.socket, names: str | None = None) -> tuple[dict[str, str], int]:
    """The environment in which these sockets would have been passed, and the first one's descriptor."""
    # Numbers far above any that a test has: they must be consecutive.
    first = 900
    for at, sock in enumerate(sockets):
        os.dup2(sock.fileno(), first + at, inheritable=True)
        sock.close()
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sockets)), "OTHER": "x"}
    return environ | ({"LISTEN_FDNAMES": names} if names else {}), first


def unix(kind: int, *, listen: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind("")  # an address of the kernel's choosing
    if listen:
        sock.listen()
    return sock


def taken(environ: dict[str, str], first: int) -> Activated:
    return activated(environ, first)


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("names", [None, "irqrouter.socket:irqrouter.socket", "admin:agent", "unknown:agent"])
def test_activated_sockets_are_told_apart_by_type(names: str | None) -> None:
    environ, first = passed(unix(socket.SOCK_STREAM), unix(socket.SOCK_SEQPACKET), names=names)
    found = taken(environ, first)
    assert found.agent is not None
    assert found.admin is not None
    with found.agent, found.admin:
        assert (found.agent.type, found.admin.type) == (socket.SOCK_SEQPACKET, socket.SOCK_STREAM)
        assert (found.agent.fileno(), found.admin.fileno()) == (first + 1, first)
        assert not found.agent.get_inheritable()
        assert not found.agent.getblocking()
    assert environ == {"OTHER": "x"}


@pytest.mark.usefixtures("nothing_leaks")
def test_activated_one_socket_is_enough() -> None:
    found = taken(*passed(unix(socket.SOCK_SEQPACKET)))
    assert found.agent is not None
    found.agent.close()
    assert found.admin is None


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "2"}, {"LISTEN_FDS": "2"}])
def test_activated_sockets_of_another_process_are_left_alone(environ: dict[str, str]) -> None:
    assert activated(environ) == Activated()
    assert not environ


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize(
    ("sockets", "names", "rule"),
    [
        ([(socket.SOCK_DGRAM, False)], None, "must be an AF_UNIX socket, SOCK_SEQPACKET or SOCK_STREAM"),
        ([(socket.SOCK_STREAM, False)], None, "must be listening"),
        ([(socket.SOCK_STREAM, True)], "agent", r"\(agent\): must be SOCK_SEQPACKET, and is SOCK_STREAM"),
        ([(socket.SOCK_SEQPACKET, True)] * 2, None, "has two SOCK_SEQPACKET sockets"),
    ],
)
def test_activated_refuses_what_it_cannot_use(sockets: list[tuple[int, bool]], names: str | None, rule: str) -> None:
    environ, first = passed(*(unix(kind, listen=listen) for kind, listen in sockets), names=names)
    with pytest.raises(ActivationError, match=rule):
        taken(environ, first)


def test_activated_refuses_what_is_no_socket_or_no_number() -> None:
    with Path("/dev/null").open() as file, pytest.raises(ActivationError, match="must be a socket"):
        activated({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}, file.fileno())
    with pytest.raises(ActivationError, match="LISTEN_FDS 'two'"):
        activated({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "two"})


# --- the watchdog ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_watchdog_twice_as_often_as_asked(environ: dict[str, str], interval: float | None) -> None:
    assert watchdog_interval_s(environ) == interval
    assert not environ


@pytest.mark.parametrize("usec", ["0", "-5", "soon", "1.5"])
def test_watchdog_refuses_what_is_no_time(usec: str) -> None:
    with pytest.raises(ActivationError, match="WATCHDOG_USEC"):
        watchdog_interval_s({"WATCHDOG_USEC": usec})
