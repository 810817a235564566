"""What ``doctor`` asks of a scheduler and its workers.

These functions travel by value and import of the package what they find, if anything: the machine
that is asked may lack it, or have another version. Plain types only.
"""

from __future__ import annotations

from typing import Any


def worker(dask_worker: Any) -> dict[str, Any]:
    """Return how a worker is measured, and what its process was started with."""
    import os
    from importlib import metadata

    try:
        version = metadata.version("dask-memusage-exporter")
    except metadata.PackageNotFoundError:
        version = None
    told = dask_worker.metrics.get("memusage")
    said = told(dask_worker) if told is not None else {}
    agent = dask_worker.extensions.get("memusage")
    names = ("LD_PRELOAD", "PYTHONMALLOC")
    return {
        "name": str(dask_worker.name),
        "threads": dask_worker.state.nthreads,
        "nanny": dask_worker.nanny is not None,
        "package": version,
        "source": said.get("source", "missing"),
        "why": getattr(agent, "why", None),
        "environment": {name: os.environ[name] for name in names if os.environ.get(name)},
        "metrics_port": getattr(getattr(dask_worker, "http_server", None), "port", None),
        # Seconds since the epoch; None: never, or not known (not measured, an older version).
        "scraped": getattr(agent, "scraped", None),
    }


def scheduler(dask_scheduler: Any) -> dict[str, Any]:
    """Return whether a scheduler measures its cluster, and what it was told to load."""
    from importlib import metadata

    import dask

    try:
        version = metadata.version("dask-memusage-exporter")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "package": version,
        "measures": "memusage" in dask_scheduler.extensions,
        "preload": [str(one) for one in dask.config.get("distributed.scheduler.preload", [])],
        "metrics_port": getattr(getattr(dask_scheduler, "http_server", None), "port", None),
    }
