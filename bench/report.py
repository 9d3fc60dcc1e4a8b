"""What the benchmark says: medians, quartiles, ratios pair by pair, and the bars they are held against."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from bench.scale import Scale
from bench.workloads import Mode, Times, Workload


class Quartiles(msgspec.Struct, frozen=True):
    """The 25th percentile, the median and the 75th."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """The quartiles of two values or more."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def describe(self, decimals: int) -> str:
        """``1.23 (1.20-1.31)``."""
        return f"{self.median:.{decimals}f} ({self.low:.{decimals}f}-{self.high:.{decimals}f})"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table. Times are medians in microseconds; None where a column does not apply.

    A ratio is the median of ours to the other one's, pair by pair: below 1 ours is the cheaper.
    """

    workload: Workload
    mode: Mode
    n: int
    ours_us: float
    floor_us: float
    peer_us: float | None
    rounds: int
    ours_quartiles_us: Quartiles
    floor_quartiles_us: Quartiles
    peer_quartiles_us: Quartiles | None
    ratio_floor: float
    ratio_floor_quartiles: Quartiles
    ratio_peer: float | None
    ratio_peer_quartiles: Quartiles | None
    ours_vectors: list[int]
    floor_vectors: list[int]
    peer_vectors: list[int] | None
    wakeups: int | None

    @classmethod
    def of(cls, times: Times) -> "Row":
        """Sum up one workload."""
        ours, floor = _us(times.ours), _us(times.floor)
        peer = None if times.peer is None else _us(times.peer)
        ratio_floor = _ratio(times.ours, times.floor)
        ratio_peer = None if times.peer is None else _ratio(times.ours, times.peer)
        return cls(
            workload=times.workload,
            mode=times.mode,
            n=times.n,
            ours_us=ours.median,
            floor_us=floor.median,
            peer_us=peer.median if peer else None,
            rounds=len(times.ours),
            ours_quartiles_us=ours,
            floor_quartiles_us=floor,
            peer_quartiles_us=peer,
            ratio_floor=ratio_floor.median,
            ratio_floor_quartiles=ratio_floor,
            ratio_peer=ratio_peer.median if ratio_peer else None,
            ratio_peer_quartiles=ratio_peer,
            ours_vectors=times.ours_vectors,
            floor_vectors=times.floor_vectors,
            peer_vectors=times.peer_vectors,
            wakeups=times.wakeups,
        )


class Bar(msgspec.Struct, frozen=True):
    """Something the figures are to show."""

    name: str
    met: bool
    found: str


class Report(msgspec.Struct, frozen=True):
    """``build/bench.json``."""

    kernel: str
    cpus: int
    python: str
    #: What the guests' vCPUs are: their state decides what an injection costs.
    vcpus: str
    gap_us: float
    rows: list[Row]
    #: None where that was not measured.
    scale: Scale | None
    bars: list[Bar]


def report(rows: list[Row], scale: Scale | None, *, gap_s: float) -> Report:
    """Everything that goes into the file."""
    return Report(
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        python=platform.python_version(),
        vcpus="1 per VM, created, local APIC enabled, not running",
        gap_us=gap_s * 1e6,
        rows=rows,
        scale=scale,
        bars=bars(rows, scale),
    )


#: ``steady``: how far from 1 the ratio may be and still be this machine's noise, if its quartiles do not enclose 1.
STEADY_NOISE: Final = 0.03
#: Ours to the floor, at most.
FLOOR_MAX: Final[Mapping[tuple[Workload, Mode], float]] = {
    ("selective", "embedded"): 1.5,
    ("selective", "service"): 1.3,
    ("selective", "service-apart"): 1.3,
    ("miss", "embedded"): 1.5,
    ("miss", "service"): 3.0,
}
#: ``selective`` at this many routes, embedded or with a service: the peer to ours.
PEER_N, PEER_MIN = 1024, 4.0
_PEER_MODES: Final = frozenset({"embedded", "service"})


def bars(rows: Sequence[Row], scale: Scale | None) -> list[Bar]:
    """Hold the figures against the bars. Rows for which there is none are for comparison."""
    judged: list[Bar] = []
    for row in rows:
        ratio = row.ratio_floor_quartiles
        found = f"{ratio.describe(2)} times the floor"
        name = f"{row.workload}, {row.mode}, n={row.n}"
        if row.workload == "steady":
            quiet = ratio.low <= 1 <= ratio.high or abs(ratio.median - 1) <= STEADY_NOISE
            judged.append(Bar("steady: a signal costs what it costs without the router", quiet, found))
            judged.append(Bar("steady: the loop sleeps", row.wakeups == 0, f"{row.wakeups} wakeups"))
        if at_most := FLOOR_MAX.get((row.workload, row.mode)):
            judged.append(Bar(f"{name}: at most {at_most:g} times the floor", ratio.median <= at_most, found))
        if row.workload == "selective" and row.mode in _PEER_MODES and row.n == PEER_N and row.ratio_peer is not None:
            cheaper = 1 / row.ratio_peer
            rule = f"at least {PEER_MIN:g} times cheaper than the whole table twice"
            judged.append(Bar(f"{name}: {rule}", cheaper >= PEER_MIN, f"{cheaper:.1f} times"))
    if scale is not None:
        found = f"{scale.idle_ticks} ticks in {scale.idle_s:g} s, {scale.idle_ticks_before} without a VM"
        idle = scale.idle_ticks <= scale.idle_ticks_before
        judged.append(Bar(f"scale, {scale.vms} VMs: at rest they cost the service no CPU time", idle, found))
    return judged


_COLUMNS: Final[tuple[tuple[str, int, Callable[[Row], str]], ...]] = (
    ("workload", 10, lambda row: row.workload),
    ("mode", 17, lambda row: row.mode),
    ("n", 5, lambda row: str(row.n)),
    ("ours, us", 21, lambda row: row.ours_quartiles_us.describe(2)),
    ("floor, us", 21, lambda row: row.floor_quartiles_us.describe(2)),
    ("peer, us", 24, lambda row: row.peer_quartiles_us.describe(1) if row.peer_quartiles_us else "-"),
    ("ours/floor", 17, lambda row: row.ratio_floor_quartiles.describe(2)),
    ("ours/peer", 17, lambda row: row.ratio_peer_quartiles.describe(2) if row.ratio_peer_quartiles else "-"),
)


def table(whole: Report) -> str:
    """The report for people."""
    lines = [
        f"Linux {whole.kernel}, {whole.cpus} CPUs, Python {whole.python}; vCPUs: {whole.vcpus}",
        f"medians (quartiles); idle for {whole.gap_us:g} us before each measurement",
        "",
        "  ".join(f"{title:<{width}}" for title, width, _ in _COLUMNS).rstrip(),
    ]
    lines += ["  ".join(f"{cell(row):<{width}}" for _, width, cell in _COLUMNS).rstrip() for row in whole.rows]
    if whole.scale is not None:
        lines += ["", _describe(whole.scale)]
    lines.append("")
    lines += [f"{'met   ' if bar.met else 'MISSED'}  {bar.name}: {bar.found}" for bar in whole.bars]
    return "\n".join(lines)


def _describe(scale: Scale) -> str:
    return f"""\
scale: {scale.vms} VMs with {scale.vectors} vectors in all on one service
  memory per vector: {scale.memory_bytes:.0f} bytes, and {scale.state_page_bytes:.0f} of the state pages\
 (in all {scale.memory_kib} KiB; {scale.memory_before_kib} KiB without a VM)
  at rest for {scale.idle_s:g} s: {scale.idle_ticks} ticks of CPU time, {scale.idle_switches} context switches\
 ({scale.idle_ticks_before} and {scale.idle_switches_before} without a VM)
  interrupts arrived in {scale.delivering} of the {scale.others} VMs in other processes"""


def _us(times_ns: Sequence[float]) -> Quartiles:
    return Quartiles.of([ns / 1000 for ns in times_ns])


def _ratio(ours: Sequence[float], others: Sequence[float]) -> Quartiles:
    return Quartiles.of([a / b for a, b in zip(ours, others, strict=True)])
