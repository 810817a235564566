"""Pages of our own on the HTTP servers that Dask has: the live page, and OpenMetrics.

``/memusage`` on the scheduler's HTTP port shows people what runs now on each worker and how high it
is, from the last heartbeats; ``/memusage/live`` is the same as JSON. ``/memusage/metrics``, on
workers too, has our metrics with exemplars, and nothing of Dask's.

Covers: tasks that were running at each worker's last heartbeat, with its age.
Does not cover: tasks that came and went between two heartbeats (0.5 s, more in large clusters).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes, format_time, key_split
from tornado.web import RequestHandler

from dask_memusage_exporter import flight
from dask_memusage_exporter.exporters import openmetrics
from dask_memusage_exporter.exporters.prometheus import Renderer

if TYPE_CHECKING:
    from distributed import Scheduler
    from distributed.node import ServerNode

#: Seconds between two looks of the page.
REFRESH = 1

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Task memory, live</title>
<meta http-equiv="refresh" content="{refresh}">
<style>
 body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
 table {{ border-collapse: collapse; width: 100% }}
 th, td {{ text-align: left; padding: .3em .8em; border-bottom: 1px solid #ddd }}
 td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
 td.key {{ max-width: 40em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }}
 meter {{ width: 12em }}
</style></head><body>
<h1>Task memory, live</h1>
<p>{summary}</p>
<table><thead><tr><th>worker</th><th>task</th><th>key</th><th>runs for</th>
<th>peak of the process</th><th>of the worker's limit</th><th>above its start</th>
<th>tasks at once</th></tr></thead>
<tbody>{rows}</tbody></table>
<p>The peak is the whole process's: everybody's where several tasks run at once.</p>
</body></html>
"""


def live(scheduler: Scheduler) -> list[dict[str, Any]]:
    """Return what runs on each measured worker: plain types, sizes in bytes, times in seconds."""
    now = time.time()
    workers = []
    for state in list(scheduler.workers.values()):
        said = state.metrics.get("memusage") or {}
        tasks = [flight.Flying.of(one) for one in said.get("running", ())]
        workers.append(
            {
                "worker": state.address,
                "name": str(state.name),
                "source": said.get("source", "missing"),
                "heartbeat_age": max(0.0, now - state.last_seen),
                "memory_limit_bytes": state.memory_limit or None,
                "running": [
                    {
                        "key": task.key,
                        "task_prefix": key_split(task.key),
                        # Both by the worker's own clock: its time of looking, and the start.
                        "seconds": max(0.0, task.peak_time - task.start),
                        "start_bytes": task.start_bytes,
                        "peak_bytes": task.peak_bytes,
                        "concurrency": task.concurrency,
                    }
                    for task in sorted(tasks, key=lambda task: -task.peak_bytes)
                ],
            }
        )
    return workers


class LiveHandler(RequestHandler):
    """The same as JSON."""

    def initialize(self, what: Callable[[], list[dict[str, Any]]]) -> None:
        """Take what returns the workers."""
        self._what = what

    def get(self) -> None:
        """Write ``{"workers": [...]}``."""
        self.write({"workers": self._what()})


class PageHandler(LiveHandler):
    """The page."""

    def get(self) -> None:
        """Write it, one row a running task."""
        workers = self._what()
        rows = [_row(worker, task) for worker in workers for task in worker["running"]]
        measured = sum(worker["source"] != "missing" for worker in workers)
        summary = (
            f"{len(rows)} tasks run on {len(workers)} workers, {measured} of them measured, as of "
            "their last heartbeats."
        )
        self.write(_PAGE.format(refresh=REFRESH, summary=summary, rows="".join(rows)))


def _row(worker: dict[str, Any], task: dict[str, Any]) -> str:
    peak, limit = task["peak_bytes"], worker["memory_limit_bytes"]
    share = (
        f'<meter min="0" max="1" high="0.8" value="{peak / limit:.3f}"></meter>' if limit else "-"
    )
    cells = [
        ("", escape(worker["name"])),
        ("", escape(task["task_prefix"])),
        (' class="key"', escape(task["key"])),
        (' class="n"', format_time(task["seconds"])),
        (' class="n"', format_bytes(peak)),
        ("", share),
        (' class="n"', format_bytes(max(0, peak - task["start_bytes"]))),
        (' class="n"', str(task["concurrency"])),
    ]
    return "<tr>" + "".join(f"<td{kind}>{value}</td>" for kind, value in cells) + "</tr>"


def add_routes(scheduler: Scheduler) -> None:
    """Add both pages to a scheduler's HTTP server, if it has one."""
    application = getattr(scheduler, "http_application", None)
    if application is not None:
        what = {"what": lambda: live(scheduler)}
        application.add_handlers(
            r".*", [(r"/memusage", PageHandler, what), (r"/memusage/live", LiveHandler, what)]
        )


class MetricsHandler(RequestHandler):
    """Our metrics, in what the client accepts of OpenMetrics and the plain text."""

    def initialize(self, who: Callable[[], Renderer | None]) -> None:
        """Take what returns who has metrics to show."""
        self._who = who

    def get(self) -> None:
        """Write them; an empty page where nothing is measured."""
        renderer = self._who()
        if renderer is None:
            self.set_header("Content-Type", openmetrics.PLAIN)
            return
        # A page that cannot be written at all is an error to who reads it, and a scrape that fails.
        self.set_status(500)
        with renderer.health.guard("render"):
            text, kind = openmetrics.page(renderer, self.request.headers.get("Accept", ""))
            self.set_status(200)
            self.set_header("Content-Type", kind)
            self.write(text)


def add_metrics(server: ServerNode, who: Callable[[], Renderer | None]) -> None:
    """Add our metrics' page to a worker's or scheduler's HTTP server, if it has one.

    Parameters
    ----------
    who
        Returns whose metrics they are at the time of a request; None: nobody's.
    """
    application = getattr(server, "http_application", None)
    if application is not None:
        application.add_handlers(r".*", [(r"/memusage/metrics", MetricsHandler, {"who": who})])
