"""Many VMs on one service: what it takes of memory and of the CPU, and whether a VM notices the others."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from bench.floor import Floor
from bench.vmm import Fleet, Vmm
from bench.vms import ColdServedVm, ServedVm
from bench.workloads import Mode, Times, caught_ns, in_turns
from irqrouter.proof.c_agent import load
from irqrouter.proof.service import ServiceProcess

#: VMs of one VMM process: with 256 vectors each that takes some 8400 descriptors.
VMS_PER_PROCESS: Final = 16
#: The service is at rest when it has not run for this long.
_REST_S: Final = 0.2
_REST_MAX_S: Final = 20.0


class Usage(msgspec.Struct, frozen=True):
    """What a process has, and has used."""

    #: Its own memory, and what it has mapped of files: the interpreter and its libraries.
    memory_kib: int
    #: Mapped shared memory: the state pages, of which only those count that were touched.
    state_pages_kib: int
    #: User and system time, in ticks of ``SC_CLK_TCK``.
    ticks: int
    #: How often one of its threads went to sleep, or was preempted.
    switches: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        """Since it began; as the kernel says."""
        status = _fields(Path(f"/proc/{pid}/status"))
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        threads = [_fields(file) for file in Path(f"/proc/{pid}/task").glob("*/status")]
        return cls(
            memory_kib=status["RssAnon"] + status["RssFile"],
            state_pages_kib=status["RssShmem"],
            ticks=int(stat[11]) + int(stat[12]),
            switches=sum(each["voluntary_ctxt_switches"] + each["nonvoluntary_ctxt_switches"] for each in threads),
        )

    @classmethod
    def at_rest(cls, pid: int, idle_s: float) -> "Usage":
        """Once it rests: what it has, and has used within ``idle_s``."""
        deadline = time.monotonic() + _REST_MAX_S
        before, now = cls.of(pid), None
        while now is None or (now.switches != before.switches and time.monotonic() < deadline):
            before = now or before
            time.sleep(_REST_S)
            now = cls.of(pid)
        time.sleep(idle_s)
        after = cls.of(pid)
        return cls(after.memory_kib, after.state_pages_kib, after.ticks - now.ticks, after.switches - now.switches)


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """What one service takes for many VMs, against the same service before the first."""

    vms: int
    vectors: int
    #: Growth per vector, in bytes: the service's own memory, and the state pages.
    memory_bytes: float
    state_page_bytes: float
    memory_before_kib: int
    memory_kib: int
    #: Over ``idle_s`` in which nothing happens: ticks of CPU time, and context switches.
    idle_s: float
    idle_ticks_before: int
    idle_ticks: int
    idle_switches_before: int
    idle_switches: int
    #: In how many VMs of the other processes interrupts arrived in the end.
    delivering: int
    others: int


class Crowd(msgspec.Struct, frozen=True):
    """How many VMs with how many vectors each, how long to look at them at rest, and how many events to catch."""

    vms: int
    vectors: int
    idle_s: float
    rounds: int


def scale(floor: Floor, crowd: Crowd) -> tuple[Scale, list[Times]]:
    """Attach the crowd to one service, and a single VM to another.

    The times are of an event caught: ours by the service with the crowd, the floor by the one with a single VM.
    """
    with contextlib.ExitStack() as opened:
        crowded = opened.enter_context(ServiceProcess())
        quiet = opened.enter_context(ServiceProcess())
        for service in (crowded, quiet):
            service.start()
        # Whatever the service imports or makes when it first serves a VM is not the vectors'.
        with ServedVm(1, crowded.path), ServedVm(1, quiet.path):
            pass
        before = Usage.at_rest(crowded.pid, crowd.idle_s)
        vmms = [opened.enter_context(Vmm(fleet)) for fleet in _fleets(crowded.path, crowd)]
        with ServedVm(crowd.vectors, crowded.path):
            after = Usage.at_rest(crowded.pid, crowd.idle_s)
        times = [
            _catch(floor, ServedVm, "service", crowd, crowded.path, quiet.path),
            _catch(floor, ColdServedVm, "service-cold", crowd, crowded.path, quiet.path),
        ]
        delivering = sum(vmm.signal() for vmm in vmms)
        crowded.check()
    vectors = crowd.vms * crowd.vectors
    found = Scale(
        vms=crowd.vms,
        vectors=vectors,
        memory_bytes=(after.memory_kib - before.memory_kib) * 1024 / vectors,
        state_page_bytes=(after.state_pages_kib - before.state_pages_kib) * 1024 / vectors,
        memory_before_kib=before.memory_kib,
        memory_kib=after.memory_kib,
        idle_s=crowd.idle_s,
        idle_ticks_before=before.ticks,
        idle_ticks=after.ticks,
        idle_switches_before=before.switches,
        idle_switches=after.switches,
        delivering=delivering,
        others=crowd.vms - 1,
    )
    return found, times


def _fleets(path: str, crowd: Crowd) -> Iterator[Fleet]:
    """All VMs but the one in this process."""
    for first in range(0, crowd.vms - 1, VMS_PER_PROCESS):
        vms = min(VMS_PER_PROCESS, crowd.vms - 1 - first)
        library = str(load().path)
        yield Fleet(path=path, library=library, name=f"crowd-{first}", vms=vms, vectors=crowd.vectors)


def _catch(
    floor: Floor, vm_type: type[ServedVm], mode: Mode, crowd: Crowd, crowded_path: str, quiet_path: str
) -> Times:
    ours: list[float] = []
    alone: list[float] = []
    with vm_type(crowd.vectors, crowded_path) as one_of_many, vm_type(crowd.vectors, quiet_path) as only:
        turns = [
            lambda: ours.append(caught_ns(floor, one_of_many)),
            lambda: alone.append(caught_ns(floor, only)),
        ]
        for turn in in_turns(turns, crowd.rounds):
            turn()
        return Times(
            workload="scale",
            mode=mode,
            n=crowd.vms,
            ours=ours,
            floor=alone,
            ours_vectors=sorted(one_of_many.irr()),
            floor_vectors=sorted(only.irr()),
        )


def _fields(file: Path) -> dict[str, int]:
    """The lines ``name: number`` of a ``status`` file."""
    found: dict[str, int] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdecimal():
            found[name] = int(number[0])
    return found
