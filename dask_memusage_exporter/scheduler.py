"""The scheduler's side: the ways in, by a plugin or by a preload.

Covers: setting an agent up, adding to one that is there, errors that are the user's to mend.
Does not cover: what it does then (``scheduler_agent``).

The state lives in ``scheduler.extensions["memusage"]``: a plugin that is registered again finds it.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from distributed.diagnostics.plugin import SchedulerPlugin

from dask_memusage_exporter.config import ConfigError, Settings
from dask_memusage_exporter.scheduler_agent import SchedulerAgent
from dask_memusage_exporter.worker import EXTENSION

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("distributed.scheduler.memusage")


class MemusageSchedulerPlugin(SchedulerPlugin):
    """Measures all tasks of a cluster: ``client.register_plugin(MemusageSchedulerPlugin())``.

    It puts what is needed on every worker itself. Registering it again is harmless, and may add a
    CSV. ``client.unregister_worker_plugin("memusage")`` stops measuring.

    Parameters
    ----------
    csv_path
        A file on the scheduler's machine, overwritten if it is there; None: the setting
        ``memusage.csv.path``, which may be none.
    jemalloc
        See :func:`install.install`.
    """

    name = EXTENSION

    def __init__(
        self,
        csv_path: str | os.PathLike[str] | None = None,
        jemalloc: bool | str | None = None,
    ) -> None:
        self.csv_path = csv_path
        self.jemalloc = jemalloc

    async def start(self, scheduler: Scheduler) -> None:
        """Begin, or add to what is there.

        Raises
        ------
        ConfigError
            A setting of the scheduler is wrong.
        OSError
            The CSV file cannot be written.
        """
        agent = prepare(scheduler, self.csv_path)
        # Registered again: the state is kept, only the plugin object is replaced.
        scheduler.plugins.pop(self.name, None)
        await agent.begin(self.jemalloc)


def prepare(
    scheduler: Scheduler, csv_path: str | os.PathLike[str] | None, *, tolerant: bool = False
) -> SchedulerAgent:
    """Set measuring up on a scheduler, or add a CSV; :meth:`SchedulerAgent.begin` begins.

    Parameters
    ----------
    csv_path
        None: the setting ``memusage.csv.path``.
    tolerant
        Go on without a CSV that cannot be written, and say so in the log and in
        ``task_memory_errors_total{stage="csv"}``: for preloads, whose errors Dask only logs.

    Raises
    ------
    ConfigError, OSError
        Nothing is set up then.
    """
    settings = Settings.load()
    known = scheduler.extensions.get(EXTENSION)
    agent = known if isinstance(known, SchedulerAgent) else SchedulerAgent(scheduler, settings)
    path = settings.csv_path if csv_path is None else csv_path
    if path is not None:
        try:
            agent.rows.add_csv(path, settings.csv_columns)
        except OSError as error:
            if not tolerant:
                raise
            agent.health.error("csv", error)
    if agent is not known:
        agent.start()
    return agent


async def on_preload(scheduler: Scheduler, csv_path: str | None = None) -> None:
    """Begin from a preload: what is wrong is one line in the log, and the scheduler runs on."""
    try:
        agent = prepare(scheduler, csv_path, tolerant=True)
    except ConfigError as error:
        logger.warning("dask-memusage: nothing is measured. %s", error)
    else:
        await agent.begin()
