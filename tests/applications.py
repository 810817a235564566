"""What an application does of its own with OpenTelemetry, in any process: providers, processors."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


def opentelemetry_modules() -> list[str]:
    """Return what is loaded of OpenTelemetry."""
    return sorted(name for name in sys.modules if name.startswith("opentelemetry"))


def set_own_providers(endpoint: str) -> None:
    """What an application does that exports itself."""
    from opentelemetry import metrics
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    exporter = OTLPMetricExporter(endpoint=f"{endpoint}/v1/metrics")
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=300)
    about = {"service.name": "application", "service.instance.id": str(os.getpid())}
    resource = Resource.create(about)
    metrics.set_meter_provider(MeterProvider([reader], resource=resource))


def add_own(dask_worker: Any) -> bool:
    """Use the application's provider once more; return whether it still takes anything."""
    from opentelemetry import metrics

    provider = metrics.get_meter_provider()
    provider.get_meter("application").create_counter("own").add(1)
    return not provider._shutdown


class Heard:
    """A span processor of an application's that keeps books on starts and ends."""

    def __init__(self) -> None:
        self.open: dict[int, str] = {}
        #: Of those that have ended, whether they are sampled and the peak that they tell.
        self.ended: list[tuple[str, bool, Any]] = []

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.open[span.context.span_id] = span.name

    def _on_ending(self, span: Any) -> None:
        pass

    def on_end(self, span: Any) -> None:
        del self.open[span.context.span_id]
        peak = span.attributes.get("dask.task.memory.peak")
        self.ended.append((span.name, span.context.trace_flags.sampled, peak))

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


HEARD = Heard()


def hear() -> None:
    """Add it to the provider that is set."""
    from opentelemetry import trace

    trace.get_tracer_provider().add_span_processor(HEARD)


def heard() -> tuple[list[str], list[tuple[str, bool, Any]]]:
    return list(HEARD.open.values()), list(HEARD.ended)


def set_foreign_tracer() -> None:
    """Set a TracerProvider that is not the SDK's and has nothing but what the API asks for."""
    from opentelemetry import trace

    class Foreign(trace.Span):
        __slots__ = ("about",)

        def __init__(self, about: dict[str, Any]) -> None:
            self.about = about
            FOREIGN.append(about)

        def get_span_context(self) -> Any:
            return trace.SpanContext(7, id(self), False)

        def set_attributes(self, attributes: Any) -> None:
            self.about.update(attributes)

        def set_attribute(self, key: str, value: Any) -> None:
            self.about[key] = value

        def end(self, end_time: Any = None) -> None:
            self.about["ended"] = True

        def is_recording(self) -> bool:
            return True

        def add_event(self, *_: Any, **__: Any) -> None:
            self.about["event"] = True

        def update_name(self, name: str) -> None:
            pass

        def set_status(self, *_: Any, **__: Any) -> None:
            pass

        def record_exception(self, *_: Any, **__: Any) -> None:
            pass

    class Tracer(trace.Tracer):
        def start_span(self, name: str, *_: Any, **__: Any) -> Any:
            return Foreign({"name": name})

        def start_as_current_span(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    class Provider(trace.TracerProvider):
        __slots__ = ()
        __hash__ = None

        def get_tracer(self, *_: Any, **__: Any) -> Any:
            return Tracer()

    trace.set_tracer_provider(Provider())


#: What such spans have been told.
FOREIGN: list[dict[str, Any]] = []


def foreign() -> list[dict[str, Any]]:
    return FOREIGN


def set_empty_logger() -> None:
    """Set a LoggerProvider without processors, as OTEL_LOGS_EXPORTER=none does."""
    from opentelemetry import _logs
    from opentelemetry.sdk._logs import LoggerProvider

    _logs.set_logger_provider(LoggerProvider())


def set_own_tracer(endpoint: str, delay: float = 0.0, log: bool = False) -> None:
    """Set a TracerProvider as an application does; its processor may hold up who ends a span."""
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

    class Slow(SpanExporter):
        def export(self, spans: Any) -> Any:
            time.sleep(delay)

        def shutdown(self) -> None:
            pass

    provider = TracerProvider(resource=Resource.create({"service.name": "application"}))
    if delay:
        provider.add_span_processor(SimpleSpanProcessor(Slow()))
    trace.set_tracer_provider(provider)
    add_processor(endpoint)
    if log:
        set_own_logger()


def add_processor(endpoint: str) -> None:
    """Have the provider that is set send its spans."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=100)
    trace.get_tracer_provider().add_span_processor(processor)


#: Log records that an application's own LoggerProvider has been given: name and attributes.
LOGGED: list[tuple[str, dict[str, Any], int]] = []


def set_own_logger() -> None:
    """Set a LoggerProvider as an application does."""
    from opentelemetry import _logs
    from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor

    class Keeping(LogRecordProcessor):
        def on_emit(self, log_record: Any) -> None:
            record = log_record.log_record
            LOGGED.append((record.event_name, dict(record.attributes), record.span_id))

        emit = on_emit  # its name in older SDKs

        def shutdown(self) -> None:
            pass

        def force_flush(self, timeout_millis: int = 0) -> bool:
            return True

    provider = LoggerProvider()
    provider.add_log_record_processor(Keeping())
    _logs.set_logger_provider(provider)


def logged() -> list[tuple[str, dict[str, Any], int]]:
    return LOGGED
