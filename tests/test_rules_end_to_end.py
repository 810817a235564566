"""A real job's regression and a real kill, through Prometheus and Alertmanager to a webhook."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from dask_memusage_exporter.monitoring.rules import rules
from tests import tasks
from tests.conftest import Metrics, wait_until
from tests.servers import Prometheus, Servers, free_port
from tests.tasks import Gate

#: The windows of a day and a week, in seconds.
SHORT = {
    "step": "1s",
    "gap": "1m",
    "regression-recent": "5s",
    "regression-baseline": "5m",
    "regression-for": "0s",
    "regression-minimum-tasks": 5,
    "event-seconds": 60,
    # What a worker that is killed has not reported yet is lost with it.
    "dropped-records": 1000,
}


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Hold a real webhook: its address, and the alerts that have been sent to it."""
    sent: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent.extend(json.loads(body)["alerts"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", sent
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def alertmanager(program: str, directory: Path, receiver: str) -> Iterator[str]:
    """Hold a real Alertmanager that tells the receiver at once; its address."""
    directory.mkdir()
    config = {
        "route": {
            "receiver": "test",
            "group_by": ["..."],
            "group_wait": "0s",
            "group_interval": "1s",
        },
        "receivers": [{"name": "test", "webhook_configs": [{"url": receiver}]}],
    }
    (directory / "alertmanager.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={directory / 'alertmanager.yml'}",
                f"--storage.path={directory / 'data'}",
                f"--web.listen-address={address}",
                "--cluster.listen-address=",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)


def run(client: Client, mib: int, number: int) -> None:
    """Run a job of tasks ``load``, each of so much memory."""
    keys = [f"load-{os.urandom(8).hex()}" for _ in range(number)]
    client.gather(client.map(tasks.array, [mib] * number, key=keys, pure=False))


def test_a_regression_and_a_kill_reach_the_webhook(
    component: Callable[[str], str], go: Gate, tmp_path: Path
) -> None:
    """Tasks that take twice the memory fire, with the figures, and resolve; a kill fires."""
    programs = {name: component(name) for name in ("prometheus", "prometheus-alertmanager")}
    (tmp_path / "rules.yaml").write_text(rules("dask", SHORT))
    with ExitStack() as stack:
        servers = Servers(tmp_path)
        stack.callback(servers.close)
        servers.scheduler("--preload", "dask_memusage_exporter")
        servers.worker()
        receiver, sent = stack.enter_context(webhook())
        manager = stack.enter_context(
            alertmanager(programs["prometheus-alertmanager"], tmp_path / "manager", receiver)
        )
        more = {
            "rule_files": [str(tmp_path / "rules.yaml")],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [manager]}]}]},
        }
        prometheus = stack.enter_context(
            Prometheus(
                programs["prometheus"], tmp_path / "prometheus", [servers.scheduler_port], more=more
            )
        )

        def alert(name: str, status: str) -> dict[str, Any] | None:
            for one in sent:
                if (one["labels"]["alertname"], one["status"]) == (name, status):
                    return one
            return None

        count = "task_prefix:dask_scheduler_task_memory_growth_bytes_count"

        def based() -> list[float]:
            # What ended in a step that was not evaluated, as before the first one, is in no total.
            if not prometheus.query(f"({count}:recent or {count}:baseline) >= 5"):
                run(servers.client, 100, 10)
            return prometheus.query(f"{count}:baseline >= 5 unless {count}:recent")

        wait_until(based, 60, what="a baseline that is over")
        assert alert("DaskTaskMemoryRegression", "firing") is None

        def grown() -> dict[str, Any] | None:
            run(servers.client, 200, 2)
            return alert("DaskTaskMemoryRegression", "firing")

        fired = wait_until(grown, what=f"a regression at the webhook, which has {sent}")
        assert fired["labels"]["task_prefix_name"] == "load"
        assert fired["labels"]["severity"] == "warning"
        text = fired["annotations"]["description"]
        figures = re.search(r"grow by ([\d.]+)MiB .* before it was ([\d.]+)MiB", text)
        assert figures, text
        assert [float(one) for one in figures.groups()] == pytest.approx([200, 100], rel=0.02)
        more_by = re.match(r"Tasks load need (\d+) % more memory", fired["annotations"]["summary"])
        assert more_by, fired["annotations"]["summary"]
        assert int(more_by[1]) == pytest.approx(100, abs=4)

        pid = servers.client.submit(os.getpid).result()
        # What a killed worker has not told is lost, of which another alert tells.
        wait_until(
            lambda: (
                Metrics.read(servers.scheduler_port).total(
                    "dask_scheduler_task_memory_tasks_total", task_prefix_name="getpid"
                )
                == 1
            )
        )
        future = servers.client.submit(tasks.wait_for, go.path, key="waiter-0", pure=False)
        wait_until(lambda: go.reached, what="it runs")
        os.kill(pid, signal.SIGKILL)
        killed = wait_until(lambda: alert("DaskTaskKilled", "firing"), what=f"a kill in {sent}")
        assert killed["labels"]["task_prefix_name"] == "waiter"
        assert killed["labels"]["cause"] == "signal"
        assert alert("DaskTaskKilledForMemory", "firing") is None
        # Nothing else fires; and Dask's own series are there, with the labels that ours have.
        others = '{alertstate="firing",alertname!~"DaskTaskMemoryRegression|DaskTaskKilled"}'
        assert prometheus.query(f"ALERTS{others}") == [], [one["labels"] for one in sent]
        schedulers = "sum without (state) (dask_scheduler_workers)"
        info = "sum without (exporter_version, source) (dask_scheduler_task_memory_exporter_info)"
        wait_until(lambda: prometheus.query(f"count({schedulers} and {info})") == [1])
        future.cancel()
        wait_until(lambda: alert("DaskTaskMemoryRegression", "resolved"), what="it resolves")
