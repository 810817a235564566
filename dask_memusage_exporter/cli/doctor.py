"""`dask memusage doctor`: which source is in use here and on every worker, why, and what is better.

Covers: this machine and its configuration; a running cluster, its scheduler and each worker, and
whose ``/metrics`` nobody has read.
Does not cover: who reads them, and whether often enough.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from textwrap import wrap
from typing import Any, NamedTuple

import click
import cloudpickle
import dask.config
from distributed import Client

from dask_memusage_exporter import __version__, measure, nanny
from dask_memusage_exporter.cli import probe
from dask_memusage_exporter.cli.command import InputError, Verb
from dask_memusage_exporter.cli.tables import UNKNOWN, WIDTH, plural, table
from dask_memusage_exporter.config import ConfigError, Settings

#: Seconds to wait for a scheduler.
CONNECT_TIMEOUT = 10

_PRE_SPAWN = "distributed.nanny.pre-spawn-environ"
_MODULE = "dask_memusage_exporter"


class Machine(NamedTuple):
    """What can be measured in processes of this machine."""

    source: str
    why: str
    #: What to start processes with for jemalloc; empty: it cannot be turned on.
    variables: Mapping[str, str]
    #: Why it cannot.
    obstacle: str | None


class Cluster(NamedTuple):
    """What a scheduler and its workers have said; see ``probe``."""

    address: str
    scheduler: Mapping[str, Any]
    workers: Mapping[str, Mapping[str, Any]]


@click.command(cls=Verb)
@click.option(
    "--scheduler", "address", metavar="ADDRESS", help="Ask this cluster too; tcp://HOST:PORT."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def doctor(*, address: str | None, as_json: bool) -> None:
    """Tell how memory is measured here and on every worker, why, and what would be better.

    Exit status 1: something is not measured, or a setting is wrong.
    """
    machine = examine()
    cluster = None if address is None else ask(address)
    advice = [*_of_settings(), *_of_machine(machine), *_of_cluster(cluster)]
    if as_json:
        click.echo(json.dumps(_document(machine, cluster, advice), indent=2))
    else:
        click.echo("\n".join(_text(machine, cluster, advice)))
    if any(one.wrong for one in advice):
        raise click.exceptions.Exit(1)


def examine() -> Machine:
    """Return what can be measured on this machine."""
    chosen = measure.choose("auto", kernel_reset=True)
    chosen.source.close()
    try:
        variables, obstacle = nanny.environment(), None
    except nanny.JemallocError as error:
        variables, obstacle = {}, str(error)
    return Machine(chosen.name, chosen.why, variables, obstacle)


def ask(address: str) -> Cluster:
    """Ask a scheduler and its workers.

    Raises
    ------
    InputError
        It cannot be reached.
    """
    # By value: they may lack the package.
    cloudpickle.register_pickle_by_value(probe)
    try:
        with Client(address, timeout=CONNECT_TIMEOUT, set_as_default=False) as client:
            return Cluster(
                address,
                client.run_on_scheduler(probe.scheduler),
                client.run(probe.worker, on_error="ignore"),
            )
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        raise InputError(
            f"--scheduler: {address!r} cannot be reached ({error}); give the address that the "
            "scheduler has logged, such as tcp://127.0.0.1:8786"
        ) from None
    finally:
        cloudpickle.unregister_pickle_by_value(probe)


class Advice(NamedTuple):
    """A line of advice."""

    text: str
    #: Whether something is wrong, and not merely less than it could be.
    wrong: bool = True


def _of_settings() -> Iterator[Advice]:
    try:
        Settings.load()
    except ConfigError as error:
        yield Advice(f"Correct the setting: {error}.")
    for name in dask.config.get(_PRE_SPAWN, {}):
        if name != name.upper() and name.upper() in ("LD_PRELOAD", "PYTHONMALLOC"):
            yield Advice(
                f"{_PRE_SPAWN}.{name} does nothing: Dask makes small letters of what comes by "
                f"DASK_... variables. Set memusage.jemalloc: true, or {name.upper()} in a YAML "
                "file of Dask's configuration, or in the worker's own environment."
            )
    ours = os.environ.get("LD_PRELOAD")
    if ours is not None and "jemalloc" in ours and "PYTHONMALLOC" not in os.environ:
        yield Advice("LD_PRELOAD names jemalloc; set PYTHONMALLOC=malloc beside it.")


def _of_machine(machine: Machine) -> Iterator[Advice]:
    if machine.source == "polling":
        yield Advice(f"Peaks are only sampled on this machine: {machine.why}.", wrong=False)
    if machine.obstacle is not None and machine.source != "jemalloc":
        yield Advice(f"jemalloc cannot be turned on here: {machine.obstacle}.", wrong=False)


def _of_cluster(cluster: Cluster | None) -> Iterator[Advice]:
    if cluster is None:
        return
    if not cluster.scheduler["measures"]:
        hidden = any(one.split(".")[0] == _MODULE for one in cluster.scheduler["preload"])
        if cluster.scheduler["package"] is None:
            mend = "install dask-memusage-exporter in its environment"
        elif hidden:
            mend = (
                f"its configuration names the preload {_MODULE}, but a --preload on its command "
                "line hides what is configured: name both there"
            )
        else:
            mend = f"start it with --preload {_MODULE}, or call {_MODULE}.install(client)"
        yield Advice(f"The scheduler does not measure its cluster; {mend}.")
    for address, one in cluster.workers.items():
        yield from _of_worker(address, one, measures=cluster.scheduler["measures"])
    yield from _of_scrapes(cluster)


def _of_worker(address: str, one: Mapping[str, Any], *, measures: bool) -> Iterator[Advice]:
    if one["package"] is None:
        yield Advice(f"{address} is not measured; install dask-memusage-exporter there.")
    elif one["source"] == "missing":
        if measures:
            yield Advice(f"{address} is not measured; see its log for a line of dask-memusage.")
    elif one["source"] == "polling":
        yield Advice(f"{address} only samples: {one['why']}.", wrong=False)
    elif one["source"] == "kernel" and (one["threads"] > 1 or one["environment"]):
        way = (
            "set memusage.jemalloc: true, or call install(client, jemalloc=True)"
            if one["nanny"]
            else "it has no nanny: start it with LD_PRELOAD and PYTHONMALLOC set as above"
        )
        obstacle = (one["why"] or "").rpartition(": ")[2]
        yield Advice(
            f"{address} runs {plural(one['threads'], 'thread')}, and tasks that overlap have no "
            f"growth of their own without jemalloc ({obstacle}); {way}.",
            wrong=False,
        )


def _of_scrapes(cluster: Cluster) -> Iterator[Advice]:
    """Name the workers that nobody scrapes where others are; where none is, nobody wants to."""
    measured = {
        address: one for address, one in cluster.workers.items() if one["source"] != "missing"
    }
    unread = {address: one for address, one in measured.items() if one["scraped"] is None}
    if not unread or len(unread) == len(measured):
        return
    names = ", ".join(
        f"{address} (port {one['metrics_port'] or UNKNOWN})"
        for address, one in sorted(unread.items())
    )
    yield Advice(
        f"Nobody has read /metrics of {len(unread)} of {len(measured)} workers so far, and of the "
        f"others somebody has: {names}. Of several workers on one host only the first gets the "
        "port of --dashboard-address, the others get any. Read the scheduler's /metrics: it has "
        "the tasks of all; or start each worker by a command, and with a port, of its own.",
        wrong=False,
    )


def _text(machine: Machine, cluster: Cluster | None, advice: Sequence[Advice]) -> Iterator[str]:
    yield (
        f"This machine: Python {platform.python_version()}, distributed {version('distributed')}, "
        f"dask-memusage-exporter {__version__}"
    )
    yield from _paragraph(f"source    {machine.source}: {machine.why}")
    if machine.variables:
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
        yield (
            "  The scheduler's own /metrics, at port "
            f"{cluster.scheduler['metrics_port'] or UNKNOWN}, has the whole cluster's tasks."
        )
    yield ""
    if not advice:
        yield "Nothing to mend."
    for one in advice:
        yield from wrap(f"- {one.text}", WIDTH, subsequent_indent="  ")


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
