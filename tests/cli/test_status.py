"""irqrouter status against an admin plane."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from irqrouter import cli
from irqrouter.cli.status import duration
from tests.service.fakes import Plane, vector, vm


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path / "admin").running() as plane:
        plane.core.attach(
            vm("guest-1"),
            vector(0, "guest-1"),
            vector(5, "guest-1", state="deassigned", prepared=True, route=None, last_catch_us=None, refused=16),
        )
        plane.core.attach(vm("guest-2", vectors=0, features=[]))
        yield plane


def status(plane: Plane, *arguments: str) -> int:
    return cli.main(["status", *arguments, "--admin-socket", str(plane.path)])


def test_status_of_the_service(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(plane) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "irqrouter 1, process 1, up 2 s, on fake"
    assert lines[1] == "configuration built in, log level info"
    head, first, second = lines[4:]
    assert head.split()[:4] == ["VM", "PID", "ATTACHED", "REMAPPER"]
    assert first.split() == ["guest-1", "4711", "1", "h", "2", "min", "VTD", "3", "1", "1", "0", "1", "5", "1", "2"]
    assert second.startswith("guest-2 ")
    assert len(head) == len(first) == len(second)


def test_status_without_a_vm(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    plane.core.statuses.clear()
    assert status(plane) == 0
    assert capsys.readouterr().out.endswith("\nno VM is attached\n")


def test_status_of_a_vm(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(plane, "guest-1") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("VM guest-1, process 4711 of user 64055, attached 1 h 2 min ago\n")
    rows = [line.split() for line in printed.splitlines()[-2:]]
    assert rows[0][:6] == ["0", "00:03.0", "24", "assigned", "FEE000B8/00000000", "FEE03000/00000041"]
    assert rows[0][6:] == ["6", "4", "1", "36", "us", "-"]
    assert rows[1][:6] == ["5", "00:03.0", "29", "prepared", "FEE000B8/00000000", "-"]
    assert rows[1][-1] == "busy"


def test_status_of_a_vm_without_vectors(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(plane, "guest-2") == 0
    printed = capsys.readouterr().out
    assert "features none" in printed
    assert printed.endswith("\nno vectors\n")


def test_status_of_a_vector(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(plane, "guest-1", "5") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("VM guest-1, vector 5\n  state")
    for words in ("prepared", "not translated yet", "cookie 0x5", "none yet", "KVM refused this route: Device or"):
        assert words in printed


def test_status_json_is_what_the_service_said(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(plane, "--json") == 0
    overview = json.loads(capsys.readouterr().out)
    assert overview["vms"][0] == msgspec.to_builtins(vm("guest-1"))
    assert overview["service"]["loop"] == "fake"
    assert status(plane, "guest-1", "--json") == 0
    details = json.loads(capsys.readouterr().out)
    assert details["vectors"] == msgspec.to_builtins(plane.core.reports["guest-1"])
    assert status(plane, "guest-1", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out) == msgspec.to_builtins(vector(0, "guest-1"))


@pytest.mark.parametrize("command", [["status"], ["status", "x", "1"], ["top", "--once"], ["trace", "x"]])
def test_status_and_its_like_where_nobody_listens(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none"
    assert cli.main([*command, "--admin-socket", str(path)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(f"irqrouter {command[0]}: {path}: there is no socket: start irqrouter.socket")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x"], "VM x: is not attached; see irqrouter status"),
        (["x", "0"], "VM x: is not attached; see irqrouter status"),
        (["guest-1", "7"], "VM guest-1: has no vector 7; see irqrouter status guest-1"),
    ],
)
def test_status_of_what_is_not_there(
    plane: Plane, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(plane, *arguments) == 2
    assert capsys.readouterr().err == f"irqrouter status: {says}\n"


def test_status_called_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("five", "-1"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["status", "guest", wrong])
        assert ended.value.code == 2
    assert "vector_number value: 'five'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.9, "0 s"), (65, "1 min 5 s"), (3723, "1 h 2 min"), (273600, "3 d 4 h")]
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
