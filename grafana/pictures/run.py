"""A real run: ``dask scheduler``, ``dask worker`` and Prometheus as processes, and the job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dask_memusage_exporter import nanny
from grafana.pictures import job
from tests.conftest import wait_until
from tests.servers import Prometheus, Servers, free_port

#: What each worker may use; Dask's nanny kills it at 95 % of it.
LIMIT = 1024 * job.MIB

#: What a scrape configuration puts on, see ``docs/dashboards.md``.
LABELS = {"namespace": "example", "dask_cluster": "example"}
#: As long as a busy machine's pages need.
SCRAPE = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}}


class Run(NamedTuple):
    """What has been scraped, by whom, and when: what ran before ``start`` is the baseline."""

    url: str
    began: float
    start: float
    end: float


@contextmanager
def scraped(program: str, directory: Path, seconds: float) -> Iterator[Run]:
    """Run the job for some time and hold the Prometheus, of this program, that scraped it."""
    servers = Servers(directory)
    try:
        environment = {
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
            "DASK_MEMUSAGE__WORKER_METRICS": "full",
        }
        servers.scheduler("--preload", "dask_memusage_exporter", env=environment)
        # One thread and the kernel's mark, and two threads on jemalloc, which tells them apart. One
        # that died comes back at its port.
        jemalloc = {"LD_PRELOAD": nanny.find(), "PYTHONMALLOC": "malloc"}
        kinds: tuple[tuple[int, dict[str, str]], ...] = ((1, {}), (2, jemalloc), (2, jemalloc))
        ports = [free_port() for _ in kinds]
        for (threads, more), port in zip(kinds, ports, strict=True):
            servers.worker(
                *("--dashboard-address", f"127.0.0.1:{port}", "--nthreads", str(threads)),
                *("--memory-limit", str(LIMIT)),
                env={**environment, **more},
            )
        servers.client.wait_for_workers(len(ports), timeout=60)
        pages = [servers.scheduler_port, *ports]
        with Prometheus(
            program, directory / "prometheus", pages, labels=LABELS, more=SCRAPE
        ) as prometheus:
            wait_until(lambda: prometheus.query("up") == [1] * len(pages), what="a scrape of all")
            began = time.time()
            job.run(servers.client, seconds, LIMIT)
            end = time.time()
            # Its last values are asked of a server that has them.
            wait_until(lambda: prometheus.query("max(timestamp(up))") > [end], what="a last scrape")
            yield Run(prometheus.url, began, began + (end - began) / 3, end)
    finally:
        servers.close()
