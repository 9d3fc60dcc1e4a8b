"""irqrouter serve, as it is called."""

import socket
import subprocess
from pathlib import Path

import pytest

from irqrouter import cli
from irqrouter.service import daemon
from irqrouter.service.daemon import Loop, Options
from tests.service.running import IRQROUTER, PATIENCE_S, Service, connected


def test_serve_options_reach_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Options] = []

    def take(options: Options) -> int:
        given.append(options)
        return 7

    monkeypatch.setattr(daemon, "run", take)
    assert cli.main(["serve"]) == 7
    files = ["--config", "c.toml", "--socket", "/s", "--admin-socket", "/a"]
    assert cli.main(["serve", *files, "--loop", "asyncio", "--log-level", "debug"]) == 7
    assert given == [
        Options(),
        Options(config=Path("c.toml"), socket="/s", admin_socket="/a", loop=Loop.ASYNCIO, log_level="debug"),
    ]


def test_serve_help_says_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    printed = capsys.readouterr().out
    for word in ("SIGHUP", "systemctl enable --now irqrouter.socket", "/etc/irqrouter/irqrouter.toml", "exit status"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "/no/such.toml"], "/no/such.toml: cannot be read: No such file or directory"),
        (["--socket", "here"], "command line: socket 'here' must be an absolute path"),
        (["--socket", "/proc/x/agent"], "/proc/x/agent: listen failed: ENOENT"),
    ],
)
def test_serve_that_cannot_begin_says_why_in_one_line(arguments: list[str], says: str) -> None:
    ran = subprocess.run(
        [IRQROUTER, "serve", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"irqrouter serve: {says}")
    assert ran.stderr.count("\n") == 1


def test_serve_logs_for_the_journal_when_its_stderr_is_the_journal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    stream = f"{log.stat().st_dev}:{log.stat().st_ino}"
    with Service(tmp_path, environ={"JOURNAL_STREAM": stream}) as service:
        service.ready()
        connected(service.socket, socket.SOCK_SEQPACKET).close()
        assert service.stop() == 0
    lines = service.logged().splitlines()
    assert lines[0].startswith("<6>serving version=")
    assert f"socket={service.socket}" in lines[0]
    assert "<6>stopping" in lines  # the stranger who said nothing may be turned away after that
    assert all(line[0] == "<" and line[1].isdigit() and line[2] == ">" for line in lines)


def test_serve_reads_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "irqrouter.toml"
    config.write_text('log_format = "json"\n')
    with Service(tmp_path, "--config", str(config)) as service:
        service.ready()
        assert service.stop() == 0
    assert f'"config": "{config}"' in service.logged().splitlines()[0]
