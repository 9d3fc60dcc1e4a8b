"""The benchmark runs, both sides do the work they are timed for, and the file has its shape. No time is checked."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from bench.__main__ import main
from bench.floor import Floor, FloorError
from bench.report import Bar, Quartiles, Report, Row, bars
from bench.scale import Scale
from bench.vmm import Fleet, Vmm, VmmError
from bench.vms import VECTORS
from irqrouter.proof.c_agent import load


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    build = tmp_path_factory.mktemp("build")
    assert main(["--quick", "--build", str(build)]) == 0
    return (build / "bench.json").read_bytes()


@pytest.fixture(scope="module")
def report(written: bytes) -> Report:
    return msgspec.json.decode(written, type=Report)


def test_quick_run_writes_every_workload_and_mode(report: Report) -> None:
    assert [(row.workload, row.mode, row.n) for row in report.rows] == [
        ("steady", "embedded", 1),
        ("selective", "embedded", 64),
        ("selective", "embedded-idle", 64),
        ("selective", "service", 64),
        ("selective", "service-idle", 64),
        *([("selective", "service-apart", 64)] if len(os.sched_getaffinity(0)) > 1 else []),
        ("miss", "embedded", 1),
        ("miss", "embedded-asyncio", 1),
        ("miss", "service", 1),
        ("miss", "service-cold", 1),
        ("attach", "embedded", 16),
        ("attach", "service", 16),
        ("scale", "service", 2),
        ("scale", "service-cold", 2),
    ]


def test_quick_run_measures_only_what_applies(report: Report) -> None:
    for row in report.rows:
        columns = [row.ours_us, row.floor_us, row.ratio_floor]
        if row.workload == "selective":
            assert row.peer_us is not None
            assert row.ratio_peer is not None
            columns += [row.peer_us, row.ratio_peer]
        else:
            assert (row.peer_us, row.ratio_peer, row.peer_vectors) == (None, None, None)
        assert all(math.isfinite(value) and value > 0 for value in columns)


def test_quick_run_delivers_on_every_side(report: Report) -> None:
    both = sorted(VECTORS)
    for row in report.rows:
        # `steady` moves nothing. `selective` moves each of a few interrupts once, and the others theirs to and fro: the
        # second vector is there only if the retranslation, or the new table, took effect.
        if row.workload == "steady":
            assert (row.ours_vectors, row.floor_vectors) == ([VECTORS[0]], [VECTORS[0]])
        elif row.workload != "selective":
            assert (row.ours_vectors, row.floor_vectors) == (both, both)
        else:
            assert (row.ours_vectors, row.floor_vectors, row.peer_vectors) == ([VECTORS[1]],) * 3


def test_quick_run_steady_wakes_nobody(report: Report) -> None:
    assert report.rows[0].wakeups == 0


def test_quick_run_serves_the_crowd(report: Report) -> None:
    scale = report.scale
    assert scale is not None
    assert (scale.vms, scale.vectors) == (2, 16)
    assert scale.delivering == scale.others == 1
    assert scale.state_page_bytes > 0
    assert scale.memory_kib > 0


def test_only_one_workload_is_measured(tmp_path: Path) -> None:
    assert main(["--quick", "--only", "steady", "--build", str(tmp_path)]) == 0
    report = msgspec.json.decode((tmp_path / "bench.json").read_bytes(), type=Report)
    assert [row.workload for row in report.rows] == ["steady"]
    assert report.scale is None


@pytest.mark.usefixtures("nothing_leaks")
def test_only_a_workload_with_services_leaves_nothing(tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0)
    assert main(["--quick", "--only", "selective", "--only", "scale", "--build", str(tmp_path)]) == 0
    assert os.sched_getaffinity(0) == affinity


def test_vmm_without_a_service_is_refused(tmp_path: Path) -> None:
    library = str(load().path)
    with pytest.raises(VmmError, match="ended"):
        Vmm(Fleet(path=str(tmp_path / "socket"), library=library, name="fleet", vms=1, vectors=1, wait_s=0.05))


def test_json_without_a_peer_says_null(written: bytes) -> None:
    rows = msgspec.json.decode(written, type=dict[str, msgspec.Raw])["rows"]
    steady = msgspec.json.decode(rows, type=list[dict[str, msgspec.Raw]])[0]
    assert bytes(steady["peer_us"]) == b"null"


def test_bars_each_is_missed_by_a_row_beyond_it() -> None:
    def missed(*rows: Row, scale: Scale | None = None) -> list[str]:
        return [bar.name for bar in bars(rows, scale) if not bar.met]

    assert missed(_row("steady"), _row("selective", n=1024), _row("miss")) == []
    assert missed(_row("steady", ratio=1.2)) == ["steady: a signal costs what it costs without the router"]
    assert missed(_row("steady", wakeups=1)) == ["steady: the loop sleeps"]
    assert missed(_row("selective", n=64, ratio=1.6)) == ["selective, embedded, n=64: at most 1.5 times the floor"]
    assert missed(_row("selective", n=1024, peer=0.3)) == [
        "selective, embedded, n=1024: at least 4 times cheaper than the whole table twice"
    ]
    assert missed(_row("miss", ratio=1.6)) == ["miss, embedded, n=1: at most 1.5 times the floor"]
    assert missed(_row("selective", mode="service", n=64, ratio=1.4)) == [
        "selective, service, n=64: at most 1.3 times the floor"
    ]
    assert missed(_row("selective", mode="service", n=1024, peer=0.3)) == [
        "selective, service, n=1024: at least 4 times cheaper than the whole table twice"
    ]
    assert missed(_row("miss", mode="service", ratio=3.1)) == ["miss, service, n=1: at most 3 times the floor"]
    for mode in ("embedded-asyncio", "service-cold"):
        assert missed(_row("miss", mode=mode, ratio=9)) == []
    for workload in ("attach", "scale"):
        assert missed(_row(workload, mode="service", ratio=90)) == []


def test_bars_vms_at_rest_must_take_no_more_ticks_than_none() -> None:
    def missed(ticks: int) -> list[str]:
        return [bar.name for bar in bars([], _scale(ticks)) if not bar.met]

    assert missed(1) == []
    assert missed(2) == ["scale, 64 VMs: at rest they cost the service no CPU time"]


@pytest.mark.usefixtures("nothing_leaks")
def test_strict_run_fails_when_a_bar_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missed(_rows: Sequence[Row], _scale: Scale | None) -> list[Bar]:
        return [Bar("the moon", False, "cheese")]

    monkeypatch.setattr("bench.report.bars", missed)
    quick = ["--quick", "--only", "steady", "--build", str(tmp_path)]
    assert main(quick) == 0
    assert main([*quick, "--strict"]) == 1
    assert "MISSED  the moon: cheese" in capsys.readouterr().out


def test_floor_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(FloorError, match="no-such-compiler"):
        Floor(tmp_path)


def test_floor_with_a_bad_descriptor_raises_its_errno(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Floor(tmp_path).signal_many(-1, 1)


def _row(
    workload: str,
    *,
    mode: str = "embedded",
    n: int = 1,
    ratio: float = 1.0,
    peer: float | None = None,
    wakeups: int = 0,
) -> Row:
    if workload == "selective" and peer is None:
        peer = 0.2
    one = Quartiles(1, 1, 1)
    return msgspec.convert(
        {
            "workload": workload,
            "mode": mode,
            "n": n,
            "ours_us": 1,
            "floor_us": 1,
            "peer_us": peer,
            "rounds": 1,
            "ours_quartiles_us": msgspec.to_builtins(one),
            "floor_quartiles_us": msgspec.to_builtins(one),
            "peer_quartiles_us": None,
            "ratio_floor": ratio,
            "ratio_floor_quartiles": {"low": ratio, "median": ratio, "high": ratio},
            "ratio_peer": peer,
            "ratio_peer_quartiles": None,
            "ours_vectors": [],
            "floor_vectors": [],
            "peer_vectors": None,
            "wakeups": wakeups,
        },
        Row,
    )


def _scale(idle_ticks: int) -> Scale:
    return Scale(
        vms=64,
        vectors=16384,
        memory_bytes=1,
        state_page_bytes=1,
        memory_before_kib=1,
        memory_kib=1,
        idle_s=1,
        idle_ticks_before=1,
        idle_ticks=idle_ticks,
        idle_switches_before=0,
        idle_switches=0,
        delivering=63,
        others=63,
    )
