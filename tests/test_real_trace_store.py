"""1,000 tasks on four workers, and every span read back from a real store of traces."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from dask_memusage_exporter import traced
from tests.conftest import wait_until
from tests.servers import free_port
from tests.test_real_otel_store import KEYS, TASKS, a_thousand_tasks

#: Where `make test-store` installs it.
PYTHON = Path(__file__).parents[1] / ".venv-store" / "bin" / "python"

#: Starts the server as its own command does, but that it would take gRPC from anywhere.
SERVE = """
import sys
import grpc.aio
from grpc.aio import _server
listen = _server.Server.add_insecure_port
_server.Server.add_insecure_port = lambda self, address: listen(
    self, address.replace("[::]", "127.0.0.1")
)
sys.argv = ["phoenix", "serve"]
from phoenix.server.main import main
main()
"""


class Phoenix:
    """A real store of traces, which takes OpenTelemetry's protocol over HTTP and over gRPC."""

    def __init__(self, directory: Path) -> None:
        self._address = f"http://127.0.0.1:{free_port()}"
        grpc = free_port()
        self.endpoints = {"http/protobuf": self._address, "grpc": f"http://127.0.0.1:{grpc}"}
        plain = {name: v for name, v in os.environ.items() if not name.startswith("OTEL_")}
        self._log = directory / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [PYTHON, "-c", SERVE],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={
                    **plain,
                    "PYTHONPATH": "",
                    "PHOENIX_WORKING_DIR": str(directory),
                    "PHOENIX_HOST": "127.0.0.1",
                    "PHOENIX_PORT": self._address.rpartition(":")[2],
                    "PHOENIX_GRPC_PORT": str(grpc),
                    "PHOENIX_TELEMETRY_ENABLED": "false",
                    "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
                },
            )
        wait_until(self._is_up, timeout=300, what="the store to start")

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        with suppress(OSError), urlopen(f"{self._address}/healthz", timeout=10):
            return True
        return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def spans(self, project: str) -> list[dict[str, Any]]:
        """Return all spans of a project."""
        found: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None:
            query = urlencode({"limit": 1000, **({"cursor": cursor} if cursor else {})})
            url = f"{self._address}/v1/projects/{project}/spans/otlpv1?{query}"
            try:
                with urlopen(url, timeout=30) as answer:
                    page = json.load(answer)
            except OSError:  # there is no such project yet
                return []
            found += page["data"]
            cursor = page["next_cursor"]
        return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phoenix]:
    """A store that runs."""
    if not PYTHON.exists():
        pytest.skip(
            "there is no store of traces here: `make test-store` installs one and runs this"
        )
    store = Phoenix(tmp_path_factory.mktemp("store"))
    yield store
    store.stop()


def exporter(protocol: str, endpoint: str) -> SpanExporter:
    """Return what a client sends its own spans with."""
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    return trace_exporter.OTLPSpanExporter(f"{endpoint}/v1/traces")


@contextmanager
def nightly(provider: TracerProvider) -> Iterator[None]:
    """What a client does that wants one trace."""
    with provider.get_tracer("application").start_as_current_span("nightly"), traced():
        yield


@pytest.mark.timeout(600)
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_thousand_spans_are_in_the_store(
    protocol: str, store: Phoenix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one trace below the client's span, with attributes and times as the CSV has them."""
    endpoint, project = store.endpoints[protocol], protocol.partition("/")[0]
    about = {"openinference.project.name": project}
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_RESOURCE_ATTRIBUTES": f"openinference.project.name={project}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }.items():
        monkeypatch.setenv(name, value)
    client = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    client.add_span_processor(BatchSpanProcessor(exporter(protocol, endpoint)))
    with a_thousand_tasks(tmp_path / "memusage.csv", nightly(client)) as of_task:
        client.shutdown()
        spans = wait_until(
            lambda: len(found := store.spans(project)) == TASKS + 1 and found,
            timeout=120,
            what=f"{TASKS} spans and their parent",
        )
    (parent,) = [span for span in spans if span["name"] == "nightly"]
    assert not parent["parent_span_id"]
    spans.remove(parent)
    assert {attributes(span)["dask.task.key"] for span in spans} == set(KEYS)
    for span in spans:
        assert span["name"] == "stored"
        assert span["trace_id"] == parent["trace_id"]
        assert span["parent_span_id"] == parent["span_id"]
        about = attributes(span)
        row = of_task[about["dask.task.key"]]
        assert int(about["dask.task.memory.peak"]) == int(row["peak_bytes"])
        assert int(about["dask.task.memory.start"]) == int(row["start_bytes"])
        assert str(about.get("dask.task.memory.growth", "")) == row["growth_bytes"]
        assert about["dask.task.memory.scope"] == row["scope"]
        assert int(about["dask.task.output.size"]) == int(row["output_bytes"])
        # The store has microseconds.
        assert abs(int(span["end_time_unix_nano"]) / 1e9 - float(row["stop"])) < 1e-4
        assert int(span["start_time_unix_nano"]) / 1e9 < float(row["start"]) + 1e-4


def attributes(span: dict[str, Any]) -> dict[str, Any]:
    """Return a span's attributes as plain values."""
    return {
        one["key"]: next(value for value in one["value"].values() if value is not None)
        for one in span["attributes"]
    }
