"""One trace a computation: what a client submits belongs to the span that is current there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import distributed
import pandas
import pytest
from distributed import span as imported_before
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dask_memusage_exporter import submission, traced
from dask_memusage_exporter.instrumentor import PRELOAD, DaskMemusageInstrumentor
from tests import tasks, tasks_spans
from tests.conftest import Measured, wait_until
from tests.receivers import Received, receiver, variables
from tests.servers import Servers
from tests.test_environments import ENVIRONMENTS
from tests.test_otel_failures import BUSY, PROMISED, closed_in
from tests.test_otel_spans import one_span, spanned


@pytest.fixture(scope="module")
def sent() -> Iterator[tuple[Measured, Received]]:
    """A cluster of two workers whose spans go to a receiver."""
    with spanned(n_workers=2) as both:
        yield both


class Application:
    """A client's own traces, kept where a test finds them."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("application")

    def ids(self) -> dict[str, tuple[str, str]]:
        """Return trace and span id of what has ended, in hexadecimal, by name."""
        return {
            span.name: (f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}")
            for span in self.exporter.get_finished_spans()
        }


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Application:
    """An application whose provider is the one in use here, for as long as a test runs."""
    own = Application()
    # The API takes a global provider once a process.
    monkeypatch.setattr(submission, "_tracer", lambda: own.tracer)
    return own


@pytest.fixture
def instrumented() -> Iterator[None]:
    """A client's process under `opentelemetry-instrument`."""
    instrumentor = DaskMemusageInstrumentor()
    instrumentor.instrument()
    yield
    instrumentor.uninstrument()
    assert distributed.Client._graph_to_futures.__qualname__ == "Client._graph_to_futures"
    assert not hasattr(distributed.Client._graph_to_futures, "__wrapped__")


@pytest.mark.parametrize("before", ["other", ["other"], None])
def test_preloads_stay_as_they_are_configured(before: Any) -> None:
    """One that is a string, as a variable gives it, is one preload."""
    key = "distributed.worker.preload"
    with dask.config.set({key: before}):
        instrumentor = DaskMemusageInstrumentor()
        instrumentor.instrument()
        others = ["other"] if before else []
        configured = dask.config.get(key)
        instrumentor.uninstrument()
        assert configured == [*others, PRELOAD]
        assert dask.config.get(key) == others
    with dask.config.set({key: ["dask_memusage_exporter"]}):
        instrumentor.instrument()
        configured = dask.config.get(key)
        instrumentor.uninstrument()
        assert configured == ["dask_memusage_exporter"]


@pytest.mark.ends
def test_tasks_are_children_of_the_current_span(
    sent: tuple[Measured, Received], application: Application, instrumented: None
) -> None:
    """Submitted futures and computed collections, optimized and fused, on all workers alike."""
    cluster, received = sent
    with application.tracer.start_as_current_span("nightly"):
        cluster.client.submit(tasks.nothing, key="submitted-1").result()
        array = da.ones((40, 40), chunks=(10, 10))
        ((array + 1) * 2).sum().compute(scheduler=cluster.client)
    cluster.client.submit(tasks.nothing, key="alone-1").result()
    trace, parent = application.ids()["nightly"]
    alone = one_span(received, "alone")
    assert not alone.data.parent_span_id
    computed = wait_until(lambda: len(cluster.records) - 1 == len(
        [s for s in received.spans() if s.data.trace_id.hex() == trace]
    ) and received.spans())  # fmt: skip
    assert len(computed) > 17
    for one in computed:
        if one.name != "alone":
            assert (one.data.trace_id.hex(), one.data.parent_span_id.hex()) == (trace, parent)


def test_dasks_own_spans_are_real_ones(
    sent: tuple[Measured, Received], application: Application, instrumented: None
) -> None:
    """With their names, one in the other, and the tasks below the innermost."""
    cluster, received = sent
    with distributed.span("etl", "load") as span_id:
        cluster.client.submit(tasks.nothing, key="loaded-1").result()
    loaded = one_span(received, "loaded")
    ids = application.ids()
    assert loaded.data.parent_span_id.hex() == ids["load"][1]
    assert loaded.attributes["dask.span.id"] == span_id
    by_name = {span.name: span for span in application.exporter.get_finished_spans()}
    assert by_name["load"].parent.span_id == by_name["etl"].context.span_id
    assert by_name["load"].attributes["dask.span.id"] == span_id
    with pytest.raises(ValueError, match="at least one span tag"), distributed.span():
        pass


def test_fused_tasks_are_children_too(
    sent: tuple[Measured, Received], application: Application
) -> None:
    """Of a DataFrame and an array, whose chains of operations are one task a partition or chunk."""
    cluster, received = sent
    table = pandas.DataFrame({"a": range(100), "b": range(100)})
    frame = dd.from_pandas(table, npartitions=5, sort=False)
    with dask.annotate(retries=2):  # fusion loses what the graph itself is annotated with
        array = da.ones((40, 40), chunks=(10, 40)) + 1
    with traced("nightly"), dask.config.set({"optimization.fuse.active": True}):
        fused = ((frame.a + 1) * 2).to_frame().optimize(fuse=True)
        length = len(fused.compute(scheduler=cluster.client))
        total = (array * 2).sum().compute(scheduler=cluster.client)
    assert (length, total) == (100, 40 * 40 * 4)
    trace, parent = application.ids()["nightly"]
    wait_until(lambda: len(received.spans()) == len(cluster.records))
    spans = [one for one in received.spans() if one.data.trace_id.hex() == trace]
    assert {one.data.parent_span_id.hex() for one in spans} == {parent}
    names = [one.name for one in spans]
    assert not {"add", "mul", "ones_like"} & set(names)
    assert len([name for name in names if "add" in name and "mul" in name]) == 5
    assert names.count("sum") == 4
    submission.unwrap()


def test_annotations_of_a_graphs_own_layers_stay(
    sent: tuple[Measured, Received], application: Application, instrumented: None
) -> None:
    """A layer's own, such as retries, beside the parent that all of them get."""
    cluster, received = sent
    with dask.annotate(retries=2, tag="mine"):
        first = dask.delayed(tasks_spans.annotations)(dask_key_name="layered-1")
    second = dask.delayed(tasks_spans.annotations)(first, dask_key_name="layered-2")
    with application.tracer.start_as_current_span("graph"):
        # In one graph: of two, the second may have to run the first task once more.
        future, own = cluster.client.compute([second, first])
    assert own.result().items() >= {"retries": 2, "tag": "mine"}.items()
    assert "tag" not in future.result()
    one_span(received, "layered", 2)
    ids = application.ids()["graph"]
    for one in received.spans("layered"):
        assert (one.data.trace_id.hex(), one.data.parent_span_id.hex()) == ids


def test_by_hand(sent: tuple[Measured, Received], application: Application) -> None:
    """`traced` does it for a block, with a span of its own or an application's."""
    cluster, received = sent
    with traced("named"):
        cluster.client.submit(tasks.nothing, key="inside-1").result()
        with application.tracer.start_as_current_span("inner"):
            cluster.client.submit(tasks.nothing, key="deeper-1").result()
        actor = cluster.client.submit(tasks_spans.Spanned, actor=True, key="called-1").result()
        actor.current().result()
    with application.tracer.start_as_current_span("unrelated"):
        cluster.client.submit(tasks.nothing, key="outside-1").result()
    ids = application.ids()
    assert one_span(received, "inside").data.parent_span_id.hex() == ids["named"][1]
    assert one_span(received, "deeper").data.parent_span_id.hex() == ids["inner"][1]
    assert not one_span(received, "outside").data.parent_span_id
    # To make an actor is a task; its calls are not submitted, and each is a trace of its own.
    assert one_span(received, "called").data.parent_span_id.hex() == ids["named"][1]
    assert not one_span(received, "called.current").data.parent_span_id
    submission.unwrap()


def test_by_hand_dasks_own_spans_are_real_ones_too(
    sent: tuple[Measured, Received], application: Application
) -> None:
    """In the block, by whatever name ``span`` was imported before; outside of it they are not."""
    cluster, received = sent
    with traced("nightly"), imported_before("etl", "load"):
        cluster.client.submit(tasks.nothing, key="byhand-1").result()
    with imported_before("outside"):
        cluster.client.submit(tasks.nothing, key="untraced-1").result()
    one, ids = one_span(received, "byhand"), application.ids()
    assert (one.data.trace_id.hex(), one.data.parent_span_id.hex()) == ids["load"]
    by_name = {span.name: span for span in application.exporter.get_finished_spans()}
    assert by_name["load"].parent.span_id == by_name["etl"].context.span_id
    assert by_name["etl"].parent.span_id == by_name["nightly"].context.span_id
    assert not one_span(received, "untraced").data.parent_span_id
    assert "outside" not in ids
    submission.unwrap()
    with traced("again"), pytest.raises(ValueError, match="at least one span tag"):
        imported_before().__enter__()
    submission.unwrap()


def test_links_where_a_trace_would_be_endless(
    sent: tuple[Measured, Received], application: Application
) -> None:
    """Each task has a trace of its own that leads to the span that was current."""
    cluster, received = sent
    with application.tracer.start_as_current_span("service"), traced(link=True):
        futures = cluster.client.map(tasks.nothing, range(2), key=["linked-0", "linked-1"])
        cluster.client.gather(futures)
    with dask.annotate(**{submission.LINK: "00-nonsense"}):
        cluster.client.submit(tasks.nothing, key="lost-1").result()
    spans = wait_until(lambda: len(received.spans("linked")) == 2 and received.spans("linked"))
    service = application.ids()["service"]
    assert len({service[0], *(one.data.trace_id.hex() for one in spans)}) == 3
    for one in spans:
        assert not one.data.parent_span_id
        (link,) = one.data.links
        assert (link.trace_id.hex(), link.span_id.hex()) == service
    assert not one_span(received, "lost").data.links
    submission.unwrap()


def test_workers_of_an_instrumented_process_measure(instrumented: None) -> None:
    """The preload is configured beside those that are."""
    assert PRELOAD in dask.config.get("distributed.worker.preload")


def test_a_host_without_the_package_joins(tmp_path: Path) -> None:
    """The instrumented client's configuration travels to hosts; one has no such package there."""
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "sitecustomize.py").write_text(ENVIRONMENTS["absent"][0])
    # As an SSHCluster has it on its commands' lines.
    travels = dask.config.serialize({"distributed": {"worker": {"preload": [PRELOAD]}}})
    servers = Servers(tmp_path)
    try:
        servers.scheduler()
        inherited = {"DASK_INTERNAL_INHERIT_CONFIG": travels}
        bare = servers.worker("--no-nanny", env={**inherited, "PYTHONPATH": str(absent)})
        with_nanny = servers.worker(env=inherited)
        servers.client.wait_for_workers(2, timeout=30)
        futures = servers.client.map(abs, range(10), pure=False)
        assert len(servers.client.gather(futures)) == 10
        (line,) = bare.lines("are not measured (ModuleNotFoundError")
        assert "Mend: install dask-memusage-exporter" in line
        assert "Traceback" not in bare.log
        assert len(with_nanny.lines("dask-memusage 0")) == 1
    finally:
        servers.close()


#: What a distribution of OpenTelemetry's has: it sets the SDK up by the variables.
CONFIGURATOR = """
from opentelemetry.sdk._configuration import _OTelSDKConfigurator

class Configurator(_OTelSDKConfigurator):
    pass
"""

ENTRY_POINTS = """
[opentelemetry_configurator]
configurator = a_distribution:Configurator

[opentelemetry_instrumentor]
dask-memusage = dask_memusage_exporter.instrumentor:DaskMemusageInstrumentor
"""

INSTRUMENT = "from opentelemetry.instrumentation.auto_instrumentation import run; run()"


@pytest.mark.parametrize("nanny", ["--no-nanny", "--nanny"])
def test_a_worker_under_opentelemetry_instrument(nanny: str, tmp_path: Path) -> None:
    """No preload, no plugin: it measures, and each task has one span. Where the worker's process is
    instrumented, which one under a nanny is by newer releases, that is by the provider there."""
    distribution = tmp_path / "distribution"
    about = distribution / "a_distribution-1.dist-info"
    about.mkdir(parents=True)
    (distribution / "a_distribution.py").write_text(CONFIGURATOR)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a-distribution\nVersion: 1\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    paths = [str(distribution), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    servers = Servers(tmp_path)
    try:
        with receiver() as received:
            env = variables(
                received.endpoint,
                PYTHONPATH=os.pathsep.join(path for path in paths if path),
                OTEL_SERVICE_NAME="under",
                OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
                OTEL_TRACES_EXPORTER="otlp",
                OTEL_METRICS_EXPORTER="otlp",
                OTEL_EXPORTER_OTLP_TIMEOUT="1",
            )
            servers.scheduler()
            under = (sys.executable, "-c", INSTRUMENT)
            worker = servers.worker(nanny, env=env, under=under)
            servers.client.wait_for_workers(1, timeout=30)
            (instrumented,) = servers.client.run(is_instrumented).values()
            assert instrumented or nanny == "--nanny"
            servers.client.submit(tasks_spans.starts_child, "library", key="under-1").result()
            parent = one_span(received, "under")
            if instrumented:
                child = one_span(received, "library")
                assert child.data.parent_span_id == parent.data.span_id
            peak = "dask.worker.task.memory.peak"
            wait_until(lambda: received.total(peak, "under") == 1)
            assert {point.resource["service.name"] for point in received.points()} == {"under"}
            # Its end, with last figures for a receiver that answers no longer, is in time.
            received.answers.clear()
            servers.client.submit(tasks.nothing, key="last-1").result()
            # Without a nanny SIGTERM cancels what the worker's stream writes at that moment, and
            # then distributed waits 30 s for the stream's end; once it answers, nothing is written.
            servers.client.run(is_instrumented)
            assert worker.stop() == 0
            assert not worker.lines("still alive")
            (took,) = closed_in(worker.log)
            assert took < PROMISED + BUSY
            # An older SDK itself tells of a receiver that does not answer by a traceback.
            assert not re.findall('File ".*/(?:dask_memusage_exporter|distributed)/.*', worker.log)
            assert "verriding" not in worker.log
    finally:
        servers.close()


def is_instrumented() -> bool:
    """Return whether a provider of the SDK's has been set in this process."""
    from opentelemetry import trace

    return isinstance(trace.get_tracer_provider(), TracerProvider)
