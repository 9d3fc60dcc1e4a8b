"""irqrouter top against an admin plane."""

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from irqrouter import cli
from irqrouter.cli import top
from irqrouter.cli.top import Look, Row
from irqrouter.service.status import VectorReport
from tests.service.fakes import Plane, vector, vm
from tests.service.running import IRQROUTER, PATIENCE_S


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path / "admin").running() as plane:
        plane.core.attach(vm("guest-1"), *(vector(number, "guest-1") for number in range(4)))
        yield plane


def test_top_once_of_all_vms(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--once", "--interval", "0.05", "--admin-socket", str(plane.path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["1", "VMs,", "3", "vectors"]
    assert ["guest-1", "4711"] in [line[:2] for line in lines]


def test_top_once_of_a_vm_the_busiest_first(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    listed = plane.core.vectors
    looks = 0

    def busy(name: str) -> list[VectorReport]:
        nonlocal looks
        looks += 1
        return [vector(each.vector, name, caught=each.caught + looks * each.vector) for each in listed(name)]

    plane.core.vectors = busy  # type: ignore[method-assign]
    assert cli.main(["top", "guest-1", "--once", "--interval", "0.05", "--admin-socket", str(plane.path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line[0] for line in lines[-4:]] == ["3", "2", "1", "0"]
    assert lines[-1][-4:] == [".", ".", ".", "."]


def test_top_of_a_vm_that_is_not_there(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "x", "--once", "--admin-socket", str(plane.path)]) == 2
    assert capsys.readouterr().err == "irqrouter top: VM x: is not attached; see irqrouter status\n"


def test_top_rates_of_counters_that_began_anew_are_not_negative() -> None:
    def look(time_s: float, *counters: int) -> Look:
        rows = [Row(str(at), [str(at)], [counter]) for at, counter in enumerate(counters)]
        return Look(time_s, "title", ["name"], ["count/s"], rows)

    assert top._rates([5, 10, 7], [15, 3, 7], 2.0) == [5.0, 0, 0.0]
    table = top._table(look(1.0, 5, 10), look(3.0, 15, 3, 99), 2)
    assert table.row_count == 2
    assert str(table.title) == "title, the busiest 2"


def test_top_live_on_a_terminal_until_interrupted(plane: Plane) -> None:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [IRQROUTER, "top", "--interval", "0.05", "--admin-socket", str(plane.path)],
            stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(theirs)
        seen = b""
        while seen.count(b"guest-1") < 3:  # it is drawn again and again
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        with process.stderr as errors:
            draining = True
            while draining:  # the terminal must be read, or nothing more can be written to it
                try:
                    draining = bool(os.read(ours, 65536))
                except OSError:  # EIO: its other side is closed
                    draining = False
            assert process.wait(PATIENCE_S) == 130
            assert errors.read() == b""
    finally:
        os.close(ours)


@pytest.mark.parametrize("interval", ["0", "0.01", "1e9", "often"])
def test_top_called_wrongly(interval: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["top", "--interval", interval])
    assert ended.value.code == 2
