"""irqrouter trace against an admin plane, and the file that Perfetto opens."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from irqrouter import cli
from irqrouter.cli.trace import PerfettoTrace
from irqrouter.service.status import Happening, What
from tests.service.fakes import Plane, vector, vm
from tests.service.running import IRQROUTER, PATIENCE_S


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path / "admin").running() as plane:
        plane.core.attach(vm("guest"), vector(0), vector(1, state="deassigned", prepared=True), vector(2))
        yield plane


def trace(plane: Plane, *arguments: str) -> int:
    return cli.main(["trace", *arguments, "--admin-socket", str(plane.path)])


def tell_all(plane: Plane) -> None:
    """What happens in these tests."""
    tell = plane.core.happenings.tell
    tell("guest", What.RENEWED, 0, 8)
    tell("guest", What.CAUGHT, 0, 8)
    tell("other", What.CAUGHT, 0, 8)
    tell("guest", What.ASSIGNED, 0, 8)
    tell("guest", What.FAULTED, 1, 9, "22h")
    tell("guest", What.DETACHED)


def test_trace_prints_a_line_for_what_happens(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    plane.when_followed(lambda: tell_all(plane))
    assert trace(plane, "guest", "--seconds", "1.5") == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert lines[0] == ["0.000000", "vector", "0", "renewed", "generation", "8"]
    assert [line[1:] for line in lines[1:]] == [
        ["vector", "0", "caught", "generation", "8"],
        ["vector", "0", "assigned", "generation", "8"],
        ["vector", "1", "faulted", "generation", "9", "22h"],
        ["detached"],
    ]
    assert not printed.err


def test_trace_one_vector_as_json(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    plane.when_followed(lambda: tell_all(plane))
    assert trace(plane, "guest", "1", "--json", "--seconds", "1.5") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["what"], each["vector"], each["detail"]) for each in told] == [
        ("faulted", 1, "22h"),
        ("detached", None, ""),
    ]


def test_trace_says_how_much_was_lost(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    def flood() -> None:
        for number in range(10_000):
            plane.core.happenings.tell("guest", What.CAUGHT, 0, number)

    plane.when_followed(flood)
    assert trace(plane, "guest", "--seconds", "3") == 0
    printed = capsys.readouterr()
    assert "irqrouter trace: 5904 happenings were lost" in printed.err
    assert len(printed.out.splitlines()) == 4096


def test_trace_the_service_ends(plane: Plane, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def end() -> None:
        tell_all(plane)
        plane._loop.call_later(0.2, plane._stop)

    plane.when_followed(end)
    assert trace(plane, "guest", "--perfetto", str(tmp_path / "trace.json")) == 2
    assert "the service closed the connection" in capsys.readouterr().err
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]  # what was seen is not lost


def test_trace_until_interrupted(plane: Plane, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    arguments = ["trace", "guest", "--perfetto", str(file), "--admin-socket", str(plane.path)]
    with subprocess.Popen([IRQROUTER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        plane.when_followed(lambda: tell_all(plane))
        assert run.stdout is not None
        assert "renewed" in run.stdout.readline()
        while "detached" not in run.stdout.readline():
            pass
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=PATIENCE_S)
        assert run.returncode == 0
    assert errors == f"{file}: 5 happenings; open it at https://ui.perfetto.dev\n"
    assert json.loads(file.read_text())["traceEvents"]


def test_trace_perfetto_that_cannot_be_written(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace(plane, "guest", "--seconds", "0.1", "--perfetto", "/proc/none/trace.json") == 2
    assert "/proc/none/trace.json: write failed: ENOENT" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["guest", "--seconds", "0"], ["guest", "five"]])
def test_trace_called_wrongly(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["trace", *arguments])
    assert ended.value.code == 2


# --- Perfetto ----------------------------------------------------------------------------------------------------


def happened(
    time_us: int, what: What, number: int | None = None, generation: int | None = 1, detail: str = ""
) -> Happening:
    return Happening(time_ns=time_us * 1000, vm="guest", what=what, vector=number, generation=generation, detail=detail)


def events(trace: PerfettoTrace, end_us: int, phase: str) -> list[dict[str, Any]]:
    written = json.loads(trace.encoded(end_us * 1000))
    assert written["displayTimeUnit"] == "ns"
    return [event for event in written["traceEvents"] if event["ph"] == phase]


def test_perfetto_states_are_slices_that_follow_each_other() -> None:
    trace = PerfettoTrace("guest")
    trace.begin(100_000, [vector(0), vector(3, state="masked")])
    trace.add(happened(110, What.RENEWED, 0))
    trace.add(happened(115, What.RENEWED, 0))  # still deassigned: the same slice
    trace.add(happened(120, What.PREPARED, 0))
    trace.add(happened(125, What.CAUGHT, 0))
    trace.add(happened(130, What.ASSIGNED, 0))
    trace.add(happened(135, What.RENEWED, 3, detail="masked"))
    slices = [(each["tid"], each["ts"], each["dur"], each["name"]) for each in events(trace, 200, "X")]
    assert sorted(slices) == [
        (1, 100, 10, "assigned"),
        (1, 110, 10, "deassigned"),
        (1, 120, 10, "prepared"),
        (1, 130, 70, "assigned"),
        (4, 100, 100, "masked"),
    ]


def test_perfetto_happenings_are_instants_on_their_tracks() -> None:
    trace = PerfettoTrace("guest")
    trace.add(happened(1, What.ATTACHED, None, None))
    trace.add(happened(2, What.FAULTED, 5, 7, "22h"))
    attached, faulted = events(trace, 10, "i")
    assert (attached["name"], attached["s"], attached["tid"], attached["ts"]) == ("attached", "p", 0, 1)
    assert (faulted["name"], faulted["s"], faulted["tid"], faulted["ts"]) == ("faulted", "t", 6, 2)
    assert faulted["args"] == {"generation": 7, "detail": "22h"}
    assert trace.instants == 2


def test_perfetto_tracks_have_names_also_those_without_a_slice() -> None:
    trace = PerfettoTrace("guest")
    trace.add(happened(2, What.FAULTED, 5))
    trace.add(happened(3, What.ADDED, 11))
    named = {
        (each["name"], each["tid"]): each["args"].get("name", each["args"].get("sort_index"))
        for each in events(trace, 10, "M")
    }
    assert named == {
        ("process_name", 0): "VM guest",
        ("thread_name", 0): "VM",
        ("thread_name", 6): "vector 5",
        ("thread_sort_index", 6): 6,
        ("thread_name", 12): "vector 11",
        ("thread_sort_index", 12): 12,
    }


@pytest.mark.parametrize("end", [What.REMOVED, What.DETACHED])
def test_perfetto_slices_end_with_the_vector_or_its_vm(end: What) -> None:
    trace = PerfettoTrace("guest")
    trace.add(happened(1, What.ASSIGNED, 0))
    trace.add(happened(5, end, 0 if end is What.REMOVED else None))
    assert [(each["ts"], each["dur"]) for each in events(trace, 100, "X")] == [(1, 4)]


def test_perfetto_every_event_has_what_the_format_demands() -> None:
    trace = PerfettoTrace("guest")
    trace.begin(0, [vector(0)])
    for at, what in enumerate(What):
        trace.add(happened(at + 1, what, at % 3))
    written = json.loads(trace.encoded(1_000_000))
    for event in written["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "ts"} <= set(event)
        assert {"X": "dur", "i": "s", "M": "args"}[event["ph"]] in event
        assert event.get("dur", 0) >= 0
