"""The fuzzer, for a few seconds; ``make fuzz`` runs it for minutes."""

import asyncio
import json
import os
import random

import pytest

from irqrouter.service.wire import HEADER_SIZE, Command, Frame, encode
from tests.service import fuzz as fuzz_module
from tests.service.client import descriptors
from tests.service.fuzz import FuzzError, fuzz, main, mutated, running, seed_of


@pytest.mark.parametrize("stdlib", [False, True], ids=["uvloop", "asyncio"])
def test_service_withstands_chance(stdlib: bool) -> None:
    before = descriptors()
    result = asyncio.run(fuzz(15_000, 7, stdlib=stdlib))
    assert result.frames >= 15_000
    assert result.honest >= 15_000 // 400
    assert result.descriptors_after == result.descriptors_before
    # It went deep: commands were answered, batches sent, and most rules broken.
    assert result.answered > 1000
    assert result.batches > 100
    assert {"FRAME", "ORDER", "COMMAND", "DESCRIPTOR", "VECTOR", "PAYLOAD"} <= set(result.refused)
    assert descriptors() == before


def test_frames_are_the_seeds() -> None:
    raw = encode(Frame(1, Command.PING, bytes(64)))

    def made(seed: int) -> list[bytes]:
        return [mutated(raw, random.Random(seed_of(seed, turn))) for turn in range(200)]

    assert made(1) == made(1) != made(2)
    lengths = {len(packet) for packet in made(1)}
    assert min(lengths) < HEADER_SIZE < len(raw) < max(lengths)


def test_service_that_dies_is_a_failure_with_seed_and_frames() -> None:
    killed = 0

    def kill(_: object) -> None:
        nonlocal killed
        (child,) = _children()
        os.kill(child, 9)
        killed += 1

    with pytest.raises(FuzzError, match=r"seed 3, frame(.|\n)*turn "):
        asyncio.run(fuzz(50_000, 3, progress=kill))
    assert killed


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123 - a kernel file
        return [int(pid) for pid in file.read().split()]


def test_service_that_complains_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running(stdlib=False) as (process, _):
            monkeypatch.setattr(process, "said", lambda: "a session failed")
            with pytest.raises(FuzzError, match="a session failed"):
                process.check()
            monkeypatch.undo()

    asyncio.run(run())


def test_command_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--frames", "500", "--seed", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 2
    assert main(["--frames", "500"]) == 0
    assert "frames with seed 1 in" in capsys.readouterr().out

    async def fail(*_: object, **__: object) -> None:
        raise FuzzError("seed 9")

    monkeypatch.setattr(fuzz_module, "fuzz", fail)
    assert main([]) == 1
    assert "seed 9" in capsys.readouterr().err
