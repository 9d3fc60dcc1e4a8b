"""The service of a run: ``irqrouter serve`` in a child process, which can be killed, stopped, and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from irqrouter.errors import IrqrouterError

#: The command that serves, without its options.
COMMAND: Final = (sys.executable, "-m", "irqrouter.proof.service_process")

#: How long a service that is told to end may take before it is killed.
_END_S: Final = 10.0
#: How much of what it said is quoted where it ended by itself.
_QUOTED: Final = 4000


class ServiceFailedError(IrqrouterError):
    """The service ended by itself, or does not do what it is there for."""


class ServiceProcess:
    """A service with sockets of its own in a directory of its own, all of which go with it.

    Not to be used by several threads at a time, :meth:`check` and :meth:`close` excepted.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._directory = tempfile.TemporaryDirectory(prefix="irqrouter-run-")
        directory = Path(self._directory.name)
        self.path = str(directory / "agent.socket")
        self.admin_path = str(directory / "admin.socket")
        self._config = directory / "irqrouter.toml"
        self._config.write_text("# Every key has its default.\n", encoding="utf-8")
        self._said = directory / "stderr"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # over changes of the process
        self._closed = False

    @property
    def pid(self) -> int:
        """The process, 0 where there is none."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it; it listens soon."""
        with self._lock:
            if self._closed:
                return
            self._process = self._started()

    def _started(self) -> "subprocess.Popen[bytes]":
        with self._said.open("ab") as said:
            return subprocess.Popen(
                [
                    *self._command,
                    "--socket",
                    self.path,
                    "--admin-socket",
                    self.admin_path,
                    "--config",
                    str(self._config),
                ],
                stdin=subprocess.PIPE,  # nothing is ever written: see service_process.py
                stdout=subprocess.DEVNULL,
                stderr=said,
                process_group=0,  # Ctrl-C is for the command
            )

    def kill(self) -> None:
        """End it as ``kill -9`` does. Raises :class:`ServiceFailedError` if it had ended by itself."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            ended = process.poll()
            process.kill()
            self._reap(process)
            if ended is not None:
                raise self._ended(ended)

    def stop(self) -> None:
        """Stop it as ``kill -STOP`` does; it runs no more when this returns."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self) -> None:
        """Let it run again."""
        self._running().send_signal(signal.SIGCONT)

    def check(self) -> None:
        """Raise :class:`ServiceFailedError`, with what it said, if it ended by itself."""
        with self._lock:
            ended = None if self._process is None else self._process.poll()
        if ended is not None:
            raise self._ended(ended)

    def said(self) -> str:
        """The end of what it wrote to its standard error."""
        with contextlib.suppress(FileNotFoundError):
            return self._said.read_bytes()[-_QUOTED:].decode(errors="replace")
        return ""

    def close(self) -> None:
        """End it, and remove what it left. Idempotent."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()
            self._reap(process)
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise ServiceFailedError("the service", "was not started")
        return self._process

    def _ended(self, status: int) -> ServiceFailedError:
        return ServiceFailedError("the service", f"ended by itself with status {status}. It said:\n{self.said()}")

    @staticmethod
    def _reap(process: "subprocess.Popen[bytes]") -> None:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
