"""The agent in a world of its own, connected to a service that the test scripts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent_c.fake import Session
from tests.agent_c.world import World


@pytest.fixture
def world(tmp_path: Path, nothing_leaks: None) -> Iterator[World]:
    """The agent, not connected yet."""
    with World(tmp_path) as world:
        yield world


@pytest.fixture
def session(world: World) -> Session:
    """Its connection."""
    return world.attach()
