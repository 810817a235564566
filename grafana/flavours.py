"""What the same series is called where it was scraped, and where OTLP brought it.

Queries are written with ``<name>`` for a metric of our catalog as the scheduler exposes it,
``<worker:name>`` for a worker's own and ``<dask:name>`` for one of Dask's. :func:`expand` puts in
the flavour's name with the dashboard's variables as matchers, and the flavour's labels;
``<cluster>`` stands for those by which series of one cluster are matched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from dask_memusage_exporter import catalog

#: Where the metric namespace goes in the package's templates.
NAMESPACE = "%NAMESPACE%"

#: Metrics of Dask's that panels use, by what stands between namespace and labels, and whether they
#: have ``task_prefix_name``. As distributed 2025.1 and newer show them.
DASKS_OWN = {
    "scheduler_workers": False,
    "scheduler_workers_removed_total": False,
    "scheduler_tasks_compute_seconds_total": True,
    "scheduler_tasks_suspicious_total": True,
    "worker_memory_bytes": False,
    "worker_spill_bytes_total": False,
}

#: What sample names have beyond the family's.
_SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_info")

_SERIES = re.compile(r"<(?:(worker|dask):)?(\w+)(?:\{([^<>]*)\})?>")


class NoInstrument(Exception):  # noqa: N818  # an answer, not an error
    """The flavour has no such series; the panel is omitted."""


class Flavour(NamedTuple):
    """One way in which our metrics come into the store."""

    name: str
    #: Before the dashboard's own part of its uid.
    uid: str
    title: str
    #: Dashboard variables and the labels that they select by.
    selectors: Mapping[str, str]
    #: ``<cluster>`` in queries: what a scheduler's series and its workers' limits have in common.
    cluster: str
    #: Other names of labels.
    labels: Mapping[str, str]

    def label(self, name: str) -> str:
        """Return what a label of the catalog is called."""
        return self.labels.get(name, name)

    def rename(self, text: str) -> str:
        """Return a query, or a template of labels, with this flavour's labels."""
        if not self.labels:
            return text
        known = "|".join(self.labels)
        return re.sub(rf"\b({known})\b", lambda found: self.labels[found[1]], text)


SCRAPE = Flavour(
    "scrape",
    "dask-memusage",
    "",
    {"namespace": "namespace", "job": "job", "dask_cluster": "dask_cluster"},
    "namespace, dask_cluster, instance",
    {},
)
OTLP = Flavour(
    "otlp",
    "dask-memusage-otlp",
    " (OTLP)",
    # No job: there it tells workers from the scheduler, and panels need both.
    {"namespace": "k8s_namespace_name", "dask_cluster": "dask_cluster"},
    # The limits are workers' own there.
    "k8s_namespace_name, dask_cluster",
    {
        **{label: name.replace(".", "_") for label, name in catalog.ATTRIBUTES.items()},
        "instance": "dask_worker_address",
    },
)
FLAVOURS = (SCRAPE, OTLP)


def expand(expression: str, flavour: Flavour, prefix: str | None = None) -> str:
    """Return a query in a flavour's names.

    Parameters
    ----------
    expression
        A query with ``<name>``, see the module.
    flavour
        Whose names.
    prefix
        The matcher on ``task_prefix_name`` of series that have it; None: none.

    Raises
    ------
    NoInstrument
        The flavour has not all of the series.
    """

    def series(found: re.Match[str]) -> str:
        whose, name, more = found.groups()
        full, has_prefix = _name(whose, name, flavour)
        matchers = [f'{label}=~"${variable}"' for variable, label in flavour.selectors.items()]
        if prefix is not None and has_prefix:
            matchers.append(prefix)
        if more:
            matchers.append(more)
        return f"{full}{{{', '.join(matchers)}}}"

    expression = expression.replace("<cluster>", flavour.cluster)
    return flavour.rename(_SERIES.sub(series, expression))


def _name(whose: str | None, name: str, flavour: Flavour) -> tuple[str, bool]:
    """Return a sample's full name, and whether it has the label of the prefix."""
    if whose == "dask":
        if flavour is OTLP:
            raise NoInstrument(name)
        return f"{NAMESPACE}_{name}", DASKS_OWN[name]
    suffix = next((one for one in _SUFFIXES if name.endswith(one)), "")
    if name in catalog.BY_NAME:
        suffix = ""
    spec = catalog.BY_NAME[name.removesuffix(suffix)]
    has_prefix = "task_prefix_name" in spec.labels
    if flavour is OTLP:
        return otlp_name(spec) + suffix, has_prefix
    server = whose or "scheduler"
    if server not in spec.on:
        raise ValueError(f"the {server} has no {spec.name}")
    return f"{NAMESPACE}_{server}_{name}", has_prefix


def otlp_name(spec: catalog.MetricSpec) -> str:
    """Return an instrument's name as Prometheus and VictoriaMetrics translate it, no suffix.

    See "OTLP Metric points to Prometheus" in OpenTelemetry's specification of compatibility.
    """
    if spec.name == "task_memory_worker_limit_bytes":
        # The scheduler's smallest is the smallest of the workers' own.
        spec = catalog.BY_NAME["memory_limit_bytes"]
    if spec.otel is None:
        raise NoInstrument(spec.name)
    unit = {"By": "_bytes", "s": "_seconds"}.get(spec.otel.unit, "")
    return spec.otel.name.replace(".", "_") + unit
