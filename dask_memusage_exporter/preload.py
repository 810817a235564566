"""The preload with the old tool's option.

``dask scheduler --preload dask_memusage_exporter.preload --memusage-csv memusage.csv``

Dask takes one such preload a process. Beside another one that has options of its own, use
``--preload dask_memusage_exporter`` and the setting ``memusage.csv.path``.
"""

from __future__ import annotations

import os

import click


def _writable(_: click.Context, __: click.Parameter, path: str) -> str:
    """Refuse a path that cannot be written while the command line is read.

    Later is too late: Dask logs what a preload raises and runs on.
    """
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise click.BadParameter(f"there is no directory {directory}; make it or give another path")
    target = path if os.path.exists(path) else directory
    if os.path.isdir(path) or not os.access(target, os.W_OK):
        raise click.BadParameter(f"{path} cannot be written; give another path")
    return path


@click.command()
@click.option(
    "--memusage-csv",
    default="memusage.csv",
    show_default=True,
    callback=_writable,
    help="File that the scheduler writes one row a task to.",
)
async def dask_setup(server: object, memusage_csv: str) -> None:
    """Measure every task and write a CSV, as dask-memusage did."""
    from distributed import Scheduler

    from dask_memusage_exporter import dask_setup as plain
    from dask_memusage_exporter.scheduler import begin

    if isinstance(server, Scheduler):
        await begin(server, memusage_csv, tolerant=True)
    else:
        await plain(server)
