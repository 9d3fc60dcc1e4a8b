"""The configuration file: every key, every way to get one wrong."""

import os
import pwd
import tomllib
from pathlib import Path

import msgspec
import pytest

from irqrouter.errors import CallerError
from irqrouter.service.config import Access, Config, ConfigError, Endpoint, Limits, load, parse

SHIPPED = Path(__file__).parents[2] / "systemd" / "irqrouter.toml"


def test_config_an_empty_file_is_the_defaults() -> None:
    assert parse("", "f") == Config()


def test_config_defaults_let_in_root_and_ourselves_only() -> None:
    config = Config()
    assert config.permitted(0, 0)
    assert config.permitted(os.geteuid(), 12345)
    assert not config.permitted(12345, 12345, [12346])


def test_config_the_shipped_file_says_the_defaults(tmp_path: Path) -> None:
    assert load(SHIPPED) == Config()


def test_config_the_shipped_file_explains_every_key() -> None:
    # The two tables that depend on the host are commented out; uncommented they name the rest.
    text = SHIPPED.read_text()
    raw = tomllib.loads("\n".join(line.removeprefix("#") if line.startswith(("#[", "#users", "#groups")) else line
                                  for line in text.splitlines()))  # fmt: skip
    assert set(raw) == set(Config.__struct_fields__)
    assert set(raw["limits"]) == set(Limits.__struct_fields__)
    assert set(raw["metrics"]) == {"listen", "per_vector"}
    for table in ("clients", "admins"):
        assert set(raw[table]) == set(Access.__struct_fields__)


def test_config_names_become_numbers() -> None:
    root = pwd.getpwuid(0)
    config = parse(f'[clients]\nusers = ["{root.pw_name}", 1234]\ngroups = ["root", 77]\n[admins]\nusers = [5]', "f")
    assert config.clients == Access(users=(0, 1234), groups=(0, 77))
    assert config.admins == Access(users=(5,))


@pytest.mark.parametrize(
    ("uid", "gid", "groups", "permitted"),
    [(7, 1, [], True), (1, 8, [], True), (1, 1, [2, 9], True), (8, 7, [7], False), (9, 1, [], False)],
)
def test_config_access_by_user_group_or_supplementary_group(
    uid: int, gid: int, groups: list[int], permitted: bool
) -> None:
    assert Access(users=(7,), groups=(8, 9)).permits(uid, gid, groups) is permitted


def test_config_nobody_is_named_nobody_is_permitted() -> None:
    assert not parse("[clients]", "f").permitted(0, 0, [0])


@pytest.mark.parametrize(
    ("listen", "endpoint"),
    [
        ("", None),
        ("unix:/run/m", Endpoint(path="/run/m")),
        ("127.0.0.1:9469", Endpoint(host="127.0.0.1", port=9469)),
        ("127.1.2.3:1", Endpoint(host="127.1.2.3", port=1)),
        ("[::1]:65535", Endpoint(host="::1", port=65535)),
    ],
)
def test_config_metrics_endpoint(listen: str, endpoint: Endpoint | None) -> None:
    assert parse(f'[metrics]\nlisten = "{listen}"', "f").metrics.endpoint() == endpoint


@pytest.mark.parametrize(
    ("text", "thing", "rule"),
    [
        ("sockets = 1", "f: sockets", "there is no such key"),
        ("[limits]\nvm = 1", "f: limits.vm", "there is no such key"),
        ("[limits]\nvms = 0", "f: limits.vms", "expected `int` >= 1"),
        ("[limits]\nvectors = 4097", "f: limits.vectors", "<= 4096"),
        ("[limits]\nbytes_per_second = 65535", "f: limits.bytes_per_second", ">= 65536"),
        ('[limits]\nvms = "many"', "f: limits.vms", "expected `int`, got `str`"),
        ("prefetch = 1", "f: prefetch", "expected `bool`, got `int`"),
        ('log_level = "loud"', "f: log_level", "must be one of debug, info, warning, error"),
        ('log_format = "xml"', "f: log_format", "must be one of auto, journal, console, json"),
        ('socket = "run/a"', "f", "socket 'run/a' must be an absolute path"),
        (f'admin_socket = "/{"x" * 107}"', "f", "must have at most 107 bytes"),
        ('socket = "/a"\nadmin_socket = "/a"', "f", "must be two paths"),
        ('[clients]\nusers = ["no-such-user"]', "f: clients.users", "there is no user 'no-such-user'"),
        ('[admins]\ngroups = ["no-such-group"]', "f: admins.groups", "there is no group 'no-such-group'"),
        ("[admins]\nusers = [-1]", "f: admins.users", "-1 is no user id"),
        ("[clients]\ngroups = [4294967295]", "f: clients.groups", "4294967295 is no group id"),
        ("[clients]\nusers = [true]", "f: clients.users", "got `bool`"),
        ('[metrics]\nlisten = "0.0.0.0:80"', "f: metrics", "must be on a loopback address"),
        ('[metrics]\nlisten = "localhost:80"', "f: metrics", "must be on a loopback address"),
        ('[metrics]\nlisten = "127.0.0.1:0"', "f: metrics", "must be unix:/path, or a loopback address and a port"),
        ('[metrics]\nlisten = "127.0.0.1:٣"', "f: metrics", "must be unix:/path"),
        ('[metrics]\nlisten = "unix:m"', "f: metrics", "must be an absolute path"),
        ("[metrics", "f", "is no TOML"),
    ],
)
def test_config_refuses_and_names_key_and_rule(text: str, thing: str, rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text, "f")
    assert refused.value.object.startswith(thing)
    assert rule in refused.value.rule
    assert isinstance(refused.value, CallerError)


def test_config_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad\.toml: must be UTF-8"):
        load(tmp_path / "bad.toml")


def test_config_is_a_value() -> None:
    with pytest.raises(AttributeError):
        Config().prefetch = False  # type: ignore[misc]
    assert msgspec.structs.replace(Config(), prefetch=False) != Config()
