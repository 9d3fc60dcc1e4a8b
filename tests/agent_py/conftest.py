"""Each test has a bench on either kernel, and leaves nothing behind."""

import logging
from collections.abc import Generator
from pathlib import Path

import pytest
import structlog

from tests.agent_py.bench import Bench, PlainKernel, RealKernel, bench


@pytest.fixture
def quiet() -> Generator[None]:
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture(params=[RealKernel, PlainKernel], ids=["kvm", "simulated"])
def at(request: pytest.FixtureRequest, nothing_leaks: None, quiet: None, tmp_path: Path) -> Generator[Bench]:
    with bench(request.param, tmp_path) as made:
        yield made
