"""The command line as a whole: help, version, exit statuses."""

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from irqrouter import cli
from irqrouter.cli import decode, doctor
from irqrouter.errors import CallerError

COMMANDS = ["demo", "stress", "torture", "decode", "doctor", "serve", "status", "top", "trace"]


def exit_status(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def test_main_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--help") == 0
    printed = capsys.readouterr()
    for command in COMMANDS:
        assert f"\n    {command} " in printed.out
    assert not printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_main_help_of_a_command_shows_its_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: irqrouter {command} ")


def test_main_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"irqrouter {version('irqrouter')}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["doctor", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["decode", "msi", "FEE00000"], "the following arguments are required: DATA"),
        (["demo", "--seconds", "0"], "must be above 0"),
        (["stress", "--events", "many"], "invalid positive value: 'many'"),
    ],
)
def test_main_called_wrongly_is_exit_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert not printed.out


def test_main_returns_what_the_command_returns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["decode", "rte", "002100000000A009"]) == 0
    assert "=> sends FEE00210/00008009\n" in capsys.readouterr().out
    assert cli.main(["decode", "rte", "hello"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(doctor, "diagnosis", lambda: doctor.Diagnosis(usable=False, facts=[]))
    assert cli.main(["doctor", "--json"]) == 1


def test_main_with_an_error_of_irqrouters_own_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: argparse.Namespace) -> int:
        raise CallerError("vector 3", "must be elsewhere")

    monkeypatch.setattr(decode, "run", refuse)
    assert cli.main(["decode", "rte", "0"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "irqrouter decode: vector 3: must be elsewhere\n")


def test_main_interrupted_ends_quietly_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "run", interrupted)
    assert cli.main(["decode", "rte", "0"]) == 130
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_main_does_not_hide_what_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(decode, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["decode", "rte", "0"])


def test_main_is_the_installed_script() -> None:
    script = Path(sys.executable).parent / "irqrouter"
    ran = subprocess.run([script, "decode", "rte", "0"], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("RTE ")


def test_main_first_steps_in_the_help_can_be_parsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_status("--help")
    steps = [
        line.strip().removeprefix("irqrouter ").split("  ")[0].split()
        for line in capsys.readouterr().out.partition("first steps:")[2].splitlines()
        if line.strip()
    ]
    assert len(steps) >= 3
    for command, *arguments in steps:
        monkeypatch.setattr(f"irqrouter.cli.{command}.run", lambda _: 0)
        assert cli.main([command, *arguments]) == 0
