"""The targets: each test of the suite runs on all of them, or on both agents."""

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from irqrouter.iommu.fault import Fault
from irqrouter.service.wire import Feature
from irqrouter.x86.msi import Message, Request
from tests.conformance import c_agent, python_agent
from tests.conformance.agents import AgentTarget, Verbs
from tests.conformance.executors import ExecutorTarget
from tests.conformance.service import Service
from tests.conformance.target import Hooks, Target
from tests.kvm.conftest import open_bench

EXECUTORS = ["executor-simulated", "executor-kvm"]
AGENTS: dict[str, Callable[[AgentTarget], Verbs]] = {"agent-python": python_agent.verbs, "agent-c": c_agent.verbs}
#: Those that offer PREPARE.
PREPARING = ["agent-c"]
EVERY_FEATURE = Feature.PREPARE | Feature.WIDE


@contextlib.contextmanager
def open_executor(name: str) -> Generator[Target]:
    """The executor, on the kernel that ``name`` says."""
    with (
        open_bench("simulated" if name == "executor-simulated" else "kvm") as bench,
        contextlib.closing(ExecutorTarget(bench)) as target,
    ):
        yield target


@contextlib.contextmanager
def open_agent(
    name: str,
    features: Feature = EVERY_FEATURE,
    translate: Callable[[Request], Message | Fault] | None = None,
) -> Generator[AgentTarget]:
    """That agent, attached to a service which the test plays."""
    with (
        open_bench("kvm") as bench,
        tempfile.TemporaryDirectory() as directory,  # a socket's path must be short, and tmp_path may not be
        Service(Path(directory, "socket"), features=features) as service,
        contextlib.closing(AgentTarget(bench, Hooks(), service, translate)) as target,
    ):
        target.start(AGENTS[name](target))
        yield target


def require_kvm(name: str) -> None:
    if name != "executor-simulated" and not Path("/dev/kvm").exists():
        pytest.skip("there is no /dev/kvm")


@pytest.fixture(params=[*EXECUTORS, *AGENTS])
def target(request: pytest.FixtureRequest, nothing_leaks: None) -> Iterator[Target]:
    """Every implementation."""
    name: str = request.param
    require_kvm(name)
    with open_executor(name) if name in EXECUTORS else open_agent(name) as opened:
        yield opened


@pytest.fixture
def agent_features(request: pytest.FixtureRequest) -> Feature:
    """What the service agrees to; a test may say otherwise, indirectly."""
    features: Feature = getattr(request, "param", EVERY_FEATURE)
    return features


@pytest.fixture(params=list(AGENTS))
def agent(request: pytest.FixtureRequest, nothing_leaks: None, agent_features: Feature) -> Iterator[AgentTarget]:
    """Both agents."""
    name: str = request.param
    require_kvm(name)
    with open_agent(name, agent_features) as opened:
        yield opened
