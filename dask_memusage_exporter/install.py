"""``install``: one line that measures a cluster, whatever of it is at hand."""

from __future__ import annotations

import asyncio
from typing import Any

from distributed import Client, Scheduler, default_client
from distributed.deploy.cluster import Cluster
from distributed.utils import sync

from dask_memusage_exporter.scheduler import MemusageSchedulerPlugin


def install(target: Any = None, csv_path: str | None = None) -> Any:
    """Measure the memory of every task of a cluster from now on.

    A drop-in for ``dask_memusage.install``. Calling it again is harmless, and may add a CSV.

    Parameters
    ----------
    target : Scheduler, Cluster, Client or None
        None is the default client. A Scheduler must live in this process, as
        ``LocalCluster().scheduler`` does.
    csv_path
        A file on the scheduler's machine, one row a task, overwritten if it is there; None: the
        setting ``memusage.csv.path``, which may be none.

    Returns
    -------
    None or awaitable
        An awaitable where the target is asynchronous: measuring has begun when it is done.

    Raises
    ------
    ValueError
        There is no default client.
    TypeError
        The target is nothing of the above.
    ConfigError
        A setting is wrong.
    OSError
        The CSV file cannot be written.
    """
    if target is None:
        try:
            target = default_client()
        except ValueError:
            raise ValueError(
                "install() found no Dask client; create distributed.Client(...) first, or give it "
                "a Client, a Cluster or a Scheduler"
            ) from None
    plugin = MemusageSchedulerPlugin(csv_path)
    if isinstance(target, Cluster):
        scheduler = getattr(target, "scheduler", None)
        if not isinstance(scheduler, Scheduler):
            return _through_client(target, plugin)
        target = scheduler
    if isinstance(target, Scheduler):
        return _in_process(target, plugin)
    if isinstance(target, Client):
        return target.register_plugin(plugin)
    raise TypeError(
        f"install() takes a distributed Client, Cluster or Scheduler, or nothing; got {target!r}"
    )


def _in_process(scheduler: Scheduler, plugin: MemusageSchedulerPlugin) -> Any:
    async def register() -> None:
        await scheduler.register_scheduler_plugin(plugin, name=plugin.name, idempotent=False)

    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is not None and running is scheduler.loop.asyncio_loop:  # type: ignore[attr-defined]
        return asyncio.ensure_future(register())
    return sync(scheduler.loop, register)


def _through_client(cluster: Cluster, plugin: MemusageSchedulerPlugin) -> Any:
    if cluster.asynchronous:

        async def register() -> None:
            async with Client(cluster, asynchronous=True, set_as_default=False) as client:
                await client.register_plugin(plugin)

        return register()
    with Client(cluster, set_as_default=False) as client:
        return client.register_plugin(plugin)
