"""``install``: one line that measures a cluster, whatever of it is at hand."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import Any

from distributed import Client, Scheduler, default_client
from distributed.deploy.cluster import Cluster
from distributed.utils import sync

from dask_memusage_exporter.config import check
from dask_memusage_exporter.scheduler import MemusageSchedulerPlugin, prepare


def install(
    target: Any = None,
    csv_path: str | os.PathLike[str] | None = None,
    *,
    jemalloc: bool | str | None = None,
) -> Any:
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
    jemalloc
        True: have the nannies start their workers on jemalloc, so that each of the tasks that
        overlap has its own growth; a text: the path of the library there. Workers that run already
        are started anew, and lose what they hold. Nannies log what is in the way, and the scheduler
        which workers have no nanny. None: the setting ``memusage.jemalloc``.

    Returns
    -------
    None or awaitable
        An awaitable where the target is asynchronous: measuring has begun when it is done. On the
        scheduler's own event loop it begins without being awaited, and errors are raised at once.

    Raises
    ------
    ValueError
        There is no default client.
    TypeError
        The target is nothing of the above.
    ConfigError
        A setting is wrong, or ``jemalloc``. The settings are those of the scheduler's process.
    OSError
        The CSV file cannot be written. Nothing has been set up then.
    ModuleNotFoundError
        The scheduler's environment lacks this package.
    """
    if target is None:
        target = default_target()
    csv_path = None if csv_path is None else os.fspath(csv_path)
    if jemalloc is not None:
        check("jemalloc", jemalloc)
    if isinstance(target, Cluster):
        scheduler = getattr(target, "scheduler", None)
        if not isinstance(scheduler, Scheduler):
            return _through_client(target, csv_path, jemalloc)
        target = scheduler
    if isinstance(target, Scheduler):
        return _in_process(target, csv_path, jemalloc)
    if isinstance(target, Client):
        return target.sync(_register, target, csv_path, jemalloc)
    raise TypeError(
        f"install() takes a distributed Client, Cluster or Scheduler, or nothing; got {target!r}"
    )


def default_target() -> Client:
    """Return the default client.

    Raises
    ------
    ValueError
        There is none.
    """
    try:
        client: Client = default_client()
    except ValueError:
        raise ValueError(
            "there is no Dask client; create distributed.Client(...) first, or give a Client, a "
            "Cluster or a Scheduler"
        ) from None
    return client


def _in_process(
    scheduler: Scheduler, csv_path: str | None, jemalloc: bool | str | None
) -> Awaitable[None] | None:
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is scheduler.loop.asyncio_loop:  # type: ignore[attr-defined]
        task = asyncio.ensure_future(prepare(scheduler, csv_path).begin(jemalloc))
        _pushing.add(task)
        task.add_done_callback(_pushing.discard)
        return task

    async def begin() -> None:
        await prepare(scheduler, csv_path).begin(jemalloc)

    sync(scheduler.loop, begin)
    return None


#: Nobody may await them, and the event loop alone does not keep them.
_pushing: set[asyncio.Task[None]] = set()


async def _register(client: Client, csv_path: str | None, jemalloc: bool | str | None) -> None:
    try:
        await client.register_plugin(MemusageSchedulerPlugin(csv_path, jemalloc))
    except ModuleNotFoundError as error:
        if "dask_memusage_exporter" not in str(error):
            raise
        raise ModuleNotFoundError(
            "the scheduler's environment lacks dask-memusage-exporter; install it there, or "
            "measure the workers alone: client.register_plugin(MemusageWorkerPlugin())"
        ) from None


def _through_client(cluster: Cluster, csv_path: str | None, jemalloc: bool | str | None) -> Any:
    if cluster.asynchronous:

        async def register() -> None:
            async with Client(cluster, asynchronous=True, set_as_default=False) as client:
                await _register(client, csv_path, jemalloc)

        return register()
    with Client(cluster, set_as_default=False) as client:
        return client.sync(_register, client, csv_path, jemalloc)
