"""`dask memusage VERB`: one verb a file.

To add a verb: 1. a file with a ``click`` command of class :class:`~.command.Verb`, 2. a line in
:data:`VERBS`, 3. its tests, as a process (``tests/test_demo.py`` shows how).
"""

from __future__ import annotations

import click

from dask_memusage_exporter.cli.command import Verbs
from dask_memusage_exporter.cli.dashboards import dashboards
from dask_memusage_exporter.cli.demo import demo
from dask_memusage_exporter.cli.doctor import doctor


@click.group(cls=Verbs)
def memusage() -> None:
    """Exact peak memory of every Dask task."""


#: Every verb, in the order in which the help shows them.
VERBS: tuple[click.Command, ...] = (demo, dashboards, doctor)

for _verb in VERBS:
    memusage.add_command(_verb)
