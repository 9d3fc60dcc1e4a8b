"""``irqrouter demo`` and ``irqrouter stress``: what they print, and how they end."""

import argparse
import itertools
import json
from pathlib import Path

import pytest

from irqrouter.cli import demo, stress
from irqrouter.eventfd_loop import Router
from irqrouter.proof import command
from irqrouter.proof import scenario as scenario_module
from irqrouter.proof.guest import Pairs
from irqrouter.proof.ledger import FAULT, HELD, Rule, Violation
from irqrouter.scope import Scope
from irqrouter.x86.msi import Message, remapped

needs_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="there is no /dev/kvm")
BACKENDS = [pytest.param([], "kvm", marks=needs_kvm), (["--simulated"], "simulated")]

KEYS = [
    "backend", "events", "delivered", "coalesced", "lost", "stale", "duplicated", "wakeups_while_assigned",
    "invalidations", "caught", "faults", "duration_s",
]  # fmt: skip


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="command", required=True)
    demo.add_parser(subparsers)
    stress.add_parser(subparsers)
    args = parser.parse_args(arguments)
    return demo.run(args) if args.command == "demo" else stress.run(args)


@pytest.mark.parametrize(("options", "backend"), BACKENDS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--events", "3000"),
        ("demo", "--events", "3000", "--loop", "asyncio", "--vcpus", "2", "--devices", "1"),
        ("stress", "--events", "3000", "--vectors", "16"),
        (
            "stress",
            "--events",
            "3000",
            "--vectors",
            "16",
            "--events-per-change",
            "1",
            "--drivers",
            "3",
            "--devices",
            "1",
        ),
    ],
    ids=["demo", "small demo on asyncio", "stress", "stress with many changes"],
)
def test_command_with_json_prints_one_object_on_stdout(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], options: list[str], backend: str
) -> None:
    status = run(*arguments, *options, "--seed", "3", "--json")
    output, messages = capfd.readouterr()
    assert output.count("\n") == 1
    found = json.loads(output)
    assert list(found) == KEYS
    assert found["backend"] == backend
    assert found["events"] == 3000 == found["delivered"] + found["faults"]
    broken = [found[key] for key in ("coalesced", "lost", "stale", "duplicated", "wakeups_while_assigned")]
    assert broken == [0, 0, 0, 0, 0], messages
    assert status == 0


@pytest.mark.parametrize(("options", "backend"), BACKENDS)
def test_stress_free_accounts_for_every_event(
    capfd: pytest.CaptureFixture[str], options: list[str], backend: str
) -> None:
    status = run("stress", "--events", "20000", "--vectors", "16", "--free", "--json", *options)
    found = json.loads(capfd.readouterr().out)
    assert (status, found["backend"], found["events"], found["lost"], found["duplicated"]) == (0, backend, 20000, 0, 0)
    assert found["coalesced"] == 20000 - found["delivered"] - found["faults"] > 0


def test_demo_for_seconds_says_what_it_runs_on_and_how_it_went(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--seconds", "0.5", "--simulated") == 0
    output, messages = capfd.readouterr()
    assert messages == ""
    lines = output.splitlines()
    assert lines[0].startswith("running on the simulated kernel, as asked")
    assert [line.split()[0] for line in lines[-5:]] == ["I1", "I2", "I3", "I5", "I6"]
    assert all(" ok " in line for line in lines[-5:])


def test_demo_without_kvm_runs_simulated_and_says_so_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irqrouter.kvm.vm._DEV_KVM", "/nonexistent/kvm")
    assert run("demo", "--events", "500", "--json") == 0
    output, messages = capfd.readouterr()
    assert json.loads(output)["backend"] == "simulated"
    assert "/nonexistent/kvm" in messages.splitlines()[0]
    assert "simulated" in messages.splitlines()[0]


def test_stress_of_a_broken_router_ends_early_with_a_report(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(Router):
        def invalidate(self, scope: Scope) -> int:
            del scope
            return 0

    monkeypatch.setattr(scenario_module, "Router", Deaf)
    assert run("stress", "--events", "1000000", "--seed", "5", "--simulated", "--json") == 1
    output, messages = capfd.readouterr()
    found = json.loads(output)
    assert found["stale"] > 0
    assert found["events"] < 1_000_000
    assert "STALE: vector " in messages
    assert "History: " in messages
    assert "Seed 5." in messages


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--seconds", "1", "--events", "1"),
        ("demo", "--events", "0"),
        ("demo", "--seconds", "-1"),
        ("stress", "--events-per-change", "0"),
        ("stress", "--loop", "twisted"),
    ],
)
def test_command_called_wrongly_exits_with_2(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: " in capfd.readouterr().err


@pytest.mark.parametrize("name", ["demo", "stress"])
def test_command_help_shows_examples(capfd: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run(name, "--help")
    assert caught.value.code == 0
    output = capfd.readouterr().out
    assert "examples:" in output
    assert all(option in output for option in ("--seed", "--vcpus", "--json", "--simulated", "--loop"))


def test_describe_violation_names_pairs_and_marks_the_acknowledged_entry() -> None:
    pairs = Pairs(2, 4)
    first, second = pairs.cells(1)[0], pairs.cells(1)[3]
    violation = Violation(
        Rule.STALE, 1, 17, first, acknowledged=4, newest=5, first=2, entries=(first, HELD, second, FAULT)
    )
    assert command.describe(violation, pairs, 9) == (
        "STALE: vector 1, event 17: it became vCPU 0 vector 57h.\n"
        "  Entry 4 was acknowledged when it was signalled; the newest is 5.\n"
        "  History: 2: vCPU 0 vector 57h, 3: held, 4*: vCPU 1 vector 58h, 5: fault\n"
        "  Seed 9."
    )


@pytest.mark.parametrize(
    ("destination", "dm", "expected"),
    [(3, 0, "vCPU 3, 45h"), (0x1_0004, 1, "vCPU 18, 45h"), (0x101, 0, "vCPU 257, 45h")],
)
def test_demo_table_shows_where_a_route_leads(destination: int, dm: int, expected: str) -> None:
    message = remapped(destination=destination, dm=dm, rh=0, vector=0x45, delivery_mode=0, tm=0)
    assert demo.destination(message) == expected


def test_demo_table_shows_nothing_for_a_vector_without_a_route() -> None:
    nothing: Message | None = None
    assert demo.destination(nothing) == ""


def test_watchdog_is_rearmed_by_progress_and_put_away(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float] = []
    cancelled = itertools.count()
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda timeout, **_: armed.append(timeout))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: next(cancelled))
    progress = scenario_module.Progress(1.0, 1, 1, 0, 0, 0, [])
    later = scenario_module.Progress(2.0, 2, 1, 0, 0, 0, [])
    with command.watchdog() as still_alive:
        for seen in (progress, progress, later, later):
            still_alive(seen)
    assert len(armed) == 3
    assert next(cancelled) == 1
