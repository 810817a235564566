"""``/memusage/metrics``: our metrics alone, and on their buckets the spans of tasks."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Scheduler
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed
from prometheus_client.parser import text_string_to_metric_families as parsed_plain
from prometheus_client.samples import Sample
from tornado.httpclient import AsyncHTTPClient

from dask_memusage_exporter.exemplars import checked
from dask_memusage_exporter.exporters import openmetrics, prometheus
from dask_memusage_exporter.exporters.openmetrics import wants_openmetrics
from dask_memusage_exporter.scheduler import prepare
from dask_memusage_exporter.scheduler_agent import SchedulerAgent
from tests import tasks
from tests.conftest import Measured, page, scheduler_port, wait_until, worker_ports
from tests.receivers import Received, Span
from tests.servers import Prometheus
from tests.test_batches import at_scheduler, batch, counts
from tests.test_otel_spans import TRACEPARENT, one_span, spanned

#: What a Prometheus of today asks for.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PATH = "/memusage/metrics"


@pytest.fixture(scope="module")
def sent() -> Iterator[tuple[Measured, Received]]:
    """A cluster whose spans go to a receiver, and whose workers' own ``/metrics`` are off."""
    with spanned(config={"memusage.worker-metrics": "off"}) as both:
        yield both


def read(port: int, accept: str = ACCEPT) -> tuple[str, str]:
    """Return a page's content type and text."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{PATH}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200
        return answer.headers["Content-Type"], answer.read().decode()


def families(port: int) -> dict[str, Metric]:
    """Return what stands on a page, as OpenMetrics' own parser reads it."""
    kind, text = read(port)
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    found = {family.name: family for family in parsed(text)}
    assert len(found) == text.count("# TYPE")
    return found


def exemplified(port: int, server: str, name: str, prefix: str) -> list[Sample]:
    """Return the samples of one histogram that have an exemplar."""
    family = families(port)[f"dask_{server}_task_memory_{name}_bytes"]
    samples = [one for one in family.samples if one.labels["task_prefix_name"] == prefix]
    return [one for one in samples if one.exemplar is not None]


def ids_of(span: Span) -> dict[str, str]:
    """Return the labels that an exemplar of a span has."""
    return {"trace_id": span.data.trace_id.hex(), "span_id": span.data.span_id.hex()}


def test_buckets_name_the_span_of_a_task(sent: tuple[Measured, Received]) -> None:
    """On the worker and on the scheduler: its ids, its value and when it ended, and no more."""
    cluster, received = sent
    cluster.client.submit(tasks.array, 100, key="shown-1").result()
    span = one_span(received, "shown")
    (record,) = cluster.records.of("shown")
    assert record.growth_bytes is not None
    for port, server in (
        (worker_ports(cluster.cluster)[0], "worker"),
        (scheduler_port(cluster.cluster), "scheduler"),
    ):
        for name, value in (("peak", record.peak_bytes), ("growth", record.growth_bytes)):
            (one,) = wait_until(lambda: exemplified(port, server, name, "shown"))  # noqa: B023
            assert one.name.endswith("_bucket")
            assert one.exemplar.labels == ids_of(span)
            assert one.exemplar.value == value <= float(one.labels["le"])
            assert float(one.exemplar.timestamp) == pytest.approx(record.stop, abs=1e-3)
            assert one.value == 1


def test_the_latest_task_of_a_bucket_stands_for_it(sent: tuple[Measured, Received]) -> None:
    """One a bucket, however many tasks there were; also of tasks that are told of in bulk."""
    cluster, received = sent
    keys = [f"crowd-{i}" for i in range(150)]
    cluster.client.gather(cluster.client.map(tasks.nothing, range(150), key=keys))
    wait_until(lambda: len(received.spans("crowd")) == 150)
    known = [ids_of(span) for span in received.spans("crowd")]
    port = scheduler_port(cluster.cluster)
    last = max(cluster.records.of("crowd"), key=lambda record: record.stop)

    def of_the_last() -> bool:
        shown = exemplified(port, "scheduler", "peak", "crowd")
        assert len({one.labels["le"] for one in shown}) == len(shown)
        assert all(one.exemplar.labels in known for one in shown)
        return any(abs(float(one.exemplar.timestamp) - last.stop) < 1e-3 for one in shown)

    wait_until(of_the_last)


def test_long_names_stay_out_of_it(sent: tuple[Measured, Received]) -> None:
    """Of a prefix and key of 200 characters: only the ids, far below the 128 that are allowed."""
    cluster, received = sent
    prefix = "x" * 200
    cluster.client.submit(tasks.nothing, key=(prefix, "y" * 200)).result()
    span = one_span(received, prefix)
    for port, server in (
        (worker_ports(cluster.cluster)[0], "worker"),
        (scheduler_port(cluster.cluster), "scheduler"),
    ):
        (one,) = wait_until(lambda: exemplified(port, server, "peak", prefix))  # noqa: B023
        assert one.exemplar.labels == ids_of(span)
        assert sum(len(k) + len(v) for k, v in one.exemplar.labels.items()) < 128


def test_the_page_is_ours_alone_and_whole(sent: tuple[Measured, Received]) -> None:
    """All families by prefix though ``worker-metrics`` is off; Dask's own page has none of them."""
    cluster, _ = sent
    cluster.client.submit(tasks.nothing, key="whole-1").result()
    for port, server in (
        (worker_ports(cluster.cluster)[0], "worker"),
        (scheduler_port(cluster.cluster), "scheduler"),
    ):
        found = families(port)
        assert all("memory" in name for name in found)
        assert {f"dask_{server}_task_memory_errors", f"dask_{server}_task_memory_tasks"} <= {*found}
        for _ in range(2):  # not only until the first request
            names = re.findall("^# TYPE (.*) ", page(port), re.MULTILINE)
            assert len(names) == len(set(names))
            assert f"dask_{server}_" in page(port)
            assert any("task_memory" in one for one in names) == (server == "scheduler")


def test_each_server_of_one_process_shows_its_own(measure: Callable[..., Measured]) -> None:
    """Unlike on ``/metrics``, where all of them show one registry; workers share what they have."""
    cluster = measure(processes=False, n_workers=2)
    cluster.client.submit(tasks.nothing, key="own-1").result()
    for port in worker_ports(cluster.cluster):
        assert {name.split("_")[1] for name in families(port)} == {"worker"}
    port = scheduler_port(cluster.cluster)
    assert {name.split("_")[1] for name in families(port)} == {"scheduler"}


def test_a_client_gets_what_it_accepts(sent: tuple[Measured, Received]) -> None:
    """The plain text has the same series, and no exemplars, which it has no place for."""
    cluster, _ = sent
    port = worker_ports(cluster.cluster)[0]
    cluster.client.submit(tasks.nothing, key="plain-1").result()
    wait_until(lambda: exemplified(port, "worker", "peak", "plain"))
    kind, text = read(port, "text/plain")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert "trace_id" not in text
    assert "# EOF" not in text

    def series(found: Any) -> set[tuple[Any, ...]]:
        samples = (sample for family in found for sample in family.samples)
        return {(one.name, *sorted(one.labels.items())) for one in samples}

    assert series(parsed_plain(text)) == series(families(port).values())


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        (ACCEPT, True),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;version=2.0.0;q=0.9,text/plain;q=0.5", False),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.8", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=much,text/plain", False),
        (";;,,q=", False),
    ],
)
def test_what_is_accepted(accept: str, openmetrics: bool) -> None:
    """OpenMetrics 1.0 where it is named and wanted no less than the plain text."""
    assert wants_openmetrics(accept) == openmetrics


def test_only_spans_that_are_sampled_count() -> None:
    """A trace that nobody has is nothing to point at; the others' buckets have theirs."""
    with spanned(env={"OTEL_TRACES_SAMPLER": "parentbased_always_off"}) as (cluster, received):
        cluster.client.submit(tasks.nothing, key="unsampled-1").result()
        with dask.annotate(traceparent=TRACEPARENT):
            cluster.client.submit(tasks.nothing, key="sampled-1").result()
        span = one_span(received, "sampled")
        port = scheduler_port(cluster.cluster)
        (one,) = wait_until(lambda: exemplified(port, "scheduler", "peak", "sampled"))
        assert one.exemplar.labels == ids_of(span)
        assert exemplified(port, "scheduler", "peak", "unsampled") == []


def test_only_spans_that_are_kept_count() -> None:
    """Where a filter leaves the small ones out, they are no exemplars either."""
    with spanned(config={"memusage.spans.keep.peak": "1GiB"}) as (cluster, _):
        client = cluster.client
        client.submit(tasks.nothing, key="small-1").result()
        assert client.submit(tasks.fail, 1, key="failed-1").exception() is not None
        for port, server in (
            (scheduler_port(cluster.cluster), "scheduler"),
            (worker_ports(cluster.cluster)[0], "worker"),
        ):
            wait_until(lambda: exemplified(port, server, "peak", "failed"))  # noqa: B023
            assert exemplified(port, server, "peak", "small") == []


# -- wrong and unknown ones ------------------------------------------------------------------------

GOOD = ("a", "peak", 2**20, 1.5e9, "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


def shown(agent: SchedulerAgent) -> list[Any]:
    """Return the exemplars on the scheduler's page."""
    return [
        sample.exemplar
        for family in agent.metrics.collect(own_page=True)
        for sample in family.samples
        if sample.exemplar
    ]


@pytest.mark.parametrize(
    "bad",
    [
        "ill",
        7,
        [7],
        [("a", "peak")],
        [(7, *GOOD[1:])],
        [(*GOOD[:2], -1, *GOOD[3:])],
        [(*GOOD[:3], float("nan"), *GOOD[4:])],
        [(*GOOD[:4], "x" * 32, GOOD[5])],
        [(*GOOD[:5], "b" * 200)],
        [GOOD, (*GOOD[:5], None)],
    ],
)
def test_a_bad_exemplar_takes_no_counts_with_it(bad: Any) -> None:
    """It is an error of aggregating, shown nowhere, and the batch is counted."""

    def test(agent: SchedulerAgent) -> None:
        agent.handle_batch(**batch("a"), exemplars=bad)
        assert counts(agent) == {"a": 1}
        assert agent.health.errors["aggregate"] == 1
        assert set(agent.health.dropped.values()) == {0, 2}  # the batch's own
        assert shown(agent) == []

    at_scheduler(test)


def test_exemplars_of_another_version() -> None:
    """None, more fields, histograms that we do not know; batches that bring nothing else."""

    def test(agent: SchedulerAgent) -> None:
        agent.handle_batch(**batch("a"), exemplars=[(*GOOD, "more"), ("a", "output", {})])
        assert [one.value for one in shown(agent)] == [2**20]
        agent.handle_batch(**batch("a"))
        later = {"records": 0, "prefixes": [], "health": {}}
        value = 3 * 2**19  # of another bucket, and of a label that has not been counted
        agent.handle_batch(
            **{**batch(), **later}, exemplars=[GOOD, ("b", "peak", value, *GOOD[3:])]
        )
        assert counts(agent) == {"a": 2}
        assert [one.value for one in shown(agent)] == [2**20]
        assert agent.health.errors["aggregate"] == 0

    at_scheduler(test)


def test_a_clock_that_is_ahead_holds_no_bucket_for_ever() -> None:
    """What a worker says of the future is taken as now."""
    (one,) = checked([(*GOOD[:3], 9e12, *GOOD[4:])])
    ((_, _, _, later, *_),) = checked([(*GOOD[:3], 9e12, *GOOD[4:])])
    assert 1.5e9 < one[3] <= later < 9e12


def test_a_refused_batch_brings_no_exemplars() -> None:
    """They would be of tasks that are not counted."""

    def test(agent: SchedulerAgent) -> None:
        agent.handle_batch(**batch("a"))
        agent.handle_batch(**{**batch("a"), "buckets": 3}, exemplars=[GOOD])
        assert shown(agent) == []

    at_scheduler(test)


def test_what_fails_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page tells of it itself; one that cannot be written at all is a scrape that fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("on purpose")

    async def run() -> None:
        async with Scheduler(dashboard_address="127.0.0.1:0", port=0) as scheduler:
            agent = prepare(scheduler, None)
            url = f"http://127.0.0.1:{scheduler.http_server.port}"
            fetch = AsyncHTTPClient().fetch
            with monkeypatch.context() as patch:
                patch.setattr(prometheus, "scheduler_families", fail)
                text = (await fetch(url + PATH)).body.decode()
                assert 'task_memory_errors_total{stage="render"} 1.0' in text
                assert "task_memory_tasks" not in text
            with monkeypatch.context() as patch:
                patch.setattr(openmetrics, "write", fail)
                assert (await fetch(url + PATH, raise_error=False)).code == 500
            assert agent.health.errors["render"] == 2
            assert (await fetch(url + PATH)).code == (await fetch(url + "/metrics")).code == 200

    asyncio.run(run())


# -- a real Prometheus -----------------------------------------------------------------------------


def test_prometheus_returns_them(
    sent: tuple[Measured, Received], component: Callable[[str], str], tmp_path: Path
) -> None:
    """It takes the pages of worker and scheduler, long names too, and leads to the spans."""
    cluster, received = sent
    prefix = "z" * 200
    cluster.client.submit(tasks.nothing, key="found-1").result()
    cluster.client.submit(tasks.nothing, key=(prefix, "y" * 200)).result()
    ports = [*worker_ports(cluster.cluster), scheduler_port(cluster.cluster)]
    with Prometheus(component("prometheus"), tmp_path / "prometheus", ports, PATH) as server:
        for name in ("found", prefix):
            labels = ids_of(one_span(received, name))
            for of in ("worker", "scheduler"):
                series = f'dask_{of}_task_memory_peak_bytes_bucket{{task_prefix_name="{name}"}}'
                (one,) = wait_until(lambda: server.exemplars(series))  # noqa: B023
                assert one["labels"] == labels
                (record,) = cluster.records.of(name)
                assert float(one["value"]) == record.peak_bytes
                assert float(one["timestamp"]) == pytest.approx(record.stop, abs=2e-3)
        # A scrape of a busy machine may take longer than it may.
        wait_until(lambda: server.query("up") == [1, 1], what="both pages to be taken")
        assert server.query('{__name__=~"dask_worker_threads|dask_scheduler_workers"}') == []


def test_spans_off_send_nothing_more() -> None:
    """A batch is what it was, and the page has no exemplars."""
    with spanned(config={"memusage.spans.enabled": False}) as (cluster, _):
        agent = cluster.cluster.scheduler.extensions["memusage"]
        messages: list[dict[str, Any]] = []

        def handle(**message: Any) -> None:
            messages.append(message)
            agent.handle_batch(**message)

        cluster.cluster.scheduler.stream_handlers["memusage-batch"] = handle
        cluster.client.submit(tasks.nothing, key="off-1").result()
        wait_until(lambda: messages)
        assert not [message for message in messages if "exemplars" in message]
        assert "trace_id" not in read(worker_ports(cluster.cluster)[0])[1]
