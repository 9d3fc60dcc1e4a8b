"""Metrics: what is counted, and who may ask for it how."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from irqrouter.errors import CallerError
from irqrouter.service import metrics
from irqrouter.service.metrics import ServiceMetrics, Totals
from irqrouter.service.status import VectorReport
from tests.service.fakes import FakeCore, listening_at, vector, vm

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_leaks")]


def samples(text: bytes) -> dict[str, float]:
    """Every sample, by name and labels as Prometheus writes them."""
    return {
        f"{sample.name}{{{','.join(f'{key}={value}' for key, value in sorted(sample.labels.items()))}}}": sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


# --- what is counted ---------------------------------------------------------------------------------------------


async def test_metrics_without_a_vm() -> None:
    assert samples(await ServiceMetrics(FakeCore(), per_vector=False).text()) == {"irqrouter_vms{}": 0}


async def test_metrics_of_vms_and_of_their_vectors_together() -> None:
    core = FakeCore()
    core.attach(vm("a"), vector(0, "a", caught=4), vector(1, "a", caught=6, state="masked"))
    core.attach(vm("b", operations=77))
    found = samples(await ServiceMetrics(core, per_vector=False).text())
    assert found["irqrouter_vms{}"] == 2
    assert found["irqrouter_vm_vectors{state=assigned,vm=a}"] == 1
    assert found["irqrouter_vm_prepared_vectors{vm=a}"] == 1
    assert found["irqrouter_vm_descriptors{vm=a}"] == 9
    assert found["irqrouter_vm_operations_total{vm=b}"] == 77
    assert found["irqrouter_vm_vector_caught_total{vm=a}"] == 10
    assert found["irqrouter_vm_vector_caught_total{vm=b}"] == 0
    assert not any("vector=" in name for name in found)


async def test_metrics_of_each_vector_on_request() -> None:
    core = FakeCore()
    core.attach(vm("a"), vector(0, "a", caught=4), vector(7, "a", caught=6))
    found = samples(await ServiceMetrics(core, per_vector=True).text())
    assert found["irqrouter_vector_caught_total{vector=7,vm=a}"] == 6
    assert found["irqrouter_vector_invalidations_total{vector=0,vm=a}"] == 6


async def test_metrics_a_vm_that_went_is_gone_and_one_that_goes_meanwhile_is_no_failure() -> None:
    core = FakeCore()
    core.attach(vm("a"), vector(0, "a"))
    core.attach(vm("b"), vector(0, "b"))
    shown = ServiceMetrics(core, per_vector=False)
    listed = core.vectors

    def going(name: str) -> list[VectorReport]:
        if name == "b":
            raise CallerError("VM 'b'", "is not attached")
        return listed(name)

    core.vectors = going  # type: ignore[method-assign]
    assert "irqrouter_vm_vector_caught_total{vm=b}" not in samples(await shown.text())
    del core.statuses["a"], core.statuses["b"]
    assert samples(await shown.text()) == {"irqrouter_vms{}": 0}


@pytest.mark.parametrize(
    ("counts", "total"),
    [
        ([5], 5),
        ([5, 5, 9], 9),
        ([0xFFFF_FFFE, 3], 0xFFFF_FFFE + 5),  # it passed 2^32
        ([1000, 3], 1003),  # another vector in the slot
        ([1000, None, 3], 1003),  # the vector went, and another came
    ],
)
async def test_metrics_totals_never_fall(counts: list[int | None], total: int) -> None:
    totals = Totals()
    for count in counts:
        totals.add([] if count is None else [vector(0, caught=count)])
    assert totals.totals["caught"] == total


# --- who may ask how ---------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def path(tmp_path: Path) -> AsyncIterator[str]:
    core = FakeCore()
    core.attach(vm("a"), vector(0, "a"))
    with listening_at(tmp_path / "metrics") as listener:
        serving = asyncio.ensure_future(metrics.serve(listener, ServiceMetrics(core, per_vector=False)))
        yield str(tmp_path / "metrics")
        serving.cancel()
        await asyncio.wait({serving})
        assert serving.cancelled()


async def answer(path: str, *parts: bytes, end: bool = False) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if end:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_metrics_get(path: str) -> None:
    head, _, body = (await answer(path, b"GET /metrics HT", b"TP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=")
    assert f"Content-Length: {len(body)}".encode() in head
    assert samples(body)["irqrouter_vms{}"] == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request"),
        (b"\x16\x03\x01 hello\r\n\r\n", b"400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 2000 + b"\r\n", b"431 Request Header Fields Too Large"),
    ],
)
async def test_metrics_nothing_but_that(path: str, request_: bytes, status: bytes) -> None:
    assert (await answer(path, request_)).startswith(b"HTTP/1.1 " + status + b"\r\n")


async def test_metrics_half_a_request_is_none(path: str) -> None:
    assert (await answer(path, b"GET /metrics HTTP/1.1\r\n", end=True)).startswith(b"HTTP/1.1 400")


async def test_metrics_who_says_nothing_is_hung_up_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_REQUEST_S", 0.05)
    assert await answer(path, b"GET ") == b""


async def test_metrics_silent_connections_do_not_keep_others_out_for_good(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_REQUEST_S", 0.1)
    with contextlib.ExitStack() as silent:
        for _ in range(20):
            silent.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        assert b"200 OK" in await answer(path, b"GET /metrics HTTP/1.1\r\n\r\n")


async def test_metrics_stop_ends_connections_too(tmp_path: Path) -> None:
    with listening_at(tmp_path / "metrics") as listener:
        serving = asyncio.ensure_future(metrics.serve(listener, ServiceMetrics(FakeCore(), per_vector=False)))
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "metrics"))
        await asyncio.sleep(0.01)
        serving.cancel()
        await asyncio.wait({serving})
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        await writer.wait_closed()
