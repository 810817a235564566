"""Real servers: ``dask scheduler`` and ``dask worker`` as operators start them, and Prometheus."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from distributed import Client

from tests.conftest import wait_until


def free_port() -> int:
    """Return a TCP port that nobody listens on, and that no other connection is given meanwhile."""
    while True:
        # Below those that the kernel gives to whoever names none (ip_local_port_range).
        port = random.randrange(16_384, 32_768)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class Server:
    """One process with its log; ended by its own id."""

    def __init__(
        self,
        log: Path,
        arguments: list[str],
        cwd: Path,
        environment: Mapping[str, str | None],
        under: Sequence[str] = (),
    ) -> None:
        self._log = log
        # Our own functions go by reference: servers find them where we do.
        merged = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*under, sys.executable, "-m", "dask", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={name: value for name, value in merged.items() if value is not None},
            )

    @property
    def log(self) -> str:
        """What the process has said so far."""
        return self._log.read_text()

    def lines(self, containing: str) -> list[str]:
        """Return the lines of the log that contain a text."""
        return [line for line in self.log.splitlines() if containing in line]

    def stop(self) -> int:
        """End the process as an operator does, by SIGTERM; return its exit status."""
        self.process.terminate()
        return self.process.wait(30)


class Servers:
    """The servers of one test in one directory, and its client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._file = directory / "scheduler.json"
        self._started = 0

    def start(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        under: Sequence[str] = (),
    ) -> Server:
        """Start ``dask ARGUMENTS``; a variable that is None is taken out of its environment.

        ``under`` is a program that starts others, with its own arguments.
        """
        self._started += 1
        log = self.directory / f"{arguments[0]}-{self._started}.log"
        server = Server(log, list(arguments), cwd or self.directory, env or {}, under)
        self._stack.callback(self._end, server)
        return server

    def scheduler(self, *arguments: str, **options: Any) -> Server:
        """Start a scheduler and wait until it runs, its preloads done."""
        server = self.start(
            "scheduler",
            *("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"),
            *("--scheduler-file", str(self._file)),
            *arguments,
            **options,
        )
        wait_until(self._file.exists, what=f"the scheduler file; log: {server.log}")
        self._scheduler = server
        # Servers answer nobody before their preloads are done.
        self.client = self._stack.enter_context(Client(self.identity()["address"]))
        return server

    def worker(self, *arguments: str, scheduler: str = "", **options: Any) -> Server:
        """Start a worker of one thread that joins the scheduler."""
        where = [scheduler] if scheduler else ["--scheduler-file", str(self._file)]
        return self.start(
            "worker",
            *where,
            *("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--nthreads", "1"),
            *arguments,
            **options,
        )

    def identity(self) -> dict[str, Any]:
        """Return what the scheduler has written of itself."""
        return wait_until(self._read, what="a whole scheduler file")

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._file.read_text())
        except ValueError:  # half written
            return None

    @property
    def scheduler_port(self) -> int:
        """The HTTP port of the scheduler."""
        return self.identity()["services"]["dashboard"]

    def worker_ports(self) -> list[int]:
        """Return the HTTP ports of the workers that are connected now."""
        workers = self.client.scheduler_info()["workers"]
        return [worker["services"]["dashboard"] for worker in workers.values()]

    def lines(self, containing: str) -> list[str]:
        """Return the lines of the scheduler's log that contain a text."""
        return self._scheduler.lines(containing)

    def addresses(self) -> dict[str, str]:
        """Return the addresses of the workers that are connected now, by name."""
        return self.client.run_on_scheduler(_addresses)

    def kill_scheduler(self) -> None:
        """End the scheduler's process as the kernel does."""
        self._scheduler.process.kill()
        self._scheduler.process.wait()

    def close(self) -> None:
        """End everything, the latest first."""
        self._stack.close()

    @staticmethod
    def _end(server: Server) -> None:
        if server.process.poll() is None:
            server.process.terminate()
            try:
                server.process.wait(5)
            except subprocess.TimeoutExpired:  # it waits for its tasks
                server.process.kill()
                server.process.wait()


def _addresses(dask_scheduler: Any) -> dict[str, str]:
    return {str(state.name): address for address, state in dask_scheduler.workers.items()}


class Prometheus:
    """A real Prometheus that scrapes ports of this machine several times a second.

    Parameters
    ----------
    program
        Its path.
    path
        What it scrapes.
    labels
        Put on everything that it scrapes.
    more
        Other keys of its configuration, such as ``rule_files``.
    """

    def __init__(
        self,
        program: str,
        directory: Path,
        ports: Iterable[int],
        path: str = "/metrics",
        labels: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        self._address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self._address}"
        directory.mkdir()
        targets = [f"127.0.0.1:{port}" for port in ports]
        # JSON is YAML.
        config = {
            "global": {
                "scrape_interval": "200ms",
                "scrape_timeout": "200ms",
                "evaluation_interval": "1s",
            },
            "scrape_configs": [
                {
                    "job_name": "dask",
                    "metrics_path": path,
                    "static_configs": [{"targets": targets, "labels": labels or {}}],
                }
            ],
            **(more or {}),
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))
        with (directory / "log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self._address}",
                    "--enable-feature=exemplar-storage",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def query(self, expression: str) -> list[float]:
        """Return the values of an instant query; none while the server starts."""
        found = self._ask("query", query=expression)
        return [] if found is None else [float(one["value"][1]) for one in found["result"]]

    def exemplars(self, expression: str) -> list[dict[str, Any]]:
        """Return the exemplars of the last ten minutes of the series of a query."""
        now = time.time()
        found = self._ask("query_exemplars", query=expression, start=now - 600, end=now + 60)
        return [exemplar for series in found or () for exemplar in series["exemplars"]]

    def _ask(self, what: str, **arguments: Any) -> Any:
        url = f"http://{self._address}/api/v1/{what}?{urlencode(arguments)}"
        with suppress(OSError), urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]
        return None


class VictoriaMetrics:
    """A real store that takes OpenTelemetry's protocol over HTTP.

    Parameters
    ----------
    program
        Its path.
    """

    def __init__(self, program: str, directory: Path) -> None:
        self._address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self._address}"
        self.endpoint = f"http://{self._address}/opentelemetry/v1/metrics"
        directory.mkdir()
        with (directory / "log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"-storageDataPath={directory / 'data'}",
                    f"-httpListenAddr={self._address}",
                    "-opentelemetry.usePrometheusNaming",
                    "-search.latencyOffset=0s",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def query(self, expression: str) -> list[float]:
        """Return the values of an instant query; none while the server starts."""
        url = f"http://{self._address}/api/v1/query?" + urlencode(
            {"query": expression, "nocache": 1}
        )
        with suppress(OSError), urlopen(url, timeout=10) as answer:
            return [float(one["value"][1]) for one in json.load(answer)["data"]["result"]]
        return []
