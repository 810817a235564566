"""Receivers of OpenTelemetry's protocol: real servers here that keep what they are sent."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

Attributes = dict[str, Any]

#: Requests' types by the path that they are sent to.
REQUESTS = {
    "/v1/metrics": metrics_service.ExportMetricsServiceRequest,
    "/v1/traces": trace_service.ExportTraceServiceRequest,
}


def plain(attributes: Any) -> Attributes:
    """Return attributes as a dict of plain values."""

    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        if kind == "array_value":
            return [value(one) for one in any_value.array_value.values]
        return None if kind is None else getattr(any_value, kind)

    return {one.key: value(one.value) for one in attributes}


class Point(NamedTuple):
    """One point of a metric, with what it belongs to."""

    resource: Attributes
    name: str
    unit: str
    kind: str
    attributes: Attributes
    #: The message itself.
    data: Any

    @property
    def value(self) -> float:
        """The number of a sum or gauge; the count of a histogram."""
        if self.kind.endswith("histogram"):
            return self.data.count
        return getattr(self.data, self.data.WhichOneof("value"))

    @property
    def series(self) -> tuple[Any, ...]:
        """What tells its series from others."""
        instance = self.resource.get("service.instance.id")
        return (instance, self.name, *sorted(self.attributes.items()))


class Span(NamedTuple):
    """One span, with what it belongs to."""

    resource: Attributes
    name: str
    attributes: Attributes
    #: The message itself.
    data: Any


class Received:
    """What has been sent."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        #: The status that requests are answered with, as HTTP has it.
        self.status = 200
        #: Requests wait here for an answer while it is clear.
        self.answers = threading.Event()
        self.answers.set()
        #: Requests that have come in, answered or not.
        self.arrived = 0

    def points(self, name: str | None = None, **attributes: Any) -> list[Point]:
        """Return the points received, in order."""
        found = []
        for request in list(self.requests):
            for group in getattr(request, "resource_metrics", ()):
                resource = plain(group.resource.attributes)
                for scope in group.scope_metrics:
                    for metric in scope.metrics:
                        kind = metric.WhichOneof("data")
                        for data in getattr(metric, kind).data_points:
                            has = plain(data.attributes)
                            point = Point(resource, metric.name, metric.unit, kind, has, data)
                            if (name is None or metric.name == name) and (
                                attributes.items() <= has.items()
                            ):
                                found.append(point)
        return found

    def latest(self, name: str | None = None, **attributes: Any) -> list[Point]:
        """Return the last point of every series."""
        return list({point.series: point for point in self.points(name, **attributes)}.values())

    def total(self, name: str, prefix: str | None = None, **attributes: Any) -> float:
        """Return the sum over all series of their last value (of histograms: counts)."""
        if prefix is not None:
            attributes["dask.task.prefix.name"] = prefix
        return sum(point.value for point in self.latest(name, **attributes))

    def spans(self, name: str | None = None) -> list[Span]:
        """Return the spans received, in order."""
        return [
            Span(plain(group.resource.attributes), span.name, plain(span.attributes), span)
            for request in list(self.requests)
            for group in getattr(request, "resource_spans", ())
            for scope in group.scope_spans
            for span in scope.spans
            if name is None or span.name == name
        ]


class HttpReceiver(Received):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__()
        received = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.arrived += 1
                received.answers.wait()
                if received.status == 200:
                    if self.headers.get("Content-Encoding") == "gzip":
                        body = gzip.decompress(body)
                    received.requests.append(REQUESTS[self.path].FromString(body))
                self.send_response(received.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that has given up is nothing to print."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()


class GrpcReceiver(Received, metrics_grpc.MetricsServiceServicer, trace_grpc.TraceServiceServicer):
    """Takes OTLP over gRPC."""

    def __init__(self) -> None:
        super().__init__()
        self._server = grpc.server(ThreadPoolExecutor(16))
        metrics_grpc.add_MetricsServiceServicer_to_server(self, self._server)
        trace_grpc.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.endpoint = f"http://127.0.0.1:{port}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        self.arrived += 1
        self.answers.wait()
        if self.status != 200:
            context.abort(_GRPC_STATUS[self.status], "on purpose")
        self.requests.append(request)
        if isinstance(request, metrics_service.ExportMetricsServiceRequest):
            return metrics_service.ExportMetricsServiceResponse()
        return trace_service.ExportTraceServiceResponse()

    def close(self) -> None:
        self.answers.set()
        self._server.stop(None)


#: What stands for a status over gRPC.
_GRPC_STATUS = {400: grpc.StatusCode.INVALID_ARGUMENT, 503: grpc.StatusCode.UNAVAILABLE}


@contextmanager
def dropping() -> Iterator[str]:
    """Hold the endpoint of a host that drops packets: nobody takes its connections, and no more
    may wait."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}"


@contextmanager
def receiver(protocol: str = "http/protobuf") -> Iterator[Any]:
    """Hold a receiver of ``http/protobuf`` or ``grpc``."""
    received = GrpcReceiver() if protocol == "grpc" else HttpReceiver()
    try:
        yield received
    finally:
        received.close()


def variables(endpoint: str, **more: str) -> dict[str, str]:
    """Return the environment that sends to a receiver, often."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_METRIC_EXPORT_INTERVAL": "300",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        **more,
    }
