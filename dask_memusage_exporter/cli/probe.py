"""What ``doctor`` asks of a scheduler and its workers.

These functions travel by value and import of the package what they find, if anything: the machine
that is asked may lack it, or have another version. Plain types only.
"""

from __future__ import annotations

from typing import Any


def worker(dask_worker: Any) -> dict[str, Any]:
    """Return how a worker is measured, and what its process was started with."""
    told = dask_worker.metrics.get("memusage")
    said = told(dask_worker) if told is not None else {}
    agent = dask_worker.extensions.get("memusage")
    return {
        "answered": True,
        # What measures says so itself: a copy on the path is no installed package.
        "package": said.get("version") or installed(),
        "source": said.get("source", "missing"),
        "why": getattr(agent, "why", None),
        "environment": started_with(),
        "lower_cased": lower_cased(),
        # Seconds since the epoch; None: never, or not known (not measured, an older version).
        "scraped": getattr(agent, "scraped", None),
    }


def installed() -> str | None:
    """Return the version of the package that is installed here; None: it is not."""
    from importlib import metadata

    try:
        return metadata.version("dask-memusage-exporter")
    except metadata.PackageNotFoundError:
        return None


def nanny(dask_worker: Any) -> str | None:
    """Return why a nanny could not turn jemalloc on; None: it could, or was not asked."""
    asked = "memusage-jemalloc" in dask_worker.plugins
    try:
        from dask_memusage_exporter.nanny import obstacles
    except ImportError:
        return "install dask-memusage-exporter in the nanny's environment" if asked else None
    return obstacles.get(dask_worker)


def started_with() -> dict[str, str]:
    """Return what of a process's environment decides on its malloc."""
    import os

    names = ("LD_PRELOAD", "PYTHONMALLOC")
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def lower_cased() -> list[str]:
    """Return the names that a DASK_... variable has set in small letters, to no effect."""
    import dask

    names = map(str, dask.config.get("distributed.nanny.pre-spawn-environ", None) or ())
    ours = ("LD_PRELOAD", "PYTHONMALLOC")
    return [name for name in names if name not in ours and name.upper() in ours]


def scheduler(dask_scheduler: Any) -> dict[str, Any]:
    """Return whether a scheduler measures its cluster, what it was told to load, its workers."""
    import dask

    return {
        "package": installed(),
        "measures": "memusage" in dask_scheduler.extensions,
        "preload": [str(one) for one in dask.config.get("distributed.scheduler.preload", [])],
        "metrics_port": getattr(getattr(dask_scheduler, "http_server", None), "port", None),
        "workers": {address: seen(state) for address, state in dask_scheduler.workers.items()},
    }


def seen(state: Any) -> dict[str, Any]:
    """Return what a scheduler knows of a worker, by its last heartbeat; see `worker` for more."""
    said = state.metrics.get("memusage") or {}
    return {
        "answered": False,
        "name": str(state.name),
        "threads": state.nthreads,
        "nanny": state.nanny is not None,
        "package": said.get("version"),
        "source": said.get("source", "missing"),
        "why": None,
        "environment": {},
        "lower_cased": [],
        # Why its nanny could not turn jemalloc on; see `nanny`.
        "refusal": None,
        "metrics_port": state.services.get("dashboard"),
        "scraped": None,
    }
