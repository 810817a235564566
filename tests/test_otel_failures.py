"""Receivers that fail, over HTTP and over gRPC: no task waits, losses count, ends are in time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests import tasks
from tests.conftest import (
    Metrics,
    cluster_total,
    measured,
    scheduler_port,
    wait_until,
)
from tests.receivers import dropping, receiver, variables
from tests.servers import Server, Servers, free_port
from tests.test_otel_spans import close_soon, spanned

PROTOCOLS = ["http/protobuf", "grpc"]

PEAK = "dask.worker.task.memory.peak"

LOST = {"reason": "span_export"}
WORKERS_LOST = "dask_worker_task_memory_dropped_records_total"
SCHEDULERS_LOST = "dask_scheduler_task_memory_dropped_records_total"

#: Seconds that are promised for all that we do when a process ends, and what a machine that is busy
#: with other tests may add; a nanny kills at 4.
PROMISED, BUSY = 2.0, 1.0


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """The servers of one test."""
    servers = Servers(tmp_path)
    yield servers
    servers.close()


def held(dask_scheduler: Any) -> int:
    """Return how many tasks a scheduler knows."""
    return len(dask_scheduler.tasks)


def closed_in(said: str) -> list[float]:
    """Return the seconds that processes have taken to let us go, by their own logs."""
    return [float(one) for one in re.findall(r"dask-memusage: closed in ([\d.]+) s", said)]


def tracebacks(server: Server) -> list[str]:
    """Return lines of tracebacks of ours or OpenTelemetry's."""
    lines = [line for line in server.lines('  File "') if "distributed/" not in line]
    return [line for line in lines if "memusage" in line or "opentelemetry" in line]


@pytest.mark.ends
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_failing_receivers_delay_nothing(protocol: str, servers: Servers) -> None:
    """Down, silent, dropping packets, answering 503 or 400 for ever: tasks run, workers end in
    time, and every span that was lost is counted."""
    servers.scheduler("--preload", "dask_memusage_exporter")
    with ExitStack() as stack:
        silent, unavailable, refusing = (stack.enter_context(receiver(protocol)) for _ in range(3))
        silent.answers.clear()
        unavailable.status, refusing.status = 503, 400
        endpoints = {
            "down": f"http://127.0.0.1:{free_port()}",
            "silent": silent.endpoint,
            "dropping": stack.enter_context(dropping()),
            "unavailable": unavailable.endpoint,
            "refusing": refusing.endpoint,
        }
        workers = {
            name: servers.worker(
                *("--no-nanny", "--name", name),
                env=variables(endpoint, OTEL_EXPORTER_OTLP_PROTOCOL=protocol),
            )
            for name, endpoint in endpoints.items()
        }
        servers.client.wait_for_workers(len(workers), timeout=100)
        began = time.monotonic()
        servers.client.gather(servers.client.map(abs, range(300), pure=False))
        assert time.monotonic() - began < 5
        wait_until(lambda: silent.arrived and unavailable.arrived and refusing.arrived)
        # What a worker takes with it is computed once more, for as long as the client wants it.
        wait_until(lambda: not servers.client.run_on_scheduler(held), what="results to be let go")
        for server in workers.values():
            server.process.terminate()
        took = {}
        for name, server in workers.items():
            wait_until(lambda s=server: s.process.poll() is not None, 60, f"{name}: {server.log}")
            assert server.process.returncode == 0, name
            assert not tracebacks(server), name
            (took[name],) = closed_in(server.log)
        assert median(took.values()) < PROMISED, took
        assert max(took.values()) < PROMISED + BUSY, took

    def told(name: str, **labels: str) -> float:
        name = f"dask_scheduler_task_memory_{name}_total"
        return Metrics.read(servers.scheduler_port).get_value(name, **labels) or 0

    # What was lost at the end is told with the goodbye.
    wait_until(lambda: told("dropped_records", **LOST) == 300, what="all spans to be counted")
    wait_until(lambda: told("errors", stage="export") >= len(workers))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_receiver_that_comes_back(protocol: str) -> None:
    """Where it was unavailable nothing is lost; what it refused is counted, span by span, and
    metrics have it all the same."""
    with spanned(protocol, env={"OTEL_METRICS_EXPORTER": "otlp"}) as (cluster, received):

        def run(prefix: str) -> None:
            keys = [f"{prefix}-{i}" for i in range(20)]
            cluster.client.gather(cluster.client.map(tasks.nothing, range(20), key=keys))

        def lost() -> float:
            return cluster_total(cluster.cluster, WORKERS_LOST, **LOST)

        received.status = 503
        run("held")
        arrived = received.arrived
        wait_until(lambda: received.arrived > arrived + 1)
        received.status = 200
        wait_until(lambda: len(received.spans("held")) == 20)
        assert lost() == 0
        received.status = 400
        run("refused")
        wait_until(lambda: lost() == 20)
        errors = "dask_worker_task_memory_errors_total"
        assert cluster_total(cluster.cluster, errors, stage="export") >= 1
        received.status = 200
        run("taken")
        wait_until(lambda: len(received.spans("taken")) == 20)
        for prefix in ("held", "refused", "taken"):
            wait_until(lambda p=prefix: received.total(PEAK, p) == 20)
        assert not received.spans("refused")
        assert lost() == 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stuck_exporter_delays_nothing_and_its_losses_are_counted(
    protocol: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twice as many tasks as the queue takes, and a receiver that never answers; then the end."""
    env = {"OTEL_EXPORTER_OTLP_TIMEOUT": "60", "OTEL_BSP_MAX_QUEUE_SIZE": "512"}
    with spanned(protocol, env=env, silence_logs=False) as (cluster, received):
        received.answers.clear()
        client = cluster.client
        client.submit(tasks.nothing, key="stuck-first").result()
        wait_until(lambda: received.arrived)
        keys = [f"stuck-{i}" for i in range(1000)]
        client.gather(client.map(tasks.nothing, range(1000), key=keys))
        assert received.arrived == 1  # all of it while the first waits for its answer
        wait_until(lambda: cluster_total(cluster.cluster, WORKERS_LOST, **LOST) == 1000 - 512)
        wait_until(lambda: not cluster.cluster.scheduler.tasks, what="results to be let go")
        client.run(close_soon)
        wait_until(lambda: not cluster.cluster.scheduler.workers, timeout=10)
        port = scheduler_port(cluster.cluster)
        wait_until(lambda: Metrics.read(port).get_value(SCHEDULERS_LOST, **LOST) == 1001)
        # Processes of their own write to our standard error.
        (took,) = wait_until(lambda: closed_in(said(capfd)))
        assert took < PROMISED + BUSY


_said: dict[Any, str] = {}


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """Return all that has been printed in a test so far."""
    _said[capfd] = _said.get(capfd, "") + "".join(capfd.readouterr())
    return _said[capfd]


def sending_to(endpoint: str, traces: str) -> dict[str, str]:
    """Return variables for metrics over HTTP to one endpoint and spans over gRPC to another."""
    return variables(
        endpoint,
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=traces,
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc",
    )


def test_every_way_to_end_is_in_time(servers: Servers) -> None:
    """SIGTERM with a nanny, which kills at 4 s, and a scheduler that is gone: both protocols at
    once to receivers that never answer."""
    with receiver() as silent, receiver("grpc") as traces:
        silent.answers.clear()
        traces.answers.clear()
        env = sending_to(silent.endpoint, traces.endpoint)
        servers.scheduler("--preload", "dask_memusage_exporter")
        with_nanny = servers.worker("--name", "nanny", env=env)
        alone = servers.worker("--name", "alone", "--no-nanny", env=env)
        servers.client.wait_for_workers(2, timeout=100)
        servers.client.gather(servers.client.map(abs, range(50), pure=False))
        wait_until(lambda: silent.arrived and traces.arrived)
        assert with_nanny.stop() == 0
        servers.kill_scheduler()
        alone.process.wait(30)
        for server in (with_nanny, alone):
            (took,) = closed_in(server.log)
            assert 1 < took < PROMISED + BUSY  # the flushing has had its time
            assert not server.lines("killing")
            assert not server.lines("still alive")
            assert not tracebacks(server)


def test_an_idle_scheduler_ends_in_time(servers: Servers) -> None:
    """Its timeout works, though its last figures are for a receiver that never answers."""
    with receiver() as silent:
        silent.answers.clear()
        scheduler = servers.scheduler(
            *("--preload", "dask_memusage_exporter", "--idle-timeout", "2s"),
            env=variables(silent.endpoint),
        )
        wait_until(lambda: silent.arrived)
        assert scheduler.process.wait(60) == 0
        (took,) = closed_in(scheduler.log)
        assert 1 < took < PROMISED + BUSY


def test_a_cluster_that_closes_is_in_time(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its workers and its scheduler, each with last figures for receivers that never answer."""
    with receiver() as silent, receiver("grpc") as traces:
        silent.answers.clear()
        traces.answers.clear()
        for name, value in sending_to(silent.endpoint, traces.endpoint).items():
            monkeypatch.setenv(name, value)
        with measured(n_workers=2, silence_logs=False) as cluster:
            cluster.client.gather(cluster.client.map(abs, range(50), pure=False))
            wait_until(lambda: silent.arrived and traces.arrived)
            began = time.monotonic()
        assert time.monotonic() - began < 10  # workers first, then the scheduler
        # Workers write to our standard error, the scheduler is here.
        wait_until(lambda: len(closed_in(said(capfd))) == 2)
        (scheduler,) = closed_in(caplog.text)
        took = scheduler, *closed_in(said(capfd))
        assert median(took) < PROMISED, took
        assert max(took) < PROMISED + BUSY, took
        assert "still alive" not in said(capfd)


def test_a_schedulers_limit_is_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own last figures wait no longer than they may."""
    with receiver() as silent:
        silent.answers.clear()
        for name, value in variables(silent.endpoint).items():
            monkeypatch.setenv(name, value)
        with measured({"memusage.shutdown-timeout": "300ms"}, n_workers=0):
            wait_until(lambda: silent.arrived)
            began = time.monotonic()
        assert time.monotonic() - began < 3
