"""The worlds refuse and fail thousands of times, on purpose."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from irqrouter.kvm import executor
from tests.races.world import Deassign


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_Deassign", Deassign)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)
