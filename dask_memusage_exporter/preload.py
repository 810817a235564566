"""The preload with the old tool's option.

``dask scheduler --preload dask_memusage_exporter.preload --memusage-csv memusage.csv``

Dask takes one such preload a process. Beside another one that has options of its own, use
``--preload dask_memusage_exporter`` and the setting ``memusage.csv.path``.
"""

from __future__ import annotations

import os

import click
from click.core import ParameterSource

from dask_memusage_exporter.exporters.csv_file import WRITING


def _writable(context: click.Context, parameter: click.Parameter, path: str) -> str:
    """Refuse a path that cannot be written while the command line is read.

    Later is too late: Dask logs what a preload raises and runs on. The default is not looked at:
    the command line may be a worker's, which writes nothing.
    """
    if context.get_parameter_source(str(parameter.name)) is ParameterSource.DEFAULT:
        return path
    existed = os.path.lexists(path)
    try:
        os.close(os.open(path, WRITING, 0o666))
    except OSError as error:
        raise click.BadParameter(
            f"{path} cannot be written ({error.strerror}); give a path in a directory that exists "
            "and that the scheduler's process may write to"
        ) from None
    if not existed:
        os.unlink(path)
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
    from dask_memusage_exporter.scheduler import on_preload

    if isinstance(server, Scheduler):
        await on_preload(server, memusage_csv)
    else:
        await plain(server)
