"""A span a task: what it says, whose child and whose parent it is, and what it must not do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
import pytest
from distributed import span

from dask_memusage_exporter import worker_spans
from tests import applications, tasks, tasks_children, tasks_spans
from tests.conftest import Measured, cluster_total, measured, wait_until
from tests.receivers import Received, Span, receiver, variables
from tests.tasks import Gate

CONSUMER, UNSET, ERROR = 5, 0, 2

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def spanned(
    protocol: str = "http/protobuf",
    config: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[tuple[Measured, Received]]:
    """Hold a measured cluster that sends spans, and only these, to a receiver."""
    with receiver(protocol) as received, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            patch.delenv(name)
        more = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_METRICS_EXPORTER": "none"}
        for name, value in variables(received.endpoint, **{**more, **(env or {})}).items():
            patch.setenv(name, value)
        with measured(config, **options) as cluster:
            yield cluster, received


@pytest.fixture(scope="module")
def sent() -> Iterator[tuple[Measured, Received]]:
    """A cluster of two threads whose spans go to a receiver."""
    with spanned(threads_per_worker=2) as both:
        yield both


def one_span(received: Received, name: str, count: int = 1) -> Span:
    """Return the only span of a name, once it has come."""
    spans = wait_until(lambda: len(received.spans(name)) >= count and received.spans(name))
    assert len(spans) == count, spans
    return spans[-1]


def test_a_span_says_what_its_record_says(sent: tuple[Measured, Received]) -> None:
    """All attributes of the contract, the task's own times, one span an execution."""
    cluster, received = sent
    with span("etl", "load"):
        source = cluster.client.submit(tasks.made, 2, key="source-1")
        cluster.client.submit(tasks.nothing, source, key="spanned-1").result()
    (record,) = cluster.records.of("spanned")
    one = one_span(received, "spanned")
    assert one.data.kind == CONSUMER
    assert one.data.status.code == UNSET
    assert not one.data.parent_span_id
    assert 0 <= record.start - one.data.start_time_unix_nano / 1e9 < 0.05
    assert abs(record.stop - one.data.end_time_unix_nano / 1e9) < 1e-5
    assert record.input_bytes == 2 * 2**20 + 96 or record.input_bytes
    expected = {
        "dask.task.key": "spanned-1",
        "dask.task.prefix.name": "spanned",
        "dask.task.group.name": "spanned",
        "dask.task.memory.peak": record.peak_bytes,
        "dask.task.memory.growth": record.growth_bytes,
        "dask.task.memory.start": record.start_bytes,
        "dask.task.memory.scope": record.scope,
        "dask.task.concurrency": record.concurrency,
        "dask.task.input.size": record.input_bytes,
        "dask.task.output.size": record.output_bytes,
        "dask.span.id": record.span_id,
        "dask.span.tags": ["etl", "load"],
    }
    assert one.attributes == {name: v for name, v in expected.items() if v is not None}
    assert record.span_id
    address = next(iter(cluster.cluster.scheduler.workers))
    assert one.resource["dask.worker.address"] == address
    assert one.resource["service.name"] == "dask-worker"


def test_every_execution_has_one(sent: tuple[Measured, Received]) -> None:
    """Many short tasks; retries, one an attempt, failures with what they raised."""
    cluster, received = sent
    keys = [f"many-{i}" for i in range(300)]
    cluster.client.gather(cluster.client.map(tasks.nothing, range(300), key=keys))
    wait_until(lambda: len(received.spans("many")) == 300)
    assert {one.attributes["dask.task.key"] for one in received.spans("many")} == set(keys)
    assert len({one.data.trace_id for one in received.spans("many")}) == 300


def test_retries_and_failures(sent: tuple[Measured, Received], go: Gate) -> None:
    """One span an attempt; a failure has status, type and the exception as an event."""
    cluster, received = sent
    path = go.path + ".count"
    cluster.client.submit(tasks.fail_twice, path, 1, key="retried-1", retries=2).result()
    one_span(received, "retried", 3)
    client = cluster.client
    assert client.submit(tasks.coroutine, 1, error=True, key="awaited-1").exception() is not None
    assert one_span(received, "awaited").attributes["error.type"] == "ValueError"
    failed = [s for s in received.spans("retried") if s.data.status.code == ERROR]
    assert len(failed) == 2
    for one in failed:
        assert one.attributes["error.type"] == "ValueError"
        assert one.data.status.message == "ValueError: on purpose"
        (event,) = one.data.events
        about = {a.key: a.value.string_value for a in event.attributes}
        assert event.name == "exception"
        assert about["exception.type"] == "ValueError"
        assert about["exception.message"] == "on purpose"
        assert "fail_twice" in about["exception.stacktrace"]


def test_what_a_task_raises_can_be_sent_whatever_it_is(sent: tuple[Measured, Received]) -> None:
    """A message with a name of a file that is no UTF-8, one that fails when it is asked for: it
    takes neither its span with it nor those that are sent beside it."""
    cluster, received = sent
    client = cluster.client
    for task in (tasks_spans.raises_only_here, tasks_spans.raises_name):
        assert client.submit(task, key=f"{task.__name__}-1").exception() is not None
    client.submit(tasks.nothing, key="neighbour-1").result()
    told = one_span(received, "raises_name")
    assert told.attributes["error.type"] == "ValueError"
    assert told.data.status.message == "ValueError: no rows in /data/?"
    told = one_span(received, "raises_only_here")
    assert told.attributes["error.type"] == "OnlyHere"
    assert told.data.status.message == "OnlyHere: OnlyHere('on purpose')"
    one_span(received, "neighbour")


def test_a_rescheduled_task_has_not_failed(sent: tuple[Measured, Received], go: Gate) -> None:
    """Its status is unset."""
    cluster, received = sent
    path = go.path + ".count"
    cluster.client.submit(tasks.reschedule_once, path, 1, key="rescheduled-1").result()
    one_span(received, "rescheduled", 2)
    assert {s.data.status.code for s in received.spans("rescheduled")} == {UNSET}


def test_a_traceparent_is_the_parent(sent: tuple[Measured, Received]) -> None:
    """A W3C annotation makes the task part of a trace; a broken one does not."""
    cluster, received = sent
    with dask.annotate(traceparent=TRACEPARENT):
        cluster.client.submit(tasks.nothing, key="traced-1").result()
    with dask.annotate(traceparent="00-nonsense"):
        cluster.client.submit(tasks.nothing, key="broken-1").result()
    one = one_span(received, "traced")
    assert one.data.trace_id.hex() == TRACEPARENT.split("-")[1]
    assert one.data.parent_span_id.hex() == TRACEPARENT.split("-")[2]
    assert not one_span(received, "broken").data.parent_span_id


def test_a_span_is_current_in_its_task_and_nowhere_else(
    sent: tuple[Measured, Received], capfd: pytest.CaptureFixture[str]
) -> None:
    """Tasks that raise, secede, wait for others, coroutines, actors: nothing is left behind."""
    cluster, received = sent
    client = cluster.client
    trace, current = client.submit(tasks_spans.current_span, key="current-1").result()
    one = one_span(received, "current")
    assert (trace, current) == (
        int.from_bytes(one.data.trace_id, "big"),
        int.from_bytes(one.data.span_id, "big"),
    )
    assert client.submit(tasks.fail, 1, key="raises-1").exception() is not None
    client.submit(tasks.secede_and_rejoin, 1, 1, key="secedes-1").result()
    client.submit(tasks.with_worker_client, 2, 1, key="outer-1").result()
    client.submit(tasks.coroutine, 1, key="coroutine-1").result()
    blocks = client.submit(tasks.lazily, 2, 1, key="generator-1")
    client.submit(tasks.taken, blocks, key="taken-1").result()
    client.submit(tasks_spans.leaves_context, key="leaves-1").result()
    client.submit(tasks.nothing, key="then-1").result()
    actor = client.submit(tasks.Actor, actor=True).result()
    with pytest.raises(ValueError, match="on purpose"):
        actor.fail(1).result()
    actor.on_loop(1).result()
    # The client's own thread has nothing to do with it; executors' threads and the loop are clean.
    assert list(client.run(tasks_spans.current_span).values()) == [(0, 0)]
    assert list(client.run(executors_current).values()) == [{"default": (0, 0)}]
    names = ("raises", "secedes", "outer", "coroutine", "generator", "taken", "leaves", "then")
    for name in names:
        one_span(received, name)
    one_span(received, "inner", 2)
    for one in received.spans():
        if one.name != "traced":
            assert not one.data.parent_span_id, one.name
    (log,) = client.get_worker_logs().values()
    assert not [line for _, line in log if "dask-memusage" in line and "failed" in line]
    said = capfd.readouterr()
    assert "Failed to detach context" not in said.out + said.err


def test_a_coroutine_has_its_own_span(
    sent: tuple[Measured, Received], go: Gate, capfd: pytest.CaptureFixture[str]
) -> None:
    """Several on the loop by turns, each in its own; what it starts inherits it, nobody else."""
    cluster, received = sent
    client = cluster.client
    keys = [f"together-{i}" for i in range(20)]
    futures = client.map(tasks_spans.current_in_coroutine, [go.path] * 20, key=keys)
    wait_until(lambda: all(client.run(two_run).values()))
    go.open()
    results = dict(zip(keys, client.gather(futures), strict=True))
    one_span(received, "together", 20)
    for one in received.spans("together"):
        own = int.from_bytes(one.data.trace_id, "big"), int.from_bytes(one.data.span_id, "big")
        assert results[one.attributes["dask.task.key"]] == (own, own)
        assert not one.data.parent_span_id
    client.submit(tasks.nothing, key="beside-1").result()
    assert not one_span(received, "beside").data.parent_span_id
    assert list(client.run(tasks_spans.current_later).values()) == [(0, 0)]
    assert list(client.run(executors_current).values()) == [{"default": (0, 0)}]
    assert "Failed to detach" not in "".join(capfd.readouterr())


def test_a_coroutine_that_never_ends_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Its worker closes while it waits, and says nothing of contexts."""
    with spanned() as (cluster, _):
        future = cluster.client.submit(tasks_spans.wait_for_ever, key="endless-1")
        wait_until(lambda: all(cluster.client.run(one_runs).values()))
        cluster.client.run(close_soon)
        wait_until(lambda: not cluster.cluster.scheduler.workers)
        del future
    assert "detach" not in "".join(capfd.readouterr())


def close_soon(dask_worker: Any) -> None:
    dask_worker.loop.add_callback(dask_worker.close, nanny=True)


def one_runs(dask_worker: Any) -> bool:
    return len(dask_worker.active_keys) == 1


def two_run(dask_worker: Any) -> bool:
    return len(dask_worker.active_keys) == 2


def executors_current(dask_worker: Any) -> dict[str, tuple[int, int]]:
    return {
        "default": dask_worker.executors["default"].submit(tasks_spans.current_span).result(),
    }


def test_an_actors_methods_have_spans(sent: tuple[Measured, Received]) -> None:
    """On a thread, on the event loop, and where they raise."""
    cluster, received = sent
    actor = cluster.client.submit(tasks_spans.Spanned, actor=True).result()
    on_thread = actor.on_thread("none").result()
    on_loop = actor.on_loop("none").result()
    with pytest.raises(ValueError, match="on purpose"):
        actor.raises().result()
    for name, current in (("on_thread", on_thread), ("on_loop", on_loop)):
        one = one_span(received, f"Spanned.{name}")
        assert int.from_bytes(one.data.span_id, "big") == current[1]
        assert one.data.end_time_unix_nano >= one.data.start_time_unix_nano
    failed = one_span(received, "Spanned.raises")
    assert failed.data.status.code == ERROR
    assert failed.attributes["error.type"] == "ValueError"


def test_actors_calls_that_fail_one_after_the_other(sent: tuple[Measured, Received]) -> None:
    """Each has its own exception, though the next one starts before anybody tells of it."""
    cluster, received = sent
    actor = cluster.client.submit(tasks_spans.Spanned, actor=True).result()
    texts = [f"number {number}" for number in range(10)]
    for call in [actor.raises_in_a_row(text) for text in texts]:
        with pytest.raises(ValueError, match="number"):
            call.result()
    one_span(received, "Spanned.raises_in_a_row", len(texts))
    failed = received.spans("Spanned.raises_in_a_row")
    assert {one.data.status.code for one in failed} == {ERROR}
    failed.sort(key=lambda one: one.data.start_time_unix_nano)
    order = actor.in_a_row().result()
    assert sorted(order) == texts
    assert [one.data.status.message for one in failed] == [f"ValueError: {text}" for text in order]


def test_actors_failures_that_wait_to_be_told_are_bounded() -> None:
    """Beyond a bound the oldest span is lost, and counted."""
    with spanned() as (cluster, received):
        client = cluster.client
        client.run(bound_raised, 1)
        actor = client.submit(tasks_spans.Spanned, actor=True).result()
        actor.on_thread("first").result()
        calls = [actor.raises_after(0.2) for _ in range(5)]
        wait_until(lambda: list(client.run(waiting_calls).values()) == [4], what="calls to queue")
        client.run(time.sleep, 2)  # on the event loop, which tells of what they raise
        for call in calls:
            with pytest.raises(ValueError, match="on purpose"):
                call.result()
        lost, reason = "dask_worker_task_memory_dropped_records_total", {"reason": "span_export"}
        wait_until(
            lambda: (
                (
                    len(received.spans("Spanned.raises_after"))
                    + cluster_total(cluster.cluster, lost, **reason)
                )
                == 5
            )
        )
        assert cluster_total(cluster.cluster, lost, **reason) >= 1


def bound_raised(most: int) -> None:
    worker_spans._MOST_RAISED = most


def waiting_calls(dask_worker: Any) -> int:
    return dask_worker.executors["actor"]._work_queue.qsize()


def test_nothing_is_left_on_a_thread_when_measuring_ends() -> None:
    """Not even by an actor's method that has raised, of whose end nobody tells."""
    with spanned() as (cluster, _):
        actor = cluster.client.submit(tasks_spans.Spanned, actor=True).result()
        with pytest.raises(ValueError, match="on purpose"):
            actor.raises().result()
        cluster.client.run(lambda dask_worker: dask_worker.extensions["memusage"].deactivate())
        assert actor.current().result() == (0, 0)


# -- variables, settings, failures -----------------------------------------------------------------


@pytest.mark.ends
def test_over_grpc_with_a_sampler() -> None:
    """A sampler drops what it drops and nothing counts as lost; parents' decisions stand."""
    env = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with spanned("grpc", env=env) as (cluster, received):
        cluster.client.submit(tasks.nothing, key="unsampled-1").result()
        with dask.annotate(traceparent=TRACEPARENT):
            cluster.client.submit(tasks.nothing, key="sampled-1").result()
        one_span(received, "sampled")
        assert not received.spans("unsampled")
        lost = "dask_worker_task_memory_dropped_records_total"
        assert cluster_total(cluster.cluster, lost) == 0


def test_spans_can_be_switched_off() -> None:
    """Whatever the variables say; nothing is imported then."""
    with spanned(config={"memusage.spans.enabled": False}) as (cluster, _):
        cluster.client.submit(tasks.nothing, key="off-1").result()
        assert list(cluster.client.run(applications.opentelemetry_modules).values()) == [[]]


def test_forked_children_send_nothing() -> None:
    """They live for several intervals, and end as if we were not there; totals are the parent's."""
    env = {"OTEL_METRICS_EXPORTER": "otlp"}
    with spanned(config={"distributed.worker.daemon": False}, env=env) as (cluster, received):
        client = cluster.client
        client.run(tasks_children.open_executor)
        client.submit(tasks_children.fork_holds, 1, 1.0, key="forks-1").result()
        assert client.submit(tasks_children.bare_fork, 1.0, key="bare-1").result() == 7
        with dask.annotate(executor="processes"):
            client.submit(tasks.sleep, 1.0, key="pooled-1").result()
        client.submit(tasks.nothing, key="then-1").result()
        peak, prefixes = "dask.worker.task.memory.peak", ("forks", "bare", "pooled", "then")
        for prefix in prefixes:
            one_span(received, prefix)
            wait_until(lambda: received.total(peak, prefix) == 1)  # noqa: B023
        assert len(received.spans()) == len(prefixes)
        # A child that sent would send its copy at its own times, some of them the same.
        points = received.points("dask.memusage.time")
        assert len(points) == len({(one.series, one.data.time_unix_nano) for one in points})
        client.run(tasks_children.close_executor)
