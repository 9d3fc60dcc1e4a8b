"""``irqrouter torture`` and ``irqrouter demo --service``: real VMs, real kills, and what is printed about them."""

import argparse
import itertools
import json
import os
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from irqrouter.cli import demo, torture
from irqrouter.errors import CallerError
from irqrouter.proof import served
from irqrouter.proof import torture as proof_torture
from irqrouter.proof.board import Board
from irqrouter.proof.machine import Machine
from irqrouter.proof.service import ServiceProcess
from irqrouter.scope import Scope
from tests.proof import taking_service

needs_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="there is no /dev/kvm")

KEYS = [
    "kills", "stops", "events", "delivered", "lost", "stale", "duplicated", "coalesced", "faults", "invalidations",
    "invalidation_p50_us", "invalidation_max_us", "deadline_ms", "longest_wait_ms", "over_deadline",
    "reconnects", "caught", "duration_s",
    "agent", "seed",
]  # fmt: skip

#: Instead of the service: the one that takes events while it thinks.
TAKING = (sys.executable, "-m", taking_service.__name__)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="command", required=True)
    demo.add_parser(subparsers)
    torture.add_parser(subparsers)
    return parser.parse_args(arguments)


def run(*arguments: str, service: tuple[str, ...] = ()) -> int:
    args = parsed(*arguments)
    if service:
        args.service = service
    return demo.run(args) if args.command == "demo" else torture.run(args)


def assert_nothing_runs() -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@needs_kvm
@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("agent", ["c", "python"])
def test_torture_by_kills_loses_nothing(capfd: pytest.CaptureFixture[str], agent: str) -> None:
    status = run(
        "torture", "--agent", agent, "--kills", "6", "--vectors", "16", "--vcpus", "2", "--seed", "5", "--json"
    )
    output, messages = capfd.readouterr()
    assert output.count("\n") == 1
    found = json.loads(output)
    assert list(found) == KEYS
    assert (found["kills"], found["stops"], found["agent"], found["seed"]) == (6, 0, agent, 5)
    assert [found[key] for key in ("lost", "stale", "duplicated", "coalesced", "over_deadline")] == [0] * 5, messages
    assert found["events"] == found["delivered"] + found["faults"] > 0
    assert found["reconnects"] >= 6
    assert 0 < found["invalidation_p50_us"] <= found["invalidation_max_us"]
    assert found["invalidations"] > 0
    assert status == 0, messages
    assert_nothing_runs()


@needs_kvm
@pytest.mark.parametrize("agent", ["c", "python"])
def test_torture_by_stops_holds_nobody_up(capfd: pytest.CaptureFixture[str], agent: str) -> None:
    arguments = ("--stop", "0.5", "--stops", "3", "--kills", "1", "--deadline", "30")
    status = run("torture", "--agent", agent, "--vectors", "16", *arguments, "--json")
    output, messages = capfd.readouterr()
    found = json.loads(output)
    assert (found["kills"], found["stops"], found["deadline_ms"]) == (1, 3, 30)
    assert [found[key] for key in ("lost", "stale", "duplicated", "over_deadline")] == [0] * 4, messages
    assert status == 0, messages


@needs_kvm
def test_torture_finds_an_event_that_dies_with_the_service(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("--kills", "100", "--patience", "3", "--seed", "2", "--json")
    status = run("torture", *arguments, service=TAKING)
    output, messages = capfd.readouterr()
    assert status == 1
    assert json.loads(output)["lost"] > 0, (output, messages)
    assert json.loads(output)["kills"] < 100
    assert "LOST: vector " in messages
    assert "History: " in messages
    assert "Seed 2." in messages
    assert_nothing_runs()


@needs_kvm
def test_torture_finds_an_agent_that_does_not_invalidate(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(self: object, scope: Scope) -> int:
        return 0

    monkeypatch.setattr(served.ThroughAgent, "invalidate", deaf)
    assert run("torture", "--kills", "100", "--json") == 1
    assert json.loads(capfd.readouterr().out)["stale"] > 0


@needs_kvm
def test_torture_finds_an_invalidation_that_waits_too_long(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def patient(
        machine: Machine, board: Board, service: ServiceProcess, kind: served.AgentKind, *, deadline_s: float
    ) -> AbstractAsyncContextManager[served.Opened]:
        return served.attached(machine, board, service, kind, deadline_s=20 * deadline_s)

    monkeypatch.setattr(proof_torture, "attached", patient)
    assert run("torture", "--stop", "1.5", "--stops", "3", "--json") == 1
    output, messages = capfd.readouterr()
    found = json.loads(output)
    assert found["over_deadline"] > 0
    assert found["invalidation_max_us"] > 500_000
    assert found["lost"] == 0
    assert "nobody held up         BROKEN" in messages


@needs_kvm
def test_torture_of_a_service_that_ends_by_itself_shows_what_it_said() -> None:
    with pytest.raises(Exception, match=r"(?s)ended by itself with status 1\. It said:.*had enough"):
        run("torture", "--kills", "1", service=(sys.executable, "-c", "import sys; sys.exit('had enough')"))
    assert_nothing_runs()


@needs_kvm
@pytest.mark.usefixtures("nothing_leaks")
@pytest.mark.parametrize("agent", ["c", "python"])
def test_demo_with_service_tells_the_same_story(capfd: pytest.CaptureFixture[str], agent: str) -> None:
    status = run("demo", "--service", "--agent", agent, "--events", "5000", "--json")
    output, messages = capfd.readouterr()
    found = json.loads(output)
    assert found["backend"] == "kvm"
    assert found["events"] == 5000 == found["delivered"] + found["faults"]
    broken = [found[key] for key in ("coalesced", "lost", "stale", "duplicated", "wakeups_while_assigned")]
    assert broken == [0, 0, 0, 0, 0], messages
    assert status == 0
    lines = messages.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == ["I1", "I2", "I3", "I5", "I6"]
    assert "caught and delivered by the agent" in lines[-3]
    assert "events with all vectors assigned woke the service 0 times (it says)" in lines[-1]
    assert_nothing_runs()


@needs_kvm
def test_demo_with_service_that_does_not_sleep_is_found_out(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = itertools.count()
    monkeypatch.setattr(served.Served, "_woken", lambda self: (next(woken), 0))
    assert run("demo", "--service", "--events", "2000", "--json") == 1
    output, messages = capfd.readouterr()
    assert json.loads(output)["wakeups_while_assigned"] > 0
    assert "I6 asleep while assigned  BROKEN" in messages


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--agent", "c"), "--service"),
        (("demo", "--simulated", "--service"), "simulated kernel"),
        (("torture", "--stops", "1"), "--stop"),
    ],
)
def test_command_with_options_that_exclude_each_other_is_refused(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(CallerError, match=says):
        run(*arguments)


@pytest.mark.parametrize("arguments", [("--kills", "-1"), ("--stop", "0"), ("--agent", "cobol"), ("--deadline", "0")])
def test_torture_called_wrongly_exits_with_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("torture", *arguments)
    assert caught.value.code == 2


def test_torture_help_shows_examples(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("torture", "--help")
    assert caught.value.code == 0
    output = capfd.readouterr().out
    assert "examples:" in output
    assert all(option in output for option in ("--kills", "--stop", "--agent", "--deadline", "--seed", "--json"))
