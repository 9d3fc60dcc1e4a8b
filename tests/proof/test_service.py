"""The service of a run as a process, and whoever deals it blows."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from irqrouter.proof.chaos import Blow, Chaos, Intent
from irqrouter.proof.service import ServiceFailedError, ServiceProcess

#: Instead of a service: says that it is there, and waits.
SLEEPS = (sys.executable, "-c", "import sys, time; print('here', file=sys.stderr, flush=True); time.sleep(60)")
#: Ends at once, with an error.
ENDS = (sys.executable, "-c", "import sys; sys.exit('had enough')")


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def state(pid: int) -> str:
    """The letter that ``/proc`` has for the process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess(SLEEPS) as made:
        yield made


@pytest.mark.usefixtures("nothing_leaks")
def test_service_process_leaves_nothing() -> None:
    with ServiceProcess(SLEEPS) as service:
        service.start()
        directory, pid = Path(service.path).parent, service.pid
        assert directory.is_dir()
    assert not directory.exists()
    assert not Path(f"/proc/{pid}").exists()
    service.close()
    service.start()  # a late start of whoever restarts it
    assert not service.pid


def test_service_process_killed_is_gone_and_can_be_started_again(service: ServiceProcess) -> None:
    service.start()
    first = service.pid
    service.kill()
    assert not Path(f"/proc/{first}").exists()
    service.check()
    service.start()
    assert service.pid != first
    service.check()


def test_service_process_stopped_stands_still_until_it_goes_on(service: ServiceProcess) -> None:
    service.start()
    service.stop()
    assert state(service.pid) == "T"
    service.go_on()
    eventually(lambda: state(service.pid) != "T")
    service.check()


def test_service_process_that_is_stopped_can_be_closed() -> None:
    with ServiceProcess(SLEEPS) as service:
        service.start()
        service.stop()
        began = time.monotonic()
    assert time.monotonic() - began < 9


@pytest.mark.parametrize("notice", [ServiceProcess.check, ServiceProcess.kill])
def test_service_process_that_ended_by_itself_is_told_with_what_it_said(
    notice: Callable[[ServiceProcess], None],
) -> None:
    with ServiceProcess(ENDS) as service:
        service.start()
        os.waitid(os.P_PID, service.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ServiceFailedError, match=r"(?s)ended by itself with status 1\. It said:.*had enough"):
            notice(service)


def test_service_process_ends_with_the_process_that_started_it() -> None:
    program = (
        "from irqrouter.proof.service import ServiceProcess; import signal, sys, time\n"
        "service = ServiceProcess(); service.start(); print(service.pid, service.path, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, path = parent.stdout.readline().split()
    eventually(Path(path).exists)  # it listens
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not Path(f"/proc/{pid}").exists() or state(int(pid)) == "Z")
    for left in sorted(Path(path).parent.iterdir()):
        left.unlink()
    Path(path).parent.rmdir()


class World:
    """An agent that finds every service, and devices that fire when they are looked at."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self._events = itertools.count(1)
        self.pids: list[int] = []

    def connections(self) -> int:
        if (pid := self._service.pid) and (not self.pids or self.pids[-1] != pid):
            self.pids.append(pid)
        return len(self.pids)

    def events(self) -> int:
        return next(self._events)


def chaos_over(service: ServiceProcess, intent: Intent) -> Chaos:
    world = World(service)
    return Chaos(intent, service, world.connections, world.events)


@pytest.mark.usefixtures("nothing_leaks")
def test_chaos_deals_every_blow_and_leaves_a_service(service: ServiceProcess) -> None:
    with ServiceProcess(SLEEPS) as service:
        service.start()
        first = service.pid
        chaos = chaos_over(service, Intent(kills=3, stops=2, stop_s=0.05, seed=4))
        chaos.start()
        eventually(lambda: chaos.finished or chaos.error)
        assert chaos.error is None
        assert (chaos.kills, chaos.stops, len(chaos.outages_s)) == (3, 2, 3)
        assert service.pid != first
        assert state(service.pid) != "T"
        chaos.close()


def test_chaos_can_be_ended_at_any_time(service: ServiceProcess) -> None:
    service.start()
    chaos = chaos_over(service, Intent(kills=1000, stops=1000, stop_s=60, seed=1))
    chaos.start()
    eventually(lambda: chaos.stops)
    chaos.close()
    assert not chaos.finished
    assert chaos.error is None


def test_chaos_tells_that_the_service_ended_by_itself(service: ServiceProcess) -> None:
    service.start()
    chaos = chaos_over(service, Intent(kills=1, stops=0, stop_s=0, seed=1))
    os.kill(service.pid, signal.SIGTERM)
    os.waitid(os.P_PID, service.pid, os.WEXITED | os.WNOWAIT)
    chaos.start()
    eventually(lambda: chaos.error)
    assert isinstance(chaos.error, ServiceFailedError)
    chaos.close()


def test_chaos_of_one_seed_is_always_the_same() -> None:
    intent = Intent(kills=20, stops=10, stop_s=1, seed=3)
    assert intent.blows() == intent.blows()
    assert sorted(intent.blows(), key=lambda blow: blow.value) == [Blow.KILL] * 20 + [Blow.STOP] * 10
    assert intent.blows() != Intent(kills=20, stops=10, stop_s=1, seed=4).blows()
