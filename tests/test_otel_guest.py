"""Spans as a guest of an application's own provider, whatever that does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import dask
import pytest
from distributed import Client

from dask_memusage_exporter import install, process
from tests import applications, tasks, tasks_spans
from tests.conftest import Measured, Records, cluster_total, local_cluster, wait_until
from tests.receivers import Received, receiver
from tests.tasks import Gate
from tests.test_otel_spans import ERROR, one_span, spanned


@contextmanager
def guest(received: Received, config: dict[str, Any] | None = None, **own: Any) -> Iterator[Any]:
    """Hold a measured cluster whose worker has a TracerProvider of its own from the start."""
    with local_cluster() as cluster, Client(cluster) as client:
        client.run(applications.set_own_tracer, received.endpoint, **own)
        records = Records()
        with dask.config.set(config or {}):
            install(cluster.scheduler)
            cluster.scheduler.extensions["memusage"].add_sink(records)
            install(cluster.scheduler)
        yield Measured(cluster, client, records)


@pytest.fixture
def received() -> Iterator[Received]:
    """A receiver of an application's spans; no variable says anything of it."""
    with receiver() as one:
        yield one


@pytest.mark.ends
def test_instrumented_libraries_nest_under_the_task(received: Received) -> None:
    """Their spans are its children, through the application's provider; each is there once."""
    with guest(received, log=True) as cluster:
        client = cluster.client
        client.submit(tasks_spans.starts_child, "query", key="nesting-1").result()
        parent = one_span(received, "nesting")
        child = one_span(received, "query")
        assert child.data.parent_span_id == parent.data.span_id
        assert child.data.trace_id == parent.data.trace_id
        assert parent.resource["service.name"] == "application"
        (address,) = cluster.cluster.scheduler.workers
        assert parent.attributes["dask.worker.address"] == address
        assert parent.attributes["dask.worker.name"] == "0"
        # In a coroutine, too.
        client.submit(tasks_spans.starts_child_on_loop, "request", key="awaiting-1").result()
        awaiting = one_span(received, "awaiting")
        assert one_span(received, "request").data.parent_span_id == awaiting.data.span_id
        # An exception is a log record where the application takes those.
        assert client.submit(tasks.fail, 1, key="logs-1").exception() is not None
        failed = one_span(received, "logs")
        assert failed.data.status.code == ERROR
        if not failed.data.events:  # an SDK of before that has no such records
            ((name, about, span_id),) = next(iter(client.run(applications.logged).values()))
            assert (name, about["exception.type"]) == ("exception", "ValueError")
            assert span_id == int.from_bytes(failed.data.span_id, "big")


def test_an_application_that_comes_later_is_followed(
    received: Received, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each task has one span, by ours before and by the application's after."""
    with spanned() as (cluster, ours):
        client = cluster.client
        client.submit(tasks.nothing, key="early-1").result()
        client.run(applications.set_own_tracer, received.endpoint)
        count = 0

        def followed() -> bool:
            nonlocal count
            count += 1
            client.submit(tasks.nothing, key=f"late-{count}").result()
            return bool(received.spans("late"))

        wait_until(followed)
        client.submit(tasks.nothing, key="then-1").result()
        one_span(received, "then")
        one_span(ours, "early")
        wait_until(lambda: len(received.spans("late")) + len(ours.spans("late")) == count)
        assert not ours.spans("then")
    said = capfd.readouterr()
    assert "verriding" not in said.out + said.err


def test_a_slow_processor_holds_nobody_up(received: Received) -> None:
    """It sleeps a second at each end; a task and the event loop know nothing of it."""
    with guest(received, delay=1.0) as cluster:
        began = time.monotonic()
        keys = [f"slow-{i}" for i in range(20)]
        cluster.client.gather(cluster.client.map(tasks.nothing, range(20), key=keys))
        assert time.monotonic() - began < 2
        wait_until(lambda: len(received.spans("slow")) >= 1)


def test_a_filter_keeps_what_stands_out(received: Received) -> None:
    """Large, failed, among the largest, and parents, though they are small themselves."""
    config = {
        "memusage.spans.keep.growth": "60MiB",
        "memusage.spans.keep.largest": 1,
        "memusage.spans.task-key": False,
    }
    with guest(received, config) as cluster:
        client = cluster.client

        def run(function: Any, argument: Any, key: str) -> None:
            client.submit(function, argument, key=key).exception()

        run(tasks.array, 40, "first-1")  # the largest of its prefix so far
        run(tasks.array, 1, "first-2")
        run(tasks.array, 1, "first-3")
        run(tasks.array, 100, "first-4")
        run(tasks.fail, 1, "failing-1")
        for i in range(3):
            run(tasks_spans.starts_child, "child", f"parent-{i}")
        run(tasks.array, 100, "last-1")
        one_span(received, "last")
        assert len(received.spans("parent")) == 3
        assert len(received.spans("failing")) == 1
        assert len(received.spans("first")) == 2
        assert not [s for s in received.spans() if "dask.task.key" in s.attributes]
        wait_until(lambda: cluster_total(
            cluster.cluster, "dask_worker_task_memory_tasks_total", task_prefix_name="first"
        ) == 4)  # fmt: skip


def test_a_filter_leaves_out_what_is_hardly_larger() -> None:
    """A process grows a little with each small task: few of them are among the largest."""
    with spanned(config={"memusage.spans.keep.largest": 2}) as (cluster, received):
        client = cluster.client
        keys = [f"alike-{i}" for i in range(200)]
        client.gather(client.map(tasks.nothing, range(200), key=keys))
        client.submit(tasks.array, 100, key="alike-1000").result()
        assert client.submit(tasks.fail, 1, key="failing-1").exception() is not None
        one_span(received, "failing")  # the last to end
        kept = [one.attributes["dask.task.key"] for one in received.spans("alike")]
        assert "alike-1000" in kept
        peaks = [record.peak_bytes for record in cluster.records.of("alike")]
        assert 3 <= len(kept) < 20 < len(set(peaks))


def test_a_filter_keeps_who_submitted_others() -> None:
    """Its children may run in any process: what is submitted tells that it has some."""
    config = {"memusage.spans.keep.peak": "1TiB"}
    with spanned(config=config, n_workers=2) as (cluster, received):
        client = cluster.client
        here, there = cluster.cluster.scheduler.workers
        client.submit(tasks.nothing, key="small-1", workers=here).result()
        around = client.submit(
            tasks_spans.submits_failing, "within-1", there, key="around-1", workers=here
        )
        around.result()
        within, around = one_span(received, "within"), one_span(received, "around")
        assert within.resource["dask.worker.address"] == there
        assert within.data.parent_span_id == around.data.span_id
        assert not received.spans("small")


def test_an_applications_processors_hear_the_end_of_spans_that_are_left_out(
    received: Received, go: Gate, stop: Gate
) -> None:
    """As of spans that are not sampled, with what was measured; no exporter takes them."""
    with guest(received, {"memusage.spans.keep.peak": "1TiB"}) as cluster:
        client = cluster.client
        client.run(applications.hear)
        keys = [f"small-{i}" for i in range(10)]
        client.gather(client.map(tasks.nothing, range(10), key=keys))
        client.submit(tasks.fail, 1, key="failing-1").exception()

        def heard() -> Any:
            ((still_open, ended),) = client.run(applications.heard).values()
            return not still_open and len(ended) == 11 and ended

        ended = wait_until(heard)
        small = [one for one in ended if one[0] == "small"]
        assert len(small) == 10
        assert all(not sampled and peak > 2**20 for _, sampled, peak in small)
        assert [sampled for name, sampled, _ in ended if name == "failing"] == [True]
        one_span(received, "failing")
        assert not received.spans("small")

        # So does one whose task runs on when measuring ends, whether or not it begins again.
        for gate, again in ((go, False), (stop, True)):
            future = client.submit(tasks.wait_for, gate.path, key=f"across-{again}")
            wait_until(lambda gate=gate: gate.reached)
            client.run(lambda dask_worker: dask_worker.extensions["memusage"].deactivate())
            if again:
                install(cluster.cluster)
            gate.open()
            future.result()
            wait_until(lambda: not next(iter(client.run(applications.heard).values()))[0])
            install(cluster.cluster)
        assert not received.spans("across")


def test_a_span_ends_though_its_task_could_not_be_measured(received: Received) -> None:
    """Our own errors leave none open, wherever they come."""
    with guest(received) as cluster:
        client = cluster.client
        client.run(applications.hear)
        for count, method in enumerate(("settle", "shut"), 1):
            client.run(fail_to, method)
            client.submit(tasks.nothing, key=f"unmeasured-{count}").result()

            def heard(count: int = count) -> bool:
                ((still_open, ended),) = client.run(applications.heard).values()
                return not still_open and ended == [("unmeasured", False, None)] * count

            wait_until(heard)


def fail_to(method: str) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    setattr(process.Process, method, fail)


@pytest.mark.parametrize("keep", [{}, {"memusage.spans.keep.peak": "1TiB"}])
def test_a_provider_of_another_kind_than_the_sdks(keep: dict[str, Any]) -> None:
    """It has what the API asks for and nothing more; tasks run, and it gets its spans."""
    with local_cluster() as cluster, Client(cluster) as client:
        client.run(applications.set_foreign_tracer)
        with dask.config.set(keep):
            install(cluster.scheduler)
        client.submit(tasks.fail, 1, key="foreign-1").exception()
        keys = [f"foreign-{i}" for i in range(2, 12)]
        client.gather(client.map(tasks.nothing, range(10), key=keys))

        def told() -> Any:
            (spans,) = client.run(applications.foreign).values()
            ended = [one for one in spans if one.get("ended")]
            return len(ended) == 11 and ended  # nobody tells which of them are parents

        spans = wait_until(told)
        assert {one["dask.task.key"] for one in spans} == {f"foreign-{i}" for i in range(1, 12)}
        assert [one["error.type"] for one in spans if "event" in one] == ["ValueError"]
        errors = "dask_worker_task_memory_errors_total"
        assert cluster_total(cluster, errors) == 0


def test_an_exception_that_no_log_takes_is_told_on_the_span(received: Received) -> None:
    """A LoggerProvider with nothing behind it, as OTEL_LOGS_EXPORTER=none sets one."""
    with guest(received) as cluster:
        cluster.client.run(applications.set_empty_logger)
        cluster.client.submit(tasks.fail, 1, key="unlogged-1").exception()
        (event,) = one_span(received, "unlogged").data.events
        assert event.name == "exception"


def test_a_provider_with_nothing_behind_it_is_none(received: Received) -> None:
    """One that a variable alone has set sends to nobody: ours does, until somebody adds to it."""
    env = {"OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider"}
    with spanned(env=env) as (cluster, ours):
        client = cluster.client
        client.submit(tasks.nothing, key="behind-1").result()
        assert one_span(ours, "behind").resource["service.name"] == "dask-worker"
        client.run(applications.add_processor, received.endpoint)

        def followed() -> bool:
            client.submit(tasks.nothing, pure=False, key=f"added-{uuid4()}").result()
            return bool(received.spans("added"))

        wait_until(followed)
        assert not received.spans("behind")
