"""The process around the server: a real one, its sockets, its signals, and what it tells systemd."""

import asyncio
import errno
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from irqrouter.errors import KernelError
from irqrouter.service import daemon
from irqrouter.service.admin import ServiceStatus
from irqrouter.service.admin_client import connected as admin_connected
from irqrouter.service.config import Config, ConfigError
from irqrouter.service.daemon import Loop, Options, SocketBusyError, listening
from irqrouter.service.status import Happenings
from tests.service.fakes import FakeCore
from tests.service.running import IRQROUTER, PATIENCE_S, Service, connected, until

LOOPS = [loop.value for loop in Loop]


def status(path: Path) -> ServiceStatus:
    async def ask() -> ServiceStatus:
        async with admin_connected(str(path)) as client:
            return await client.status()

    return asyncio.run(ask())


# --- the process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_serve_tells_systemd_its_whole_life(tmp_path: Path, loop: str) -> None:
    config = tmp_path / "irqrouter.toml"
    config.write_text("prefetch = true\n")
    before = time.monotonic_ns() // 1000
    with Service(tmp_path, "--config", str(config), "--loop", loop, environ={"WATCHDOG_USEC": "200000"}) as service:
        assert "STATUS=Serving agents on " in service.systemd.wait_for("READY=1")
        service.systemd.wait_for("WATCHDOG=1")
        service.systemd.wait_for("WATCHDOG=1")
        assert status(service.admin_socket).loop.startswith(loop)
        service.signal(signal.SIGHUP)
        reloading = service.systemd.wait_for("RELOADING=1")
        stamp = int(reloading.partition("MONOTONIC_USEC=")[2])
        assert before < stamp <= time.monotonic_ns() // 1000
        assert "configuration reloaded" in service.systemd.wait_for("READY=1")
        service.systemd.wait_for("WATCHDOG=1")
        assert service.stop() == 0
        service.systemd.wait_for("STOPPING=1")
        assert not service.socket.exists()
        assert not service.admin_socket.exists()
        assert "Traceback" not in service.logged()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_stops_when_told_with_agents_and_administrators_connected(tmp_path: Path, number: int) -> None:
    with Service(tmp_path) as service:
        service.ready()
        with (
            connected(service.socket, socket.SOCK_SEQPACKET) as agent,
            connected(service.admin_socket, socket.SOCK_STREAM) as admin,
        ):
            admin.sendall(b'{"method":"io.irqrouter.Admin.Monitor","more":true}\0')
            assert admin.recv(4096)
            service.signal(number)
            service.signal(number)
            assert service.process.wait(PATIENCE_S) == 0
            assert admin.recv(4096) == b""
            assert agent.recv(4096) == b""
        assert "Traceback" not in service.logged()


def test_serve_a_loop_that_does_not_turn_is_silent(tmp_path: Path) -> None:
    """Stop the process, and the watchdog's word comes no more; let it go on, and it comes again."""
    with Service(tmp_path, environ={"WATCHDOG_USEC": "100000"}) as service:
        service.ready()
        service.systemd.wait_for("WATCHDOG=1")
        service.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, service.process.pid, os.WSTOPPED)
        assert service.systemd.is_silent()
        service.signal(signal.SIGCONT)
        service.systemd.wait_for("WATCHDOG=1")


def test_serve_stuck_loop_falls_silent_while_other_threads_run(tmp_path: Path) -> None:
    """The same with a callback that is stuck, which is what the watchdog is for."""
    program = """
import os, sys, threading, time
from pathlib import Path
from irqrouter.service import daemon
from tests.service.fakes import FakeCore

class Stuck(FakeCore):
    def reconfigure(self, config):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        time.sleep(60)

directory = Path(sys.argv[1])
options = daemon.Options(socket=str(directory / "a"), admin_socket=str(directory / "b"))
daemon.run(options, make_core=Stuck)
"""
    with Service(
        tmp_path,
        str(tmp_path),
        command=(sys.executable, "-c", program),
        sockets=False,
        environ={"WATCHDOG_USEC": "100000", "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as service:
        service.ready()
        service.systemd.wait_for("WATCHDOG=1")
        service.signal(signal.SIGHUP)
        service.systemd.wait_for("RELOADING=1")
        assert service.systemd.is_silent()
        service.signal(signal.SIGABRT)  # as systemd does, and the log says where it was stuck
        assert service.process.wait(PATIENCE_S) == -signal.SIGABRT
        assert "in reconfigure" in service.logged()


def test_serve_reload_takes_what_it_can_and_says_what_it_cannot(tmp_path: Path) -> None:
    config = tmp_path / "irqrouter.toml"
    config.write_text('log_format = "json"\n')
    with Service(tmp_path, "--config", str(config)) as service:
        service.ready()
        config.write_text('log_level = "warning"\nlog_format = "console"\n[metrics]\nlisten = "127.0.0.1:1"\n')
        service.signal(signal.SIGHUP)
        service.systemd.wait_for("READY=1")
        assert status(service.admin_socket).log_level == "warning"
        assert '"keys": "log_format, metrics"' in service.logged()
        config.write_text("limits = 5\n")
        service.signal(signal.SIGHUP)
        service.systemd.wait_for("RELOADING=1")
        said = service.systemd.wait_for("READY=1")
        assert f"configuration not reloaded: {config}: limits: expected `object`, got `int`" in said
        assert status(service.admin_socket).log_level == "warning"
        assert service.stop() == 0


def test_serve_after_kill_9_starts_over_the_sockets_left_behind(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.ready()
    assert service.socket.is_socket()
    (tmp_path / "notify").unlink()
    with Service(tmp_path) as service:
        service.ready()
        connected(service.socket, socket.SOCK_SEQPACKET).close()
        assert service.stop() == 0
        assert not service.socket.exists()


def test_serve_does_not_push_another_out(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.ready()
        arguments = ["--socket", str(service.socket), "--admin-socket", str(tmp_path / "other")]
        second = subprocess.run(
            [IRQROUTER, "serve", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert second.returncode == 2
        assert f"irqrouter serve: {service.socket}: somebody listens there already" in second.stderr
        assert service.socket.is_socket()
        assert service.stop() == 0


def test_serve_leaves_a_socket_alone_that_is_not_its_own_any_more(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.ready()
        service.socket.unlink()
        service.socket.write_text("somebody else's")
        assert service.stop() == 0
    assert service.socket.read_text() == "somebody else's"


def test_serve_takes_every_descriptor_it_may_have(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.ready()
        soft, hard = resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize("endpoint", ["unix", "tcp"])
def test_serve_metrics_when_configured(tmp_path: Path, endpoint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listen = f"unix:{tmp_path}/metrics" if endpoint == "unix" else f"127.0.0.1:{port}"
    config = tmp_path / "irqrouter.toml"
    config.write_text(f'[metrics]\nlisten = "{listen}"\n')
    with Service(tmp_path, "--config", str(config)) as service:
        service.ready()
        client = (
            connected(tmp_path / "metrics", socket.SOCK_STREAM)
            if endpoint == "unix"
            else socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        )
        with client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            received = b""
            while part := client.recv(65536):
                received += part
        assert b"irqrouter_vms 0.0" in received
        assert service.stop() == 0
    assert not (tmp_path / "metrics").exists()


# --- socket activation -------------------------------------------------------------------------------------------

ACTIVATE = "/usr/bin/systemd-socket-activate"


@pytest.mark.parametrize("loop", LOOPS)
def test_serve_both_sockets_passed_as_by_one_socket_unit(tmp_path: Path, loop: str) -> None:
    """Both, with the one name that a socket unit gives both of them."""
    agent, admin = tmp_path / "passed-agent", tmp_path / "passed-admin"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as second,
    ):
        first.bind(str(admin))
        first.listen()
        second.bind(str(agent))
        second.listen()
        # What systemd does between fork and exec: descriptors from 3 on, and the new process's own id. The originals
        # are far from 3 and 4, so that the shell does not overwrite one with the other.
        high = [os.dup2(sock.fileno(), 200 + at) for at, sock in enumerate((first, second))]
        passing = (
            "exec 3<&200 4<&201 200<&- 201<&-; "
            'LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=irqrouter.socket:irqrouter.socket exec "$@"'
        )
        command = ("bash", "-c", passing, "passing", IRQROUTER, "serve", "--loop", loop)
        try:
            service = Service(tmp_path, command=command, sockets=False, pass_fds=tuple(high))
        finally:
            for fd in high:
                os.close(fd)
    with service:
        service.ready()
        assert status(admin).pid == service.process.pid
        connected(agent, socket.SOCK_SEQPACKET).close()
        assert service.stop() == 0
    assert agent.is_socket()  # they are systemd's: they stay
    assert admin.is_socket()


@pytest.mark.skipif(not Path(ACTIVATE).exists(), reason=f"{ACTIVATE} is not installed")
@pytest.mark.parametrize("kind", ["agent", "admin"])
def test_serve_activated_by_systemd_socket_activate(tmp_path: Path, kind: str) -> None:
    passed, other = tmp_path / "passed", tmp_path / "other"
    option, own = (["--seqpacket"], "--admin-socket") if kind == "agent" else ([], "--socket")
    command = (ACTIVATE, *option, f"--listen={passed}", "-E", "NOTIFY_SOCKET", IRQROUTER, "serve", own, str(other))
    with Service(tmp_path, command=command, sockets=False) as service:
        until(passed)
        with connected(passed, socket.SOCK_SEQPACKET if kind == "agent" else socket.SOCK_STREAM):
            service.ready()  # it was the connection that started it
            assert status(other if kind == "agent" else passed).pid == service.process.pid
            assert service.stop() == 0
    assert not other.exists()


def test_serve_refuses_a_socket_it_has_no_use_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.bind(str(tmp_path / "datagram"))
        high = os.dup2(datagram.fileno(), 200)
        try:
            run = subprocess.run(
                ["bash", "-c", f'exec 3<&{high}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', "passing", IRQROUTER, "serve"],
                pass_fds=(high,), capture_output=True, text=True, timeout=PATIENCE_S, check=False,
            )  # fmt: skip
        finally:
            os.close(high)
    assert (run.returncode, run.stderr) == (
        2,
        "irqrouter serve: descriptor 3: must be an AF_UNIX socket, SOCK_SEQPACKET or SOCK_STREAM\n",
    )


# --- in this process ---------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("quiet_signals", "nothing_leaks")
@pytest.mark.parametrize("loop", list(Loop))
def test_run_a_core_that_fails_ends_the_process_with_1(
    tmp_path: Path, loop: Loop, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(FakeCore):
        async def serve(self, listener: socket.socket) -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError

    options = Options(socket=str(tmp_path / "a"), admin_socket=str(tmp_path / "b"), loop=loop)
    assert daemon.run(options, environ={}, make_core=Failing) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("quiet_signals", "nothing_leaks")
def test_run_serving_that_just_ends_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Ending(FakeCore):
        async def serve(self, listener: socket.socket) -> None:
            return

    options = Options(socket=str(tmp_path / "a"), admin_socket=str(tmp_path / "b"))
    assert daemon.run(options, environ={}, make_core=Ending) == 1
    assert "agents: serving ended without having been told to" in capsys.readouterr().err


@pytest.mark.usefixtures("quiet_signals", "nothing_leaks")
def test_run_reload_reaches_the_core_and_the_command_line_still_wins(tmp_path: Path) -> None:
    file = tmp_path / "irqrouter.toml"
    file.write_text('prefetch = false\nlog_level = "error"')
    cores: list[FakeCore] = []

    class Reloaded(FakeCore):
        def __init__(self, config: Config, happenings: Happenings) -> None:
            super().__init__(config, happenings)
            cores.append(self)

        async def serve(self, listener: socket.socket) -> None:
            assert not self.config.prefetch
            await asyncio.sleep(0)
            file.write_text('socket = "/elsewhere"\n[limits]\nvms = 3')
            os.kill(os.getpid(), signal.SIGHUP)
            await super().serve(listener)

        def reconfigure(self, config: Config) -> None:
            super().reconfigure(config)
            os.kill(os.getpid(), signal.SIGTERM)

    options = Options(config=file, socket=str(tmp_path / "a"), admin_socket=str(tmp_path / "b"), log_level="warning")
    assert daemon.run(options, environ={}, make_core=Reloaded) == 0
    [core] = cores
    assert (core.config.prefetch, core.config.limits.vms) == (True, 3)
    assert (core.config.socket, core.config.log_level) == (str(tmp_path / "a"), "warning")


def test_options_that_do_not_fit_are_the_command_lines_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line: socket 'relative' must be an absolute path"):
        Options(socket="relative").load()
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        Options(config=tmp_path / "none.toml").load()


@pytest.mark.usefixtures("nothing_leaks")
def test_listening_socket_is_for_owner_and_group(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with listening(str(tmp_path / "new" / "socket"), socket.SOCK_SEQPACKET) as sock:
            assert stat.S_IMODE((tmp_path / "new" / "socket").stat().st_mode) == 0o660
            assert not sock.getblocking()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert not (tmp_path / "new" / "socket").exists()


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: path.write_text("a file"), "is there and is no socket"),
        (lambda path: path.mkdir(), "is there and is no socket"),
        (lambda path: path.symlink_to("/run/elsewhere"), "is there and is no socket"),
    ],
)
def test_listening_replaces_nothing_but_sockets(tmp_path: Path, make: Callable[[Path], object], rule: str) -> None:
    make(tmp_path / "socket")
    with pytest.raises(SocketBusyError, match=re.escape(rule)), listening(str(tmp_path / "socket"), socket.SOCK_STREAM):
        pass
    assert os.path.lexists(tmp_path / "socket")


@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("theirs", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_listening_does_not_replace_a_socket_of_any_type_that_listens(tmp_path: Path, theirs: int) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, theirs) as other:
        other.bind(path)
        other.listen(0)
        with (
            pytest.raises(SocketBusyError, match="somebody listens there already"),
            listening(path, socket.SOCK_STREAM),
        ):
            pass
        assert Path(path).is_socket()


def test_listening_where_it_may_not_says_so(tmp_path: Path) -> None:
    with pytest.raises(KernelError) as failed, listening("/proc/irqrouter/socket", socket.SOCK_STREAM):
        pass
    assert failed.value.errno in {errno.ENOENT, errno.EPERM, errno.EACCES}
    assert failed.value.object == "/proc/irqrouter/socket"


def test_listening_what_fails_inside_is_not_the_sockets_fault(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), listening(str(tmp_path / "socket"), socket.SOCK_STREAM):
        raise ConnectionResetError(errno.ECONNRESET, "in the body")
    assert not (tmp_path / "socket").exists()
