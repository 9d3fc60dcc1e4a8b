"""A real ``irqrouter serve`` in a process of its own, and systemd's ear for what it says."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

IRQROUTER = str(Path(sys.executable).parent / "irqrouter")
#: For this long anything may take; a test that waits longer has failed.
PATIENCE_S = 30.0


class Systemd:
    """The other side of ``NOTIFY_SOCKET``."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(PATIENCE_S)
        #: Everything that was said, in order.
        self.said: list[str] = []

    def wait_for(self, field: str) -> str:
        """The next message with this field, whatever comes before it."""
        while True:
            message = self._socket.recv(4096).decode()
            self.said.append(message)
            if field in message.split("\n"):
                return message

    def is_silent(self) -> bool:
        """Whether, after what was said before, nothing comes for several times as long as a watchdog waits here."""
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(4096)
        self._socket.settimeout(0.5)
        try:
            self._socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(PATIENCE_S)
        return False

    def close(self) -> None:
        self._socket.close()


class Service:
    """A process that serves, until the ``with`` block ends."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        environ: Mapping[str, str] | None = None,
        command: tuple[str, ...] = (IRQROUTER, "serve"),
        sockets: bool = True,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.systemd = Systemd(directory)
        self.socket = directory / "agent.socket"
        self.admin_socket = directory / "admin.socket"
        self.log = directory / "log"
        paths = ["--socket", str(self.socket), "--admin-socket", str(self.admin_socket)] if sockets else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *paths, *arguments],
                env={**os.environ, "NOTIFY_SOCKET": self.systemd.address, **(environ or {})},
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=pass_fds,
            )

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.systemd.close()
        if error is not None:
            print(self.logged(), file=sys.stderr)

    def ready(self) -> "Service":
        """Wait until it says so."""
        self.systemd.wait_for("READY=1")
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask it to stop; its exit status."""
        self.signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def logged(self) -> str:
        return self.log.read_text()


def connected(path: Path, kind: int) -> socket.socket:
    """A connection; the peer accepts when it gets to it."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PATIENCE_S)
    sock.connect(str(path))
    return sock


def until(path: Path) -> None:
    """Wait until there is a socket at ``path``: there is nothing to wait on in a directory but time."""
    end = time.monotonic() + PATIENCE_S
    while not path.is_socket():
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.01)
