"""What ``doctor`` advises, from what it has found.

Covers: what is wrong, and what is merely less than it could be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dask_memusage_exporter.cli import probe
from dask_memusage_exporter.cli.examination import Cluster, Machine
from dask_memusage_exporter.cli.tables import UNKNOWN, plural
from dask_memusage_exporter.config import Settings

_PRE_SPAWN = "distributed.nanny.pre-spawn-environ"
_MODULE = "dask_memusage_exporter"


class Advice(NamedTuple):
    """A line of advice."""

    text: str
    #: Whether something is wrong, and not merely less than it could be.
    wrong: bool = True
    #: Addresses of the workers that it is for; none: it says itself what it is for.
    workers: tuple[str, ...] = ()


def of_machine(machine: Machine, settings: Settings | None) -> Iterator[Advice]:
    """Return what is to be done on this machine.

    Parameters
    ----------
    settings
        Of this process; None: they are wrong, which is told elsewhere.
    """
    for name in probe.lower_cased():
        yield _does_nothing(name)
    if machine.source == "polling":
        yield Advice(f"Peaks are only sampled on this machine: {machine.why}.", wrong=False)
    if _in_vain(machine.environment, machine.why):
        yield Advice(
            f"This process was started with LD_PRELOAD={machine.environment['LD_PRELOAD']}, and "
            f"jemalloc is not used: {_obstacle(machine.why)}."
        )
    if machine.obstacle is not None:
        cannot = f"jemalloc cannot be turned on here: {machine.obstacle}."
        if settings is not None and settings.jemalloc:
            yield Advice(f"Correct the setting memusage.jemalloc, or mend this: {cannot}")
        elif machine.source != "jemalloc":
            yield Advice(cannot, wrong=False)


def _does_nothing(name: str) -> Advice:
    return Advice(
        f"{_PRE_SPAWN}.{name} does nothing: Dask makes small letters of what comes by "
        f"DASK_... variables. Set memusage.jemalloc: true, or {name.upper()} in a YAML "
        "file of Dask's configuration, or in the worker's own environment."
    )


def _obstacle(why: str | None) -> str:
    """Return what is in the way of jemalloc; empty where nothing is, or a setting is."""
    return (why or "").partition("overlap share it: ")[2]


def _in_vain(environment: Mapping[str, str], why: str | None) -> bool:
    """Return whether somebody has wanted jemalloc for a process that does not use it."""
    return "jemalloc" in environment.get("LD_PRELOAD", "") and bool(_obstacle(why))


def of_cluster(cluster: Cluster) -> Iterator[Advice]:
    """Return what is to be done about a cluster."""
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
    # What many workers are told alike is one line.
    alike: dict[Advice, list[str]] = {}
    for address, one in sorted(cluster.workers.items()):
        for advice in _of_worker(one, measures=cluster.scheduler["measures"]):
            alike.setdefault(advice, []).append(address)
    for advice, workers in alike.items():
        yield advice._replace(workers=tuple(workers))
    yield from _of_scrapes(cluster)


def _of_worker(one: Mapping[str, Any], *, measures: bool) -> Iterator[Advice]:
    if not one["answered"]:
        yield Advice(
            "no answer: a task there may hold the GIL, or the process be stopped. What is shown is "
            "from the last heartbeat; ask again.",
            wrong=one["source"] == "missing",
        )
        return
    if one["package"] is None:
        yield Advice("not measured; install dask-memusage-exporter there.")
    elif one["source"] == "missing":
        if measures:
            yield Advice("not measured; see the log there for a line of dask-memusage.")
    elif one["source"] == "polling":
        yield Advice(f"peaks are only sampled: {one['why']}.", wrong=False)
    if one["source"] != "jemalloc":
        yield from _of_jemalloc(one)


def _of_jemalloc(one: Mapping[str, Any]) -> Iterator[Advice]:
    """Tell a worker that is not on it why, if somebody wanted it or it has use for it."""
    for name in one["lower_cased"]:
        yield _does_nothing(name)
    if one["refusal"] is not None:
        yield Advice(f"the nanny could not turn jemalloc on: {one['refusal']}.")
    elif _in_vain(one["environment"], one["why"]):
        yield Advice(
            f"started with LD_PRELOAD={one['environment']['LD_PRELOAD']}, and "
            f"jemalloc is not used: {_obstacle(one['why'])}."
        )
    elif one["source"] == "kernel" and one["threads"] > 1:
        way = (
            "set memusage.jemalloc: true, or call install(client, jemalloc=True)"
            if one["nanny"]
            else "there is no nanny: start it with the variables that `dask memusage doctor` "
            "prints on that machine"
        )
        yield Advice(
            f"{plural(one['threads'], 'thread')}, and tasks that overlap have no "
            f"growth of their own without jemalloc ({_obstacle(one['why']) or one['why']}); {way}.",
            wrong=False,
        )


def _of_scrapes(cluster: Cluster) -> Iterator[Advice]:
    """Name the workers that nobody scrapes where others are; where none is, nobody wants to."""
    measured = {
        address: one
        for address, one in cluster.workers.items()
        if one["answered"] and one["source"] != "missing"
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
