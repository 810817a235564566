"""`dask memusage VERB`: one verb a file."""

from __future__ import annotations

import click


@click.group()
def memusage() -> None:
    """Exact peak memory of every Dask task."""
