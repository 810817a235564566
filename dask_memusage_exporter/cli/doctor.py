"""`dask memusage doctor`: which source is in use here and on every worker, why, and what is better.

Covers: this machine and its configuration; a running cluster, its scheduler and each worker, and
whose ``/metrics`` nobody has read.
Does not cover: who reads them, and whether often enough.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from textwrap import wrap
from typing import Any

import click

from dask_memusage_exporter import __version__
from dask_memusage_exporter.cli.advice import Advice, of_cluster, of_machine
from dask_memusage_exporter.cli.command import Verb, say
from dask_memusage_exporter.cli.examination import Cluster, Machine, ask, examine
from dask_memusage_exporter.cli.tables import UNKNOWN, WIDTH, plural, table
from dask_memusage_exporter.config import ConfigError, Settings

#: How many workers that say the same are told by name.
_NAMED = 3


@click.command(cls=Verb, short_help="Tell how memory is measured, and what would be better.")
@click.option(
    "--scheduler", "address", metavar="ADDRESS", help="Ask this cluster too; tcp://HOST:PORT."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def doctor(*, address: str | None, as_json: bool) -> None:
    """Tell how memory is measured here and on every worker, why, and what would be better.

    Exit status 1: something is not measured, a setting is wrong, or jemalloc was asked for in vain.
    """
    advice: list[Advice] = []
    try:
        settings = Settings.load()
    except ConfigError as error:
        settings = None
        advice.append(Advice(f"Correct the setting: {error}."))
    machine = examine(settings)
    advice += of_machine(machine, settings)
    cluster = None
    if address is not None:
        cluster = ask(address)
        advice += of_cluster(cluster)
    if as_json:
        say(json.dumps(_document(machine, cluster, advice), indent=2))
    else:
        say("\n".join(_text(machine, cluster, advice)))
    if any(one.wrong for one in advice):
        raise click.exceptions.Exit(1)


def _text(machine: Machine, cluster: Cluster | None, advice: Sequence[Advice]) -> Iterator[str]:
    yield (
        f"This machine: Python {platform.python_version()}, distributed {version('distributed')}, "
        f"dask-memusage-exporter {__version__}"
    )
    yield from _paragraph(f"source    {machine.source}: {machine.why}")
    if machine.variables and machine.source != "jemalloc":
        yield "  jemalloc  can be turned on: install(..., jemalloc=True), memusage.jemalloc: true."
        yield "            For workers without a nanny, and in containers:"
        for name, value in machine.variables.items():
            yield f"              export {name}={value}"
    if cluster is not None:
        yield ""
        yield f"Cluster {cluster.address}: {plural(len(cluster.workers), 'worker')}"
        rows = [
            (
                address,
                one["name"],
                str(one["threads"]),
                one["source"],
                one["package"] or UNKNOWN,
                str(one["metrics_port"] or UNKNOWN),
            )
            for address, one in sorted(cluster.workers.items())
        ]
        head = ("worker", "name", "threads", "source", "version", "/metrics")
        yield from ("  " + line for line in table(head, rows, "<<><<>"))
        yield from _whys(cluster.workers)
        if cluster.scheduler["measures"]:
            yield (
                "  The scheduler's own /metrics, at port "
                f"{cluster.scheduler['metrics_port'] or UNKNOWN}, has the whole cluster's tasks."
            )
    yield ""
    if not advice:
        yield "Nothing to mend."
    everybody = 0 if cluster is None else len(cluster.workers)
    for one in advice:
        whose = f"{_names(one.workers, everybody)}: " if one.workers else ""
        yield from wrap(f"- {whose}{one.text}", WIDTH, subsequent_indent="  ")


def _whys(workers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Tell why each source is in use: once for all workers that say the same."""
    alike: dict[tuple[str, str], list[str]] = {}
    for address, one in sorted(workers.items()):
        if one["why"] is not None:
            alike.setdefault((one["source"], one["why"]), []).append(address)
    for (source, why), addresses in alike.items():
        yield from _paragraph(f"{source} on {_names(addresses, len(workers))}: {why}")


def _names(addresses: Sequence[str], everybody: int) -> str:
    """Name workers: the first few, or all of them as such."""
    if len(addresses) == everybody:
        return "the only worker" if everybody == 1 else f"all {everybody} workers"
    names = ", ".join(addresses[:_NAMED])
    more = len(addresses) - _NAMED
    return names if more <= 0 else f"{names} and {more} more"


def _paragraph(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent="  ", subsequent_indent=" " * 12)


def _document(
    machine: Machine, cluster: Cluster | None, advice: Sequence[Advice]
) -> dict[str, Any]:
    return {
        "machine": machine._asdict(),
        "cluster": None
        if cluster is None
        else {
            **cluster._asdict(),
            "sources": dict(Counter(one["source"] for one in cluster.workers.values())),
        },
        "advice": [one._asdict() for one in advice],
    }
