"""A task's current span is made where somebody asks for it, and nobody can tell that it waited."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import dask
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler, TraceIdRatioBased
from opentelemetry.trace import get_current_span, set_span_in_context

from dask_memusage_exporter import providers
from dask_memusage_exporter.aggregate import Aggregate
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.keep import note_parent
from dask_memusage_exporter.spans import Spans
from dask_memusage_exporter.task_span import TaskSpan
from tests import tasks, tasks_spans
from tests.conftest import Measured, cluster_total
from tests.receivers import Received
from tests.test_aggregate import record
from tests.test_otel_spans import TRACEPARENT, one_span, spanned


@pytest.fixture(scope="module")
def sent() -> Iterator[tuple[Measured, Received]]:
    """A cluster whose spans go to a receiver, by a provider of ours."""
    with spanned() as both:
        yield both


def test_what_a_task_says_on_its_span_is_on_it(sent: tuple[Measured, Received]) -> None:
    """Attributes, events, a name, beside what was measured; its ids and times are the task's."""
    cluster, received = sent
    with dask.annotate(traceparent=TRACEPARENT):
        own = cluster.client.submit(tasks_spans.tells_its_span, key="telling-1").result()
    one = one_span(received, "told")
    assert own == one.data.span_id.hex()
    assert one.data.parent_span_id.hex() == TRACEPARENT.split("-")[2]
    assert one.attributes["rows"] == 7
    assert one.attributes["dask.task.key"] == "telling-1"
    (event,) = one.data.events
    assert one.data.start_time_unix_nano < event.time_unix_nano < one.data.end_time_unix_nano
    assert 0 <= cluster.records.of("telling")[0].start - one.data.start_time_unix_nano / 1e9 < 0.05


def test_a_task_may_end_its_span(sent: tuple[Measured, Received]) -> None:
    """It is as the task has left it; nothing of it is lost or wrong."""
    cluster, received = sent
    cluster.client.submit(tasks_spans.ends_its_span, key="ending-1").result()
    cluster.client.submit(tasks.nothing, key="after-1").result()
    one_span(received, "after")
    assert "dask.task.key" not in one_span(received, "ending").attributes
    for name in ("dropped_records", "errors"):
        assert cluster_total(cluster.cluster, f"dask_worker_task_memory_{name}_total") == 0


def test_a_forked_child_has_its_parents_span(sent: tuple[Measured, Received]) -> None:
    """The same ids, though its parent asks later than it does."""
    cluster, received = sent
    in_child, here = cluster.client.submit(tasks_spans.current_in_fork, key="forking-1").result()
    assert in_child == here == one_span(received, "forking").data.span_id.hex()


# -- without a cluster -----------------------------------------------------------------------------


class Heard(SpanProcessor):
    """Notes spans, and on which threads they were made."""

    def __init__(self) -> None:
        self.made_by: list[int] = []
        self.ended: list[Any] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.made_by.append(threading.get_ident())

    def on_end(self, span: Any) -> None:
        self.ended.append(span)


class Here:
    """Spans of tasks that run on the test's own thread."""

    def __init__(
        self, sampler: Sampler, most: int, wrap: Callable[[Any], Any] | None, keep: dict[str, Any]
    ) -> None:
        self.heard, self.health = Heard(), Health()
        self.provider: Any = TracerProvider(sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(self.heard)
        if wrap is not None:
            self.provider = wrap(self.provider)
        with dask.config.set({f"memusage.spans.keep.{name}": it for name, it in keep.items()}):
            settings = Settings.load()
        self.spans = Spans(
            self.provider,
            guest=wrap is not None,
            settings=settings,
            aggregate=Aggregate(bounds=(10,), max_prefixes=9, maximum_window=600),
            health=self.health,
        )
        self.spans._most = most

    def run(self, task: Callable[[], Any] = lambda: None, peak: int = 1) -> TaskSpan:
        """Run a task and end its span with a peak, in bytes."""
        one = self.spans.start("key-1", "key", SimpleNamespace(annotations=None), "worker")
        assert one is not None
        self.spans.enter(one)
        task()
        one.leave()
        one.finish(record("key", peak=peak))
        return one

    def end(self) -> Heard:
        """Return what has been heard once all spans have ended."""
        self.spans.close()
        return self.heard


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Here]]:
    """Returns what makes spans of tasks here, by a sampler and settings of ``spans.keep``, or as a
    guest of an application's provider, which wraps the SDK's."""
    monkeypatch.delenv("OTEL_TRACES_SAMPLER", raising=False)
    made: list[Here] = []

    def make(sampler: Sampler = ALWAYS_ON, most: int = 2048, wrap: Any = None, **keep: Any) -> Here:
        made.append(Here(sampler, most, wrap, keep))
        return made[-1]

    yield make
    for one in made:
        one.spans.close()


def test_the_sdks_span_is_made_where_somebody_asks(here: Callable[..., Here]) -> None:
    """On the task's thread where the task does, else on one of ours, and once in any case."""
    one = here()
    one.run()
    one.run(get_current_span)
    heard = one.end()
    assert len(heard.made_by) == len(heard.ended) == 2
    assert heard.made_by.count(threading.get_ident()) == 1
    first, second = (span.start_time for span in heard.ended)
    assert first < second


@pytest.mark.ends
def test_whoever_has_a_tasks_context_has_its_span(here: Callable[..., Here]) -> None:
    """Other threads at once, contexts that were made of it, and what asks when the task is over."""
    one, seen = here(), []

    def task() -> None:
        current = context.get_current()
        seen.append(current)
        with ThreadPoolExecutor(4) as pool:
            seen.extend(pool.map(lambda _: get_current_span(current), range(8)))
        more = baggage.set_baggage("shop", "7", current)
        seen.extend([get_current_span(more), get_current_span()])
        seen.append(get_current_span(set_span_in_context(get_current_span(), Context())))

    one.run(task)
    one.run(lambda: seen.append(context.get_current()))
    heard = one.end()
    first, *spans, second = seen
    assert len({id(span) for span in (*spans, get_current_span(first))}) == 1
    assert [spans[0].get_span_context().span_id, get_current_span(second).context.span_id] == [
        span.context.span_id for span in heard.ended
    ]
    assert not get_current_span().get_span_context().is_valid


def test_a_tasks_context_is_not_an_empty_one(here: Callable[..., Here]) -> None:
    """Much code asks for ``context or get_current()``: the SDK's metrics do, of what they are given
    on another thread, and their exemplars name the task's span."""
    one, reader = here(), InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    counter = meters.get_meter("shop").create_counter("rows")

    def task() -> None:
        current = context.get_current()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(counter.add, 7, context=current).result()

    one.run(task)
    data: Any = reader.get_metrics_data()
    (point,) = data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
    assert [exemplar.span_id for exemplar in point.exemplars] == [
        span.context.span_id for span in one.end().ended
    ]
    meters.shutdown()


def test_a_child_that_is_forked_elsewhere_makes_none(
    here: Callable[..., Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be another one than its parent's, sent by nobody; and who was making one when it was
    forked would never have done so there."""
    one, left = here(), []

    def in_child() -> None:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with ThreadPoolExecutor(1) as pool, one.spans._making:
            left.append(pool.submit(get_current_span, context.get_current()).result(10))
        monkeypatch.undo()

    one.run(in_child)
    assert not left[0].get_span_context().is_valid
    assert len(one.end().ended) == 1


def test_what_is_not_kept_is_not_made(here: Callable[..., Here]) -> None:
    """Unless the task asks, and with a child it stays."""
    one = here(peak="1MiB")
    for _ in range(3):
        one.run()
    one.run(peak=2 * 2**20)
    one.run(get_current_span)
    one.run(lambda: note_parent(get_current_span().get_span_context()))
    late: list[Context] = []
    one.run(lambda: late.append(context.get_current()))
    heard = one.end()
    assert len(heard.made_by) == 3
    assert len(heard.ended) == 2
    assert get_current_span(late[0]).is_recording()  # though nobody will have it
    assert one.spans._watch is not None
    assert not one.spans._watch.open


def test_an_application_whose_provider_has_the_sdks_behind_it(here: Callable[..., Here]) -> None:
    """As Logfire's and Snowflake's: it is theirs and not the API's stand-in, it need have no hash,
    and what is left out of its spans does not reach what is behind it."""
    assert providers.reaches(ProxyTracerProvider(TracerProvider()))
    assert not providers.reaches(trace.ProxyTracerProvider())
    one = here(wrap=ProxyTracerProvider, peak="1MiB")
    one.run()
    one.run(peak=2 * 2**20)
    one.run(lambda: note_parent(get_current_span().get_span_context()))
    heard = one.end()
    assert [span.attributes["dask.task.memory.peak"] for span in heard.ended] == [2 * 2**20, 1]
    assert len(heard.made_by) == 3
    assert not one.health.errors["export"]


@dataclass
class ProxyTracerProvider(trace.TracerProvider):
    """An application's own, which only passes on."""

    behind: TracerProvider

    def get_tracer(self, *arguments: Any, **options: Any) -> Any:
        return ProxyTracer(self.behind.get_tracer(*arguments, **options))

    def add_span_processor(self, processor: Any) -> None:
        self.behind.add_span_processor(processor)


@dataclass
class ProxyTracer:
    behind: Any

    def start_span(self, *arguments: Any) -> Any:
        return ProxySpan(self.behind.start_span(*arguments))


@trace.Span.register
@dataclass
class ProxySpan:
    behind: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)


def test_a_share_of_spans_is_sampled(here: Callable[..., Here]) -> None:
    """What the task sees of that is what is sent, whether it looks or not."""
    one, seen = here(TraceIdRatioBased(0.5)), []

    def task() -> None:
        current = get_current_span()
        own = current.get_span_context()
        assert own.is_valid
        assert current.is_recording() == own.trace_flags.sampled
        if own.trace_flags.sampled:
            seen.append(own.span_id)

    for _ in range(100):
        one.run(task)
    for _ in range(100):
        one.run()
    sent = [span.context.span_id for span in one.end().ended]
    assert sent[: len(seen)] == seen
    assert 0 < len(seen) < 100
    assert 0 < len(sent) - len(seen) < 100


def test_what_is_not_sampled_is_neither_lost_nor_large(here: Callable[..., Here]) -> None:
    """Where none can wait nothing counts; it takes no place among the largest."""
    one = here(ALWAYS_OFF, most=0)
    one.run()
    assert one.health.dropped["span_export"] == 0
    other = here(most=0)
    other.run()
    assert other.health.dropped["span_export"] == 1

    class First(Sampler):
        def should_sample(self, *arguments: Any, **options: Any) -> Any:
            decide = ALWAYS_ON if decided else ALWAYS_OFF
            decided.append(decide)
            return decide.should_sample(*arguments, **options)

        def get_description(self) -> str:
            return "all but the first"

    decided: list[Sampler] = []
    third = here(First(), largest=1)
    third.run(peak=100 * 2**20)
    third.run(peak=50 * 2**20)
    assert [span.attributes["dask.task.memory.peak"] for span in third.end().ended] == [50 * 2**20]


def test_an_sdk_that_fails_does_not_fail_a_task(
    here: Callable[..., Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task has no span then, and the error counts."""
    one = here()

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(one.spans._starter._tracer, "start_span", fail)
    one.run(lambda: get_current_span().set_attribute("rows", 7))
    one.run()
    one.end()
    assert one.health.errors["export"] == 2
    assert one.health.dropped["span_export"] == 0


def test_what_the_sdk_does_meanwhile_may_ask_for_the_span(
    here: Callable[..., Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what it logs does, and its own metrics: they are in no span, and nobody hangs."""
    one, seen = here(), []
    start = one.spans._starter._tracer.start_span

    def asks(*arguments: Any) -> Any:
        seen.append(get_current_span().get_span_context().is_valid)
        return start(*arguments)

    monkeypatch.setattr(one.spans._starter._tracer, "start_span", asks)
    one.run(lambda: seen.append(get_current_span().get_span_context().is_valid))
    assert seen == [False, True]


@pytest.mark.timeout(30)
def test_a_finalizer_may_ask_for_anothers_span(
    here: Callable[..., Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs wherever the garbage collector does: also where a span is just being made."""
    one, seen = here(), []
    other = one.spans.start("key-2", "key", None, "worker")
    assert other is not None
    start = one.spans._starter._tracer.start_span

    def collects(*arguments: Any) -> Any:
        if not seen:
            seen.append(None)
            seen.append(other.span())
        return start(*arguments)

    monkeypatch.setattr(one.spans._starter._tracer, "start_span", collects)
    one.run(lambda: seen.append(get_current_span()))
    _, anothers, own = seen
    assert anothers is other.span()
    assert anothers.get_span_context().is_valid
    assert own.get_span_context().is_valid
    assert own is not anothers


def test_a_context_that_is_left_somewhere_holds_no_exception(here: Callable[..., Here]) -> None:
    """A task may have handed it on, to what lives for days."""
    one, left = here(peak="1TiB"), []
    ended = one.run(lambda: left.append(context.get_current()))
    failing = one.spans.start("key-2", "key", None, "worker")
    assert failing is not None
    failing.fail(ValueError("on purpose"))
    failing.finish(record("key"))
    (told,) = one.end().ended
    assert told.attributes["error.type"] == "ValueError"
    assert ended.failure is failing.failure is None
    lost = here(most=0)
    failing = lost.spans.start("key-2", "key", None, "worker")
    assert failing is not None
    failing.fail(ValueError("on purpose"))
    failing.finish(record("key"))
    assert failing.failure is None
