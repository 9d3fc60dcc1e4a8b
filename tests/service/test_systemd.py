"""The units as systemd's own tools see them, and the service under what they forbid."""

import configparser
import ctypes
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from irqrouter.service import wire
from irqrouter.service.config import DEFAULT_ADMIN_SOCKET, DEFAULT_PATH, DEFAULT_SOCKET
from tests.service.running import IRQROUTER, PATIENCE_S, Service, connected

UNITS = Path(__file__).parents[2] / "systemd"
SERVICE, SOCKET = UNITS / "irqrouter.service", UNITS / "irqrouter.socket"

needs_analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def settings(unit: Path, section: str) -> dict[str, list[str]]:
    """Every value of every key: a unit may say a key several times."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif line and not line.startswith("#") and current == section:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, with the program where it is: ``verify`` looks for it."""
    for unit in (SERVICE, SOCKET):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/irqrouter", IRQROUTER))
    return tmp_path


@needs_analyze
def test_units_verify_finds_nothing(installed: Path) -> None:
    verified = analyze("verify", "--man=no", installed / SERVICE.name, installed / SOCKET.name)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@needs_analyze
def test_units_verify_would_find_something(installed: Path) -> None:
    unit = installed / SERVICE.name
    unit.write_text(unit.read_text().replace("WatchdogSec=10", "WatchdogSeconds=10"))
    assert "WatchdogSeconds" in analyze("verify", "--man=no", unit).stderr


@needs_analyze
def test_units_exposure_is_at_most_one_and_a_half(installed: Path) -> None:
    said = analyze("security", "--offline=yes", "--no-pager", installed / SERVICE.name)
    overall = re.search(r"Overall exposure level for irqrouter\.service: ([0-9.]+) ", said.stdout)
    assert overall, said.stdout + said.stderr
    assert float(overall[1]) <= 1.5


def test_units_agree_with_the_service() -> None:
    listens = settings(SOCKET, "Socket")
    assert listens["ListenSequentialPacket"] == [DEFAULT_SOCKET]
    assert listens["ListenStream"] == [DEFAULT_ADMIN_SOCKET]
    assert "FileDescriptorName" not in listens
    service = settings(SERVICE, "Service")
    assert service["Type"] == ["notify"]
    assert service["ExecStart"] == ["/usr/bin/irqrouter serve"]
    assert Path("/etc/irqrouter/irqrouter.toml") == DEFAULT_PATH
    assert (UNITS / DEFAULT_PATH.name).is_file()


def test_units_hold_the_availability_contract() -> None:
    assert settings(SERVICE, "Unit")["StartLimitIntervalSec"] == ["0"]
    service = settings(SERVICE, "Service")
    assert service["Restart"] == ["always"]
    assert service["RestartSec"] == ["20ms"]
    assert service["WatchdogSec"] == ["10"]


def test_units_users_of_peers_stay_visible() -> None:
    """In a user namespace SO_PEERCRED would say "nobody" of everybody, and no client could be told from another."""
    assert "PrivateUsers" not in settings(SERVICE, "Service")


def test_units_are_no_ini_files_with_a_key_in_a_wrong_section() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    for unit, sections in ((SERVICE, {"Unit", "Service", "Install"}), (SOCKET, {"Unit", "Socket", "Install"})):
        parser.clear()
        parser.read(unit)
        assert set(parser.sections()) == sections


# --- under what the unit forbids ---------------------------------------------------------------------------------


def libseccomp() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None


@functools.cache
def group(name: str) -> frozenset[str]:
    """The system calls in a group, as systemd knows it."""
    calls: set[str] = set()
    for line in analyze("syscall-filter", name).stdout.splitlines():
        entry = line.strip()
        if entry.startswith("@"):
            calls |= group(entry) if entry != name else set()
        elif entry and not entry.startswith("#"):
            calls.add(entry)
    return frozenset(calls)


def allowed() -> set[str]:
    """What ``SystemCallFilter=`` lets through. The first line is a list of what is allowed, and brings @default."""
    calls: set[str] = set(group("@default"))
    for value in settings(SERVICE, "Service")["SystemCallFilter"]:
        named = {call for entry in value.removeprefix("~").split() for call in
                 (group(entry) if entry.startswith("@") else {entry})}  # fmt: skip
        calls = calls - named if value.startswith("~") else calls | named
    return calls


#: Applies a filter and refuses executable memory to itself, then becomes the service.
LAUNCHER = """
import ctypes, os, sys
calls, command = sys.argv[1].split(","), sys.argv[2:]
libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
seccomp.seccomp_init.restype = ctypes.c_void_p
SCMP_ACT_ALLOW, SCMP_ACT_EPERM = 0x7FFF0000, 0x00050001
context = ctypes.c_void_p(seccomp.seccomp_init(SCMP_ACT_EPERM))
for call in [*calls, "execve"]:  # systemd filters before it executes, and lets that through
    number = seccomp.seccomp_syscall_resolve_name(call.encode())
    if number >= 0:
        assert seccomp.seccomp_rule_add_array(context, SCMP_ACT_ALLOW, number, 0, None) == 0, call
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(77)  # before Linux 6.3
assert seccomp.seccomp_load(context) == 0
os.execv(command[0], command)
"""


def attach(path: Path) -> None:
    """Say HELLO as an agent, and be welcomed: the service looks at descriptors, and makes a memfd."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    doorbell = os.eventfd(0, os.EFD_NONBLOCK)
    hello = wire.Hello(name="guest", slots=64, remapper=wire.RemapperKind.NONE)
    frame = wire.Frame(1, wire.Command.HELLO, wire.encode_hello(hello))
    with ours, theirs, connected(path, socket.SOCK_SEQPACKET) as agent:
        try:
            socket.send_fds(agent, [wire.encode(frame)], [theirs.fileno(), doorbell])
            packet, pages, _, _ = socket.recv_fds(agent, 65536, 4)
        finally:
            os.close(doorbell)
        for page in pages:
            os.close(page)
    reply = wire.decode(packet)
    assert (reply.errno, len(pages)) == (0, 1), wire.error_of(reply) if reply.errno else pages


@needs_analyze
@pytest.mark.skipif(libseccomp() is None, reason="libseccomp is not installed")
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_units_service_runs_within_the_filter_and_without_executable_memory(tmp_path: Path, loop: str) -> None:
    calls = allowed()
    assert {"memfd_create", "recvmsg", "epoll_wait"} <= calls
    assert not {"mount", "ptrace", "bpf", "setns", "shmat", "chown", "reboot", "kexec_load"} & calls
    command = (sys.executable, "-c", LAUNCHER, ",".join(sorted(calls)), IRQROUTER, "serve", "--loop", loop)
    with Service(tmp_path, command=command, environ={"WATCHDOG_USEC": "200000"}) as service:
        service.ready()
        service.systemd.wait_for("WATCHDOG=1")
        with (
            connected(service.socket, socket.SOCK_SEQPACKET),
            connected(service.admin_socket, socket.SOCK_STREAM) as admin,
        ):
            admin.sendall(b'{"method":"io.irqrouter.Admin.ListVms"}\0')
            assert admin.recv(4096) == b'{"parameters":{"vms":[]}}\0'
        attach(service.socket)
        service.signal(signal.SIGHUP)
        service.systemd.wait_for("READY=1")
        assert service.stop() == 0
        assert "Traceback" not in service.logged()
        assert "rror" not in service.logged()
