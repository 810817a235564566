"""The dashboards' variables: whose series are shown, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

from grafana.flavours import Flavour, expand
from grafana.panels import Dashboard

#: Every panel, annotation and variable asks the data source that is chosen.
DATASOURCE = model.DataSourceRef("prometheus", "${datasource}")

#: There wherever anything of ours is, and has every prefix.
_ANY = "<task_memory_prefixes>"
_TASKS = "<task_memory_tasks_total>"
#: What the jobs of one cluster may be apart by: ours, Dask's own of the scheduler, the workers'.
_OF_JOBS = (_ANY, "<dask:scheduler_workers>", "<dask:worker_memory_bytes>")
_LARGEST = "max by (task_prefix_name) (max_over_time(<task_memory_peak_maximum_bytes>[$__range]))"
#: One whose tasks were all killed has no peak, and is the one to look at.
_KILLED = "max by (task_prefix_name) (last_over_time(<task_memory_killed_tasks_total>[$__range]))"

#: For how long back the baseline looks for clusters.
BASELINES = ("1d", "7d", "28d")

_ALL = model.VariableOption(True, ["All"], ["$__all"])

_LABELS = {
    "namespace": ("Namespace", "Kubernetes namespace, or whatever the label namespace says."),
    "job": (
        "Job",
        "Prometheus job. Leave one out where two scrape the same page: they count twice.",
    ),
    "dask_cluster": ("Cluster", "The label dask_cluster, which the scrape configuration puts on."),
}


def variables(what: Dashboard, flavour: Flavour) -> Iterator[Builder[model.VariableModel]]:
    """Return the builders of a dashboard's variables, each narrowed by those before it."""
    yield (
        dashboard.DatasourceVariable("datasource")
        .label("Data source")
        .type("prometheus")
        .current(model.VariableOption(False, "", ""))
    )
    chosen: list[str] = []
    for name, label in flavour.selectors.items():
        title, description = _LABELS[name]
        matchers = ", ".join(f'{flavour.selectors[one]}=~"${one}"' for one in chosen)
        if name == "job":
            names = "|".join(_metric(one, flavour) for one in _OF_JOBS)
            series = f'{{__name__=~"{names}", {matchers}}}'
        else:
            series = f"{_metric(_ANY, flavour)}{{{matchers}}}"
        query = f"label_values({series}, {label})"
        yield (
            _query(name, title, description, query)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(_ALL)
        )
        chosen.append(name)
    label = flavour.label("task_prefix_name")
    about = "Kinds of task, as Dask names them; __overflow__ stands for all beyond the limit."
    if what.prefix == "many":
        query = f"label_values({expand(_TASKS, flavour)}, {label})"
        prefix = _query("prefix", "Task prefix", about, query).multi(True).include_all(True)
        # With prefixes of several lines, whose breaks are no `.` before Prometheus 3.
        yield prefix.all_value("(?s:.*)").current(_ALL)
    elif what.prefix == "one":
        # Largest peak first, so that a page which nobody has chosen for shows what matters most.
        largest = expand(f"sort_desc({_LARGEST} or 0 * ({_KILLED} > 0))", flavour)
        prefix = _query("prefix", "Task prefix", about, f"query_result({largest})")
        yield (
            # Grafana's text of a series has no escapes; nothing behind the label has a quote.
            prefix.regex(rf'/{label}="([\s\S]+)"/')
            .sort(model.VariableSort.DISABLED)
            .multi(False)
            .include_all(False)
        )
    if what.baseline:
        yield (
            dashboard.CustomVariable("baseline")
            .label("Baseline")
            .description("Compare with what clusters seen in this time before the range had run.")
            .values(",".join(BASELINES))
            .current(model.VariableOption(True, "7d", "7d"))
            .options([model.VariableOption(one == "7d", one, one) for one in BASELINES])
        )


def carried(what: Dashboard, flavour: Flavour) -> str:
    """Return all variables but the prefix, as a link to another dashboard carries them."""
    names = ["datasource", *flavour.selectors, *(["baseline"] if what.baseline else [])]
    return "&".join(f"${{{name}:queryparam}}" for name in names)


def _metric(series: str, flavour: Flavour) -> str:
    """Return a series' name, with no matchers."""
    return expand(series, flavour).partition("{")[0]


def _query(name: str, title: str, description: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(title)
        .description(description)
        .datasource(DATASOURCE)
        .query({"query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )
