"""What the service may be told: one TOML file, every key of which has a default."""

import grp
import ipaddress
import os
import pwd
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias, get_args

import msgspec

from irqrouter.errors import CallerError
from irqrouter.service.wire import SLOTS_MAX

#: Where ``irqrouter serve`` looks when it is not told; that this one is missing is no error.
DEFAULT_PATH: Final = Path("/etc/irqrouter/irqrouter.toml")
DEFAULT_SOCKET: Final = "/run/irqrouter/agent.socket"
DEFAULT_ADMIN_SOCKET: Final = "/run/irqrouter/admin.socket"

#: ``sun_path`` has 108 bytes, the last of them a zero.
_SUN_PATH_MAX: Final = 107

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["auto", "journal", "console", "json"]

#: What msgspec does not tell about a value that is none of a few words.
_CHOICES: Final = {"log_level": get_args(LogLevel), "log_format": get_args(LogFormat)}


class ConfigError(CallerError):
    """A configuration that cannot be used: ``object`` names file and key, ``rule`` what is wrong with it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one VM may take, so that no VM takes what is another's."""

    #: VMs attached at a time, whoever's.
    vms: _Count = 256
    #: Vectors of a VM.
    vectors: Annotated[int, msgspec.Meta(ge=1, le=SLOTS_MAX)] = 4096
    #: Memory regions of a VM.
    regions: _Count = 64
    #: Frames of a VM in a second; above it the service reads no more of its frames until the second is over.
    frames_per_second: _Count = 5000
    #: Bytes of a VM's frames in a second, likewise; never less than one whole frame.
    bytes_per_second: Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 40)] = 16 << 20


class Access(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may: users and groups, by name or by number. Names become numbers when a file is loaded."""

    users: tuple[int | str, ...] = ()
    groups: tuple[int | str, ...] = ()

    def permits(self, uid: int, gid: int, groups: Iterable[int] = ()) -> bool:
        """Whether a process with this user, group and these supplementary groups is among them."""
        return uid in self.users or any(each in self.groups for each in (gid, *groups))


def _root_and_self() -> Access:
    return Access(users=tuple(sorted({0, os.geteuid()})))


class Endpoint(msgspec.Struct, frozen=True):
    """Where metrics are served: a ``path``, or a loopback ``host`` and ``port``."""

    path: str = ""
    host: str = ""
    port: int = 0


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prometheus metrics."""

    #: ``""``: none. ``"unix:/path"``, or a loopback address and port: ``"127.0.0.1:9469"``.
    listen: str = ""
    #: Counters of every vector, not only their sums over each VM.
    per_vector: bool = False

    def __post_init__(self) -> None:
        self.endpoint()

    def endpoint(self) -> Endpoint | None:
        """Where to listen; None for nowhere."""
        if not self.listen:
            return None
        if self.listen.startswith("unix:"):
            path = self.listen.removeprefix("unix:")
            _check_path("listen", path)
            return Endpoint(path=path)
        host, _, port = self.listen.rpartition(":")
        if not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError(f"listen {self.listen!r} must be unix:/path, or a loopback address and a port")
        if not _is_loopback(host.removeprefix("[").removesuffix("]")):
            raise ValueError(f"listen {self.listen!r} must be on a loopback address: metrics never leave the host")
        return Endpoint(host=host.removeprefix("[").removesuffix("]"), port=int(port))


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the service may be told."""

    #: The agents' socket, where systemd passes none.
    socket: str = DEFAULT_SOCKET
    #: The varlink socket, where systemd passes none.
    admin_socket: str = DEFAULT_ADMIN_SOCKET
    #: Whose processes may attach a VM.
    clients: Access = msgspec.field(default_factory=_root_and_self)
    #: Whose processes may look into the service, and detach VMs.
    admins: Access = msgspec.field(default_factory=_root_and_self)
    limits: Limits = Limits()
    #: Translate at once after an invalidation, so that the next event finds a decision; otherwise when it comes.
    prefetch: bool = True
    log_level: LogLevel = "info"
    #: ``auto``: for the journal where stderr is the journal, for a console otherwise.
    log_format: LogFormat = "auto"
    metrics: Metrics = Metrics()

    def __post_init__(self) -> None:
        _check_path("socket", self.socket)
        _check_path("admin_socket", self.admin_socket)
        if self.socket == self.admin_socket:
            raise ValueError("socket and admin_socket must be two paths")

    def permitted(self, uid: int, gid: int, groups: Iterable[int] = ()) -> bool:
        """Whether a process with this user, group and these supplementary groups may attach a VM."""
        return self.clients.permits(uid, gid, groups)


def load(path: Path) -> Config:
    """The configuration in the file at ``path``, with every name resolved."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), "must be UTF-8") from None
    return parse(text, str(path))


def parse(text: str, origin: str) -> Config:
    """The configuration in ``text``; ``origin`` is what an error calls it."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(origin, f"is no TOML: {error}") from None
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        key, rule = _key_and_rule(str(error))
        raise ConfigError(f"{origin}: {key}" if key else origin, rule) from None
    return msgspec.structs.replace(
        config,
        clients=_resolved(config.clients, f"{origin}: clients"),
        admins=_resolved(config.admins, f"{origin}: admins"),
    )


def _key_and_rule(message: str) -> tuple[str, str]:
    """Take msgspec's sentence apart: ``Expected `int` >= 1 - at `$.limits.vms```."""
    rule, _, at = message.partition(" - at `$")
    key = at.rstrip("`").removeprefix(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", rule):
        return ".".join(filter(None, (key, unknown[1]))), "there is no such key"
    if choices := _CHOICES.get(key):
        return key, f"must be one of {', '.join(choices)}"
    return key, rule[0].lower() + rule[1:]


def _resolved(access: Access, key: str) -> Access:
    return Access(
        users=_ids(access.users, f"{key}.users", "user", lambda name: pwd.getpwnam(name).pw_uid),
        groups=_ids(access.groups, f"{key}.groups", "group", lambda name: grp.getgrnam(name).gr_gid),
    )


def _ids(given: Iterable[int | str], key: str, kind: str, look_up: Callable[[str], int]) -> tuple[int, ...]:
    ids: set[int] = set()
    for each in given:
        try:
            number = look_up(each) if isinstance(each, str) else each
        except (KeyError, ValueError):  # ValueError: a zero byte in the name
            raise ConfigError(key, f"there is no {kind} {each!r}") from None
        if not 0 <= number < 0xFFFF_FFFF:  # (uid_t)-1 means "nobody in particular" to the kernel
            raise ConfigError(key, f"{number} is no {kind} id")
        ids.add(number)
    return tuple(sorted(ids))


def _check_path(key: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"{key} {path!r} must be an absolute path")
    if len(os.fsencode(path)) > _SUN_PATH_MAX:
        raise ValueError(f"{key} {path!r} must have at most {_SUN_PATH_MAX} bytes")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
