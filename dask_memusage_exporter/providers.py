"""OpenTelemetry's providers: an application's own where it has set them, else ours from ``OTEL_*``.

The SDK is imported where one of the two is the case and nowhere else: a plain worker neither loads
it nor talks to anybody. Ours are built only where a variable names an exporter or an OTLP endpoint.

They are never made the process's global ones. That can be done once only, and an application that
sets its own after us would be refused; as it is it is followed, whenever it comes.

Covers: which exporters, what identifies us, what is lost on the way, an end within a deadline.
Does not cover: what the SDK reads itself (endpoints, headers, temporality, samplers, queues).
"""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask_memusage_exporter.health import Health

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

#: The two signals, as variables and entry points spell them, and the API's module of each.
_API = {"traces": "opentelemetry.trace", "metrics": "opentelemetry.metrics"}
#: By which the API itself loads a global provider.
_PROVIDER = {"traces": "OTEL_PYTHON_TRACER_PROVIDER", "metrics": "OTEL_PYTHON_METER_PROVIDER"}

_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
#: What the specification says; the SDK's own configurator takes gRPC.
_DEFAULT_PROTOCOL = "http/protobuf"

#: The specification's ``OTEL_BSP_MAX_QUEUE_SIZE``.
_QUEUE_SIZE = 2048

#: What is behind a provider of the SDK's, of spans, of metrics and of logs; none is public.
_BEHIND = (
    ("_active_span_processor", "_span_processors"),
    ("_measurement_consumer", "_reader_storages"),
    ("_multi_log_record_processor", "_log_record_processors"),
)

#: Tells a process from all others.
INSTANCE = "service.instance.id"

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ProviderError(Exception):
    """The variables ask for what cannot be had; the message says how to mend it."""


def application(signal: str) -> Any | None:
    """Return the provider that the application has set for ``traces`` or ``metrics``, or None."""
    if _API[signal] not in sys.modules and not os.environ.get(_PROVIDER[signal]):
        return None  # whoever sets one has imported this
    provider: Any
    if signal == "traces":
        from opentelemetry.trace import get_tracer_provider

        provider = get_tracer_provider()
    else:
        from opentelemetry.metrics import get_meter_provider

        provider = get_meter_provider()
    return provider if reaches(provider) else None


def reaches(provider: Any) -> bool:
    """Return whether what a global provider is given can reach anybody.

    Not the API's stand-in until somebody sets one, and not one of the SDK's that has neither
    processor nor reader, as ``OTEL_PYTHON_TRACER_PROVIDER`` alone sets it: who wants to send adds
    some, and may do so later. Others than the SDK's cannot be asked.
    """
    kind = type(provider)  # that of metrics has no public name, and others' are proxies, too
    if "Proxy" in kind.__name__ and kind.__module__.partition(".")[0] == "opentelemetry":
        return False
    for path in _BEHIND:
        behind = provider
        for name in path:
            behind = getattr(behind, name, None)
        if behind is not None:
            return bool(behind)
    return True


def wanted(signal: str) -> list[str]:
    """Return the exporters that the environment asks for, as ``OTEL_..._EXPORTER`` names them."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    named = os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "")
    if named.strip():
        names = [name.strip() for name in named.split(",")]
        return [name for name in names if name.lower() not in ("", "none")]
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    return ["otlp"] if any(os.environ.get(name, "").strip() for name in endpoints) else []


class Outlet:
    """Stands before an exporter's ``export``: counts what is lost there, and ends when told.

    Parameters
    ----------
    exporter
        Its ``export`` is replaced.
    reason
        What counts as dropped, by :data:`health.DROP_REASONS`; None: nothing does, its next export
        brings what this one has not.
    """

    def __init__(self, exporter: Any, health: Health, reason: str | None) -> None:
        self._export, exporter.export = exporter.export, self
        self._health, self._reason = health, reason
        # A forked child inherits the pipeline, and the SDK starts its threads there anew.
        self._pid = os.getpid()
        self._lock = threading.Lock()
        #: What has been handed over and waits, and what is being sent.
        self._waiting = self._flying = 0
        self._closed = False

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Export, in the exporter's place."""
        if self._closed or os.getpid() != self._pid:
            return None
        count = 0 if self._reason is None else len(batch)
        with self._lock:
            self._waiting -= count
            self._flying += count
        error: Exception | None = None
        result = None
        try:
            result = self._export(batch, *args, **kwargs)
        except Exception as raised:
            error = raised
        if error is None and getattr(result, "name", "SUCCESS") != "SUCCESS":
            error = ConnectionError("not taken by the receiver, see the SDK's own log")
        self._settle(count, error)
        return result

    def _settle(self, count: int, error: Exception | None) -> None:
        with self._lock:
            if self._closed:
                return  # all of it has been counted as lost
            self._flying -= count
        if error is not None:
            self._lose(count)
            self._health.error("export", error)

    def expect(self, most: int) -> None:
        """Note that one more is handed over to a queue of this size."""
        with self._lock:
            # The queue makes room by dropping its oldest, without a word.
            lost = self._closed or self._waiting >= most
            self._waiting += not lost
        if lost:
            self._lose(1)

    def close(self) -> None:
        """Send nothing from now on; what has not been sent is lost."""
        with self._lock:
            self._closed = True
            lost, self._waiting, self._flying = self._waiting + self._flying, 0, 0
        self._lose(lost)

    def _lose(self, count: int) -> None:
        if self._reason is not None and count:
            self._health.drop(self._reason, count)


class Pipeline:
    """A provider of one signal and how we end with it: ours by :func:`build`, or another's.

    Parameters
    ----------
    outlets
        Of our own exporters; none of an application's provider, which is only flushed.
    """

    def __init__(self, provider: Any, health: Health, outlets: list[Outlet] | None = None) -> None:
        self.provider = provider
        #: Whether it is an application's.
        self.guest = outlets is None
        self._outlets, self._health = outlets or [], health
        self._closing = False
        self._ended = threading.Event()

    def close(self, first: Callable[[], None] = lambda: None) -> threading.Event:
        """Begin to send what is left and to end; return what is set once that is done.

        ``first`` is called before, on that thread.

        On a thread of its own: the SDK waits here for as long as its exporter retries, whatever
        timeout it is given. An application's provider is left as it is.
        """
        if not self._closing:
            self._closing = True
            threading.Thread(
                target=self._end, args=(first,), name="memusage-otel-close", daemon=True
            ).start()
        return self._ended

    def _end(self, first: Callable[[], None]) -> None:
        try:
            first()
            end = "force_flush" if self.guest else "shutdown"
            getattr(self.provider, end, lambda: None)()
        except Exception as error:
            self._health.error("export", error)
        finally:
            self._ended.set()

    def give_up(self) -> None:
        """Stop sending: the time that :meth:`close` was given is over, or it is done."""
        if not self._ended.is_set():
            late = TimeoutError("the receiver was too slow when the process ended")
            self._health.error("export", late)
        for outlet in self._outlets:
            outlet.close()


def build(signal: str, health: Health, identity: Mapping[str, str]) -> Pipeline | None:
    """Return a provider of our own, or None where nothing asks for one.

    Parameters
    ----------
    signal
        ``traces`` or ``metrics``.
    identity
        Attributes of the resource that stand unless the user has set others.

    Raises
    ------
    ProviderError
        It cannot be had as asked for.
    """
    names = wanted(signal)
    if not names:
        return None
    make = _tracer_provider if signal == "traces" else _meter_provider
    try:
        exporters = [_exporter(signal, name) for name in names]
        return make(exporters, health, resource(identity))
    except ProviderError:
        raise
    except Exception as error:
        raise ProviderError(
            f"no {signal} are exported to {', '.join(names)} ({type(error).__name__}: {error}); "
            "correct the OTEL_* variables"
        ) from error


def _exporter(signal: str, name: str) -> type:
    if name == "otlp":
        variables = (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        given = [value for variable in variables if (value := os.environ.get(variable, "").strip())]
        protocol = given[0] if given else _DEFAULT_PROTOCOL
        if protocol not in _PROTOCOLS:
            raise ProviderError(
                f"no {signal} are exported: OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r} is not one of "
                + ", ".join(_PROTOCOLS)
            )
        name = _PROTOCOLS[protocol]
    group = f"opentelemetry_{signal}_exporter"
    for entry in entry_points(group=group, name=name):
        exporter: type = entry.load()
        return exporter
    mend = (
        "pip install 'dask-memusage-exporter[otlp]'"
        if name in _PROTOCOLS.values()
        else f"install what has it under the entry points {group}, or correct OTEL_*_EXPORTER"
    )
    raise ProviderError(f"no {signal} are exported: there is no exporter {name!r}; {mend}")


def queue_size() -> int:
    """Return how many spans may wait, as the SDK reads it: a wrong number is none."""
    try:
        size = int(os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", ""))
    except ValueError:
        return _QUEUE_SIZE
    return size if size > 0 else _QUEUE_SIZE


def _tracer_provider(exporters: list[type], health: Health, about: Resource) -> Pipeline:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    queue = queue_size()

    class Counted(BatchSpanProcessor):
        """The SDK's own, which does not tell what it drops."""

        def __init__(self, exporter: Any) -> None:
            self.outlet = Outlet(exporter, health, "span_export")
            super().__init__(exporter, max_queue_size=queue)

        def on_end(self, span: ReadableSpan) -> None:
            if span.context is not None and span.context.trace_flags.sampled:
                self.outlet.expect(queue)
                super().on_end(span)

    # Its own end at exit has no deadline.
    provider = TracerProvider(resource=about, shutdown_on_exit=False)
    processors = [Counted(exporter()) for exporter in exporters]
    for processor in processors:
        provider.add_span_processor(processor)
    return Pipeline(provider, health, [processor.outlet for processor in processors])


def _meter_provider(exporters: list[type], health: Health, about: Resource) -> Pipeline:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

    readers: list[Any] = []
    outlets = []
    for exporter in exporters:
        made = exporter()
        if isinstance(made, MetricReader):  # one that is asked, such as Prometheus
            readers.append(made)
            continue
        outlets.append(Outlet(made, health, None))
        readers.append(PeriodicExportingMetricReader(made))
    provider = MeterProvider(metric_readers=readers, resource=about, shutdown_on_exit=False)
    return Pipeline(provider, health, outlets)


def resource(identity: Mapping[str, str]) -> Resource:
    """Return what identifies this process; what the user has set stands.

    But for ``service.instance.id``: where it is set for all workers alike, they would write over
    each other's series, and a worker that starts anew over those of the one before. So it is only
    the beginning of the one that stands in ``identity``.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    given = OTELResourceDetector().detect().attributes
    ours = {name: value for name, value in identity.items() if name not in given}
    instance, unique = given.get(INSTANCE), identity.get(INSTANCE) or str(uuid.uuid4())
    ours[INSTANCE] = f"{instance}-{unique.replace('-', '')[:12]}" if instance else unique
    return Resource.create(ours)


def identity(server: str, **more: str | None) -> dict[str, str]:
    """Return the attributes of a worker's or scheduler's resource.

    Parameters
    ----------
    server
        ``worker`` or ``scheduler``.
    **more
        Further attributes of Dask's, ``name="a"`` being ``dask.worker.name``; None: left out.
    """
    about = {"service.name": f"dask-{server}"}
    about.update({f"dask.{server}.{name}": value for name, value in more.items() if value})
    return {**about, **kubernetes(os.environ)}


def kubernetes(environ: Mapping[str, str], namespace: Path = _NAMESPACE) -> dict[str, str]:
    """Return what is known of the pod we run in; empty outside Kubernetes.

    More (the node, the pod's uid) is for ``OTEL_RESOURCE_ATTRIBUTES`` and the downward API: a
    process cannot know it.
    """
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return {}
    about = {"k8s.pod.name": environ.get("HOSTNAME", "")}
    with suppress(OSError):  # no account is mounted
        about["k8s.namespace.name"] = namespace.read_text().strip()
    return {name: value for name, value in about.items() if value}
