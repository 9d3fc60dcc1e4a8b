"""Prometheus metrics, served on a UNIX or loopback socket. Off unless configured.

prometheus-client's own HTTP server is a thread, listens on TCP only, and reads whatever it is sent. Its registry and
its text format are used; what remains is one ``GET``.

The counters of vectors are the agent's, modulo 2^32, and go when the vector goes. What is shown for a VM is the sum of
their increments, so that it never decreases while the VM is attached. Vectors one by one are shown on request
only: thousands of series for each VM are more than most Prometheus servers like.
"""

import asyncio
import socket
from collections.abc import Iterator
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from irqrouter.errors import CallerError
from irqrouter.service.admin import Core, accepted
from irqrouter.service.status import VectorReport, VmStatus

#: A request that is longer, or takes longer, is none of a Prometheus server's.
_REQUEST_MAX: Final = 8192
_REQUEST_S: Final = 5.0
_CONNECTIONS_MAX: Final = 8

#: Counters of a VM: field of VmStatus, what it counts.
_VM_COUNTERS: Final = {
    "frames": "Frames received from the agent",
    "bytes": "Bytes in frames received from the agent",
    "operations": "Operations sent to the agent",
    "stale": "Operations that were late: the vector had changed meanwhile",
    "faults": "Faults sent to be recorded",
    "doorbells": "Wakeups by the agent's doorbell",
    "wakeups": "Wakeups by a vector's eventfd",
}
#: Counters of a vector: field of VectorReport, what it counts.
_VECTOR_COUNTERS: Final = {
    "invalidations": "Invalidations",
    "caught": "Events taken in userspace and delivered by the agent",
    "faults": "Events taken in userspace and blocked",
    "stale": "Operations that the agent found late",
    "discarded": "Counts found pending just after an assignment, which KVM had injected",
}
_STATES: Final = ("assigned", "deassigned", "masked")


class Totals:
    """What a VM's vectors have counted, all together and ever."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(_VECTOR_COUNTERS, 0)
        self._last: dict[int, dict[str, int]] = {}

    def add(self, reports: list[VectorReport]) -> None:
        """Add what was counted since the last time."""
        last, self._last = self._last, {}
        for report in reports:
            counts = {name: int(getattr(report, name)) for name in _VECTOR_COUNTERS}
            before = last.get(report.vector, {})
            self._last[report.vector] = counts
            for name, count in counts.items():
                self.totals[name] += _increment(before.get(name, 0), count)


def _increment(before: int, now: int) -> int:
    """How much a counter modulo 2^32 rose. A fall by less than half is a new vector in the slot, which began at 0."""
    if now >= before:
        return now - before
    return now - before + (1 << 32) if before - now > 1 << 31 else now


class _Scraped(msgspec.Struct):
    vms: list[VmStatus] = []
    reports: dict[str, list[VectorReport]] = {}


class ServiceMetrics(Collector):
    """Everything there is to say about a core."""

    def __init__(self, core: Core, *, per_vector: bool) -> None:
        self._core = core
        self.per_vector = per_vector
        self._totals: dict[str, Totals] = {}
        self._scraped = _Scraped()
        self._scraping = asyncio.Lock()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    async def text(self) -> bytes:
        """What Prometheus reads. One VM at a time, so that the loop turns in between."""
        async with self._scraping:
            scraped = _Scraped(vms=self._core.vms(), reports={})
            for vm in scraped.vms:
                try:
                    reports = self._core.vectors(vm.name)
                except CallerError:  # it has just been detached
                    continue
                scraped.reports[vm.name] = reports
                self._totals.setdefault(vm.name, Totals()).add(reports)
                await asyncio.sleep(0)
            self._totals = {name: self._totals[name] for name in scraped.reports}
            self._scraped = scraped
            return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: there may be no VM."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """What was last scraped."""
        yield GaugeMetricFamily("irqrouter_vms", "Attached VMs", value=len(self._scraped.vms))
        yield from self._of_vms()
        yield from self._of_their_vectors()
        if self.per_vector:
            yield from self._of_each_vector()

    def _of_vms(self) -> Iterator[Metric]:
        vectors = GaugeMetricFamily("irqrouter_vm_vectors", "Vectors by state", labels=["vm", "state"])
        prepared = GaugeMetricFamily(
            "irqrouter_vm_prepared_vectors", "Deassigned vectors for which a decision stands", labels=["vm"]
        )
        descriptors = GaugeMetricFamily("irqrouter_vm_descriptors", "Descriptors held for the VM", labels=["vm"])
        for vm in self._scraped.vms:
            for state in _STATES:
                vectors.add_metric([vm.name, state], getattr(vm, state))
            prepared.add_metric([vm.name], vm.prepared)
            descriptors.add_metric([vm.name], vm.descriptors)
        yield from (vectors, prepared, descriptors)
        for field, about in _VM_COUNTERS.items():
            family = CounterMetricFamily(f"irqrouter_vm_{field}", about, labels=["vm"])
            for vm in self._scraped.vms:
                family.add_metric([vm.name], getattr(vm, field))
            yield family

    def _of_their_vectors(self) -> Iterator[Metric]:
        for field, about in _VECTOR_COUNTERS.items():
            family = CounterMetricFamily(f"irqrouter_vm_vector_{field}", f"{about}, of all vectors", labels=["vm"])
            for name, totals in self._totals.items():
                family.add_metric([name], totals.totals[field])
            yield family

    def _of_each_vector(self) -> Iterator[Metric]:
        for field, about in _VECTOR_COUNTERS.items():
            family = CounterMetricFamily(f"irqrouter_vector_{field}", about, labels=["vm", "vector"])
            for name, reports in self._scraped.reports.items():
                for report in reports:
                    family.add_metric([name, str(report.vector)], getattr(report, field))
            yield family


async def serve(listener: socket.socket, metrics: ServiceMetrics) -> None:
    """Answer ``GET /metrics`` on a listening ``SOCK_STREAM`` socket until cancelled."""
    listener.setblocking(False)
    free = asyncio.Semaphore(_CONNECTIONS_MAX)
    async with asyncio.TaskGroup() as group:
        while True:
            await free.acquire()
            group.create_task(_served(await accepted(listener), metrics, free))


async def _served(connection: socket.socket, metrics: ServiceMetrics, free: asyncio.Semaphore) -> None:
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    try:
        async with asyncio.timeout(_REQUEST_S):
            await loop.sock_sendall(connection, await _response(await _request(connection), metrics))
    except (OSError, TimeoutError):
        pass  # it went, or would not come to the point
    finally:
        connection.close()
        free.release()


async def _request(connection: socket.socket) -> bytes:
    """The request's head, or as much of it as was sent."""
    request = b""
    while b"\r\n\r\n" not in request and len(request) <= _REQUEST_MAX:
        received = await asyncio.get_running_loop().sock_recv(connection, 4096)
        if not received:
            break
        request += received
    return request


async def _response(request: bytes, metrics: ServiceMetrics) -> bytes:
    line, _, _ = request.partition(b"\r\n")
    if len(request) > _REQUEST_MAX:
        return _http("431 Request Header Fields Too Large")
    if b"\r\n\r\n" not in request:
        return _http("400 Bad Request")
    match line.split(b" "):
        case [b"GET", target, version] if version.startswith(b"HTTP/1."):
            if target.partition(b"?")[0] != b"/metrics":
                return _http("404 Not Found")
            return _http("200 OK", await metrics.text(), CONTENT_TYPE_LATEST)
        case [_, _, version] if version.startswith(b"HTTP/1."):
            return _http("405 Method Not Allowed", extra="Allow: GET\r\n")
        case _:
            return _http("400 Bad Request")


def _http(status: str, body: bytes = b"", kind: str = "text/plain", extra: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + body
