"""Exact peak memory of every Dask task, on Prometheus and in a CSV.

>>> from dask_memusage_exporter import install
>>> install(client)  # doctest: +SKIP

As a preload, for ``dask scheduler`` and ``dask worker``: ``--preload dask_memusage_exporter``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dask-memusage-exporter")
except PackageNotFoundError:  # a copy on the path, not installed
    __version__ = "0+unknown"

from dask_memusage_exporter.config import ConfigError
from dask_memusage_exporter.install import install
from dask_memusage_exporter.nanny import MemusageNannyPlugin
from dask_memusage_exporter.recording import Recording, record
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.scheduler import MemusageSchedulerPlugin, on_preload
from dask_memusage_exporter.submission import traced
from dask_memusage_exporter.worker import MemusageWorkerPlugin

__all__ = [
    "ConfigError",
    "MemusageNannyPlugin",
    "MemusageSchedulerPlugin",
    "MemusageWorkerPlugin",
    "Recording",
    "TaskMemory",
    "__version__",
    "dask_setup",
    "install",
    "record",
    "traced",
]


async def dask_setup(server: object) -> None:
    """Start from a preload, on a scheduler or a worker; on a scheduler alone is enough.

    A plain function, so that it stacks with other preloads: Dask takes only one that is a click
    command. Its settings, the CSV's path too, come from ``dask.config``.
    """
    from distributed import Scheduler, Worker

    if isinstance(server, Scheduler):
        await on_preload(server)
    elif isinstance(server, Worker):
        await server.plugin_add(MemusageWorkerPlugin(), name=MemusageWorkerPlugin.name)
