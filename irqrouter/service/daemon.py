"""``irqrouter serve``: the process around the server.

Sockets come from systemd, or are made here. SIGTERM and SIGINT stop the service, SIGHUP has it read its configuration
again. Nothing is saved and nothing is restored: agents connect again and tell a new service everything it needs.
"""

import asyncio
import contextlib
import enum
import errno
import faulthandler
import fcntl
import gc
import os
import resource
import signal
import socket
import stat
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog

from irqrouter.errors import CallerError, InternalError, KernelError
from irqrouter.service import metrics
from irqrouter.service.admin import AdminServer, Core, ServiceStatus
from irqrouter.service.config import DEFAULT_PATH, Config, ConfigError, Endpoint, LogLevel, load
from irqrouter.service.logs import Logs
from irqrouter.service.notify import Notifier, activated, watchdog_interval_s
from irqrouter.service.server import Server
from irqrouter.service.status import Happenings

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("irqrouter")

#: Connections that wait to be accepted: every agent of a host, after a restart.
_BACKLOG: Final = 512

#: What only a restart changes.
_NOT_RELOADED: Final = ("socket", "admin_socket", "log_format", "metrics")


class Loop(enum.Enum):
    """The event loop to run on."""

    UVLOOP = "uvloop"
    ASYNCIO = "asyncio"

    def factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        """Makes one."""
        if self is Loop.ASYNCIO:
            return asyncio.new_event_loop
        import uvloop

        return uvloop.new_event_loop


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says. It wins over the file, also when the file is read again."""

    config: Path | None = None
    socket: str | None = None
    admin_socket: str | None = None
    log_level: LogLevel | None = None
    loop: Loop = Loop.UVLOOP

    def file(self) -> Path | None:
        """The configuration file; None where none was named and there is none where one would be."""
        return self.config or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)

    def load(self) -> Config:
        """The configuration that holds."""
        path = self.file()
        config = load(path) if path else Config()
        said = {key: value for key in ("socket", "admin_socket", "log_level") if (value := getattr(self, key))}
        try:
            return msgspec.structs.replace(config, **said)
        except ValueError as error:
            raise ConfigError("command line", str(error)) from None


class SocketBusyError(CallerError):
    """Somebody listens on the socket already, or what is there is no socket."""


class RoutingCore(Core, Protocol):
    """What the daemon runs: a :class:`~irqrouter.service.server.Server`."""

    async def serve(self, listener: socket.socket) -> None:
        """Serve agents until cancelled."""
        ...

    def reconfigure(self, config: Config) -> None:
        """From now on ``config`` holds."""
        ...


def run(
    options: Options,
    *,
    environ: MutableMapping[str, str] = os.environ,
    make_core: Callable[[Config, Happenings], RoutingCore] = Server,
) -> int:
    """Serve until told to stop; 0 then, 1 after a failure. Raises a ``CallerError`` if it cannot begin."""
    config = options.load()
    notifier = Notifier.from_environment(environ)
    logs = Logs(config.log_level, config.log_format, environ=environ)
    try:
        with contextlib.closing(notifier), _listening(config, environ) as listeners:
            _raise_descriptor_limit()
            if not faulthandler.is_enabled():
                faulthandler.enable()  # systemd's watchdog sends SIGABRT: the log then says where the loop was stuck
            daemon = Daemon(options, config, notifier, logs, make_core)
            with asyncio.Runner(loop_factory=options.loop.factory()) as runner:
                return runner.run(daemon.run(listeners, watchdog_interval_s(environ)))
    finally:
        logs.close()


class Listeners(msgspec.Struct, frozen=True):
    """The sockets that are listened on."""

    agent: socket.socket
    admin: socket.socket
    metrics: socket.socket | None


class Daemon:
    """The service while it runs: what the admin plane sees of it, and what signals do to it."""

    def __init__(
        self,
        options: Options,
        config: Config,
        notifier: Notifier,
        logs: Logs,
        make_core: Callable[[Config, Happenings], RoutingCore],
    ) -> None:
        self._options = options
        self._config = config
        self._notifier = notifier
        self._logs = logs
        self._started = time.monotonic()
        self._stop = asyncio.Event()
        happenings = Happenings()
        self._core = make_core(config, happenings)
        self._admin = AdminServer(self._core, self, happenings)
        self._metrics = metrics.ServiceMetrics(self._core, per_vector=config.metrics.per_vector)

    async def run(self, listeners: Listeners, watchdog_s: float | None) -> int:
        """Serve until told to stop."""
        status = 0
        try:
            with self._signals():
                await self._serve(listeners, watchdog_s)
        except* Exception as failures:
            # The unit starts it again at once, and the agents tell the new one everything.
            log.exception("failed", exc_info=failures)
            status = 1
        return status

    async def _serve(self, listeners: Listeners, watchdog_s: float | None) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_for_ever(name, served)) for name, served in self._services(listeners)]
            with _watchdog(self._notifier, watchdog_s):
                self._begun(listeners)
                await self._stop.wait()
            log.info("stopping")
            self._notifier.stopping()
            for task in tasks:
                task.cancel()

    def _services(self, listeners: Listeners) -> Generator[tuple[str, Coroutine[None, None, None]]]:
        yield "agents", self._core.serve(listeners.agent)
        yield "admin", self._admin.serve(listeners.admin)
        if listeners.metrics is not None:
            yield "metrics", metrics.serve(listeners.metrics, self._metrics)

    def _begun(self, listeners: Listeners) -> None:
        log.info(
            "serving",
            version=version("irqrouter"),
            socket=_name(listeners.agent),
            admin_socket=_name(listeners.admin),
            config=str(self._options.file() or "none"),
        )
        # What exists now stays: the collector need not look at it again, and its pauses become short ones.
        gc.collect()
        gc.freeze()
        self._notifier.ready(f"Serving agents on {_name(listeners.agent)}")

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        handlers = {
            signal.SIGTERM: self._stop.set,
            signal.SIGINT: self._stop.set,
            signal.SIGHUP: self._reload,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _reload(self) -> None:
        """Read the configuration again; keep the old one if the new one is wrong."""
        if self._stop.is_set():
            return
        self._notifier.reloading()
        try:
            config = self._options.load()
        except CallerError as error:
            log.error("configuration not reloaded", rule=str(error))  # noqa: TRY400 - the error says it all
            self._notifier.ready(f"Serving; configuration not reloaded: {error}")
            return
        kept = {key: getattr(self._config, key) for key in _NOT_RELOADED}
        if changed := [key for key, value in kept.items() if getattr(config, key) != value]:
            log.warning("these keys need a restart", keys=", ".join(changed))
        self._config = msgspec.structs.replace(config, **kept)
        self._logs.level = self._config.log_level
        self._core.reconfigure(self._config)
        log.info("configuration reloaded", config=str(self._options.file() or "none"))
        self._notifier.ready("Serving; configuration reloaded")

    # --- what the admin plane asks -------------------------------------------------------------------------------

    def status(self) -> ServiceStatus:
        """The service at this moment."""
        vms = self._core.vms()
        path = self._options.file()
        kind = type(asyncio.get_running_loop())
        return ServiceStatus(
            version=version("irqrouter"),
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started,
            loop=f"{kind.__module__.partition('.')[0]}.{kind.__name__}",
            log_level=self._logs.level,
            config=str(path) if path else None,
            vms=len(vms),
            vectors=sum(vm.vectors for vm in vms),
            listeners=self._admin.listeners,
        )

    def set_log_level(self, level: LogLevel) -> None:
        """Log from this level on, until the configuration is read again."""
        self._logs.level = level
        log.info("log level set", log_level=level)

    def administered_by(self, uid: int, gid: int, groups: Iterable[int]) -> bool:
        """Whether a process like this may use the admin plane."""
        return self._config.admins.permits(uid, gid, groups)


async def _for_ever(name: str, served: Coroutine[None, None, None]) -> None:
    await served
    raise InternalError(name, "serving ended without having been told to")


@contextlib.contextmanager
def _watchdog(notifier: Notifier, interval_s: float | None) -> Generator[None]:
    """Tell systemd again and again that the service is alive.

    A timer of the loop tells it, and no thread: it is the loop that serves, and a loop that is stuck in a callback, or
    spins in one, must fall silent, so that systemd ends the process and starts another.
    """
    if not interval_s:
        yield
        return
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def tell() -> None:
        nonlocal timer
        notifier.alive()
        timer = loop.call_later(interval_s, tell)

    tell()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


# --- sockets -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _listening(config: Config, environ: MutableMapping[str, str]) -> Generator[Listeners]:
    """The sockets: those that systemd passed, and for the others new ones, which are removed at the end."""
    passed = activated(environ)
    with contextlib.ExitStack() as opened:
        for each in (passed.agent, passed.admin):
            if each is not None:
                opened.enter_context(each)
        agent = passed.agent or opened.enter_context(listening(config.socket, socket.SOCK_SEQPACKET))
        admin = passed.admin or opened.enter_context(listening(config.admin_socket, socket.SOCK_STREAM))
        endpoint = config.metrics.endpoint()
        yield Listeners(agent, admin, opened.enter_context(_listening_for_metrics(endpoint)) if endpoint else None)


@contextlib.contextmanager
def listening(path: str, kind: socket.SocketKind) -> Generator[socket.socket]:
    """A listening ``AF_UNIX`` socket at ``path`` that its owner and group may use.

    A socket file whose listener is gone is replaced. At the end the file is removed if it is still this socket's.
    """
    file = Path(path)
    try:
        sock, ours = _bound(file, kind)
    except OSError as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(error.errno or errno.EIO, "listen", path) from error
    with sock:
        try:
            yield sock
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(file.stat(), ours):
                    file.unlink()


def _bound(file: Path, kind: socket.SocketKind) -> tuple[socket.socket, os.stat_result]:
    """A listening socket, and its file as it is now."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened, _alone(file.parent):
        sock = opened.enter_context(socket.socket(socket.AF_UNIX, kind))
        _remove_stale(file, kind)
        before = os.umask(0o117)
        try:
            sock.bind(str(file))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        status = file.stat()
        opened.pop_all()
    return sock, status


@contextlib.contextmanager
def _alone(directory: Path) -> Generator[None]:
    """Of several services that start at once, one at a time looks for stale sockets here."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_stale(file: Path, kind: socket.SocketKind) -> None:
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketBusyError(str(file), "is there and is no socket: it is not replaced")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        refusal = probe.connect_ex(str(file))
    if refusal == errno.ECONNREFUSED:
        file.unlink()
    else:
        raise SocketBusyError(str(file), "somebody listens there already: is another irqrouter serve running?")


@contextlib.contextmanager
def _listening_for_metrics(endpoint: Endpoint) -> Generator[socket.socket]:
    if endpoint.path:
        with listening(endpoint.path, socket.SOCK_STREAM) as sock:
            yield sock
        return
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    where = f"{endpoint.host} port {endpoint.port}"
    try:
        sock = socket.create_server((endpoint.host, endpoint.port), family=family)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "listen", f"metrics on {where}") from error
    with sock:
        yield sock


def _name(sock: socket.socket) -> str:
    return str(sock.getsockname()) or "an unnamed socket"


def _raise_descriptor_limit() -> None:
    """Take every descriptor the process may have: a VM brings one for each vector, and 1,024 is soon too few.

    The usual reason for a low soft limit is ``select(2)``, which nothing here uses.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
