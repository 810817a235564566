"""The dashboards' JSON: current, complete, at home in any Grafana, and true to the catalog."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dask_memusage_exporter import catalog, monitoring
from tests.conftest import page, wait_until
from tests.grafana_panels import panels, targets
from tests.servers import Servers

ROOT = Path(__file__).parent.parent

output = pytest.importorskip("grafana.output", reason="grafana-foundation-sdk wants Python 3.11")
flavours = pytest.importorskip("grafana.flavours")


def dashboards(flavour: str, namespace: str = "dask") -> dict[str, Any]:
    """Return the dashboards of a flavour by their file's name."""
    return {
        Path(path).stem: json.loads(text)
        for path, text in monitoring.files(flavour, namespace).items()
        if path.startswith("dashboards/")
    }


ALL = {
    f"{flavour}-{name}": dashboard
    for flavour in monitoring.FLAVOURS
    for name, dashboard in dashboards(flavour).items()
}

#: Where generated JSON stands.
FOLDERS = ("dask_memusage_exporter/monitoring/dashboards", "grafana/dashboards", "grafana/otlp")
PAGES = "dask_memusage_exporter/monitoring/runbooks"

every = pytest.mark.parametrize("dashboard", ALL.values(), ids=ALL)


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Return every query of panels, annotations and variables."""
    return [target.expr for target in targets(dashboard)] + [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]


def names(dashboard: dict[str, Any]) -> set[str]:
    """Return the names of all metrics in its queries."""
    return {name for one in expressions(dashboard) for name in re.findall(r"(\w+)\{", one)}


def test_what_is_generated_is_current() -> None:
    """`make dashboards` would change nothing, and nothing is left of what it no longer writes."""
    made = output.generated()
    for path, text in made.items():
        assert (ROOT / path).read_text() == text, f"{path}: run make dashboards"
    written = {
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in (ROOT / folder).glob("**/*.json")
    } | {f"{PAGES}/{page.name}" for page in (ROOT / PAGES).iterdir()}
    assert written <= set(made)


def test_there_are_four_in_each_flavour() -> None:
    """Overview, prefix, workers, exporter, each with a uid of its own that never changes."""
    assert {dashboard["uid"] for dashboard in ALL.values()} == {
        f"dask-memusage{flavour}-{name}"
        for flavour in ("", "-otlp")
        for name in ("overview", "prefix", "workers", "exporter")
    }
    assert all(len(dashboard["uid"]) <= 40 for dashboard in ALL.values())


@every
def test_panels_explain_themselves(dashboard: dict[str, Any]) -> None:
    """Each has an id of its own, a place of its own, a title, a description and a unit."""
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(dashboard):
        assert len(panel["description"]) > 60, panel["title"]
        assert "  " not in panel["description"]
        config = panel.get("fieldConfig", {})
        if panel["type"] == "table":
            titled = [
                override["matcher"]["options"]
                for override in config["overrides"]
                if any(one["id"] == "unit" for one in override["properties"])
            ]
            assert len(titled) >= len(panel["targets"]), panel["title"]
        elif panel["type"] == "heatmap":
            assert panel["options"]["yAxis"]["unit"] == "bytes"
        else:
            assert config["defaults"]["unit"], panel["title"]
            assert config["defaults"]["noValue"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


@every
def test_the_data_source_is_the_one_that_is_chosen(dashboard: dict[str, Any]) -> None:
    """Of every panel, query, annotation and variable: no uid of the author's, nothing to import."""
    text = json.dumps(dashboard)
    assert "__inputs" not in text
    assert "${DS_" not in text
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    first, *others = dashboard["templating"]["list"]
    assert (first["type"], first["name"], first["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert not first["current"].get("value")
    asked = [
        *(panel for panel in panels(dashboard)),
        *(target for panel in panels(dashboard) for target in panel["targets"]),
        *(variable for variable in others if variable["type"] == "query"),
        *dashboard["annotations"]["list"],
    ]
    assert len(asked) > 20
    assert [one for one in asked if one["datasource"] != chosen] == []


@every
def test_variables_let_series_without_labels_through(dashboard: dict[str, Any]) -> None:
    """Every query has all matchers, and their default matches a label that is not there."""
    chosen = {
        one["name"]: one
        for one in dashboard["templating"]["list"]
        if one["name"] in ("namespace", "job", "dask_cluster")
    }
    assert {"namespace", "dask_cluster"} <= set(chosen)
    for variable in chosen.values():
        assert variable["multi"]
        assert variable["includeAll"]
        assert variable["allValue"] == ".*"
        assert variable["current"]["value"] == ["$__all"]
    for target in targets(dashboard):
        for selector in re.findall(r"\w+\{(.*?)\}", target.expr):
            for name in chosen:
                assert f'=~"${name}"' in selector, target.expr


@every
def test_links_lead_to_dashboards_that_are_there(dashboard: dict[str, Any]) -> None:
    """Of the page and of rows and series, in the same flavour, with all variables and the time."""
    text = json.dumps(dashboard)
    uids = {
        other["uid"]
        for other in ALL.values()
        if ("otlp" in other["uid"]) == ("otlp" in dashboard["uid"])
    }
    linked = set(re.findall(r"/d/([\w-]+)", text))
    assert linked == uids - {dashboard["uid"]} if dashboard["links"] else False
    pages = [link["url"] for link in dashboard["links"]]
    assert all(link["keepTime"] for link in dashboard["links"])
    prefixes = re.findall(r'"url": "(/d/[^"]*var-prefix[^"]*)"', text)
    assert all("${__url_time_range}" in url for url in prefixes)
    chosen = {one["name"] for one in dashboard["templating"]["list"]} - {"prefix"}
    for url in pages + prefixes:
        assert set(re.findall(r"\$\{(\w+):queryparam\}", url)) == chosen


def test_prefixes_lead_to_their_dashboard() -> None:
    """A row of the overview's table, and a line of its graphs."""
    overview = ALL["scrape-overview"]
    links = [
        (panel["title"], one["value"][0]["url"])
        for panel in panels(overview)
        for override in panel["fieldConfig"]["overrides"]
        for one in override["properties"]
        if one["id"] == "links"
    ]
    urls = dict(links)
    row, line = '__data.fields["Task prefix"]', "__field.labels.task_prefix_name"
    assert f"var-prefix=${{{row}:percentencode}}" in urls["Task prefixes by cost"]
    assert f"var-prefix=${{{line}:percentencode}}" in urls["Largest peak by prefix"]


def test_the_histograms_of_a_prefix_show_exemplars() -> None:
    """Its panels of histograms do, so that a task's trace is one click away."""
    shown = {target.panel for target in targets(ALL["scrape-prefix"]) if target.exemplar}
    assert {"Peaks", "Growth", "Peaks: p50, p95, mean, maximum"} <= shown


#: What sample names have beyond the family's.
ENDS = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "info": ("_info",)}


def test_names_are_the_catalogs_or_dasks() -> None:
    """Each metric of a query is one of ours, or of the short list of Dask's, which has no more."""
    ours = {
        f"dask_{server}_{spec.name}{end}"
        for spec in catalog.METRICS
        for server in spec.on
        for end in ENDS.get(spec.kind, ("",))
    }
    used = set().union(*(names(one) for name, one in ALL.items() if name.startswith("scrape")))
    assert used - ours == {f"dask_{name}" for name in flavours.DASKS_OWN}


def test_otlp_names_are_the_instruments() -> None:
    """Each metric of a query for OTLP is an instrument of the catalog's, as it is translated."""
    ours = {
        flavours.otlp_name(spec) + end
        for spec in catalog.METRICS
        if spec.otel is not None
        for end in ENDS.get(spec.kind, ("",))
    }
    used = set().union(*(names(one) for name, one in ALL.items() if name.startswith("otlp")))
    assert used
    assert used <= ours


def test_no_label_of_ours_is_one_of_targets() -> None:
    """What monitors put on every series of a pod is not renamed ``exported_`` for our sake."""
    targets_own = {
        "namespace",
        "pod",
        "container",
        "node",
        "service",
        "endpoint",
        "job",
        "instance",
    }
    ours = {label for spec in catalog.METRICS for label in spec.labels}
    assert not ours & {*targets_own, "dask_cluster", "version", "le", "quantile"}


def test_panels_of_worker_series_are_titled_so() -> None:
    """Where it is scraped: those whose queries have a worker's metric, and no others."""
    for name, dashboard in ALL.items():
        if name.startswith("scrape"):
            of_workers = {t.panel for t in targets(dashboard) if "dask_worker_" in t.expr}
            titled = {p["title"] for p in panels(dashboard) if "(worker series)" in p["title"]}
            assert of_workers == titled
        else:
            assert "(worker series)" not in json.dumps(dashboard)


@pytest.mark.parametrize("namespace", ["acme", ""])
def test_another_namespace_is_followed_everywhere(namespace: str) -> None:
    """No metric in JSON or rules begins with dask_ where the namespace is another."""
    for path, text in monitoring.files("scrape", namespace).items():
        assert "%NAMESPACE%" not in text, path
        if path.startswith(("dashboards/", "rules/")):
            assert not re.search(r"\bdask_(scheduler|worker)_", text), path
    start = f"{namespace}_" if namespace else ""
    for dashboard in dashboards("scrape", namespace).values():
        assert all(
            name.startswith((f"{start}scheduler_", f"{start}worker_")) for name in names(dashboard)
        )


def test_another_namespace_is_what_a_cluster_shows(tmp_path: Path) -> None:
    """Every metric in the queries is on the pages of a cluster whose namespace is acme."""
    servers = Servers(tmp_path)
    environment = {"DASK_DISTRIBUTED__DASHBOARD__PROMETHEUS__NAMESPACE": "acme"}
    try:
        servers.scheduler("--preload", "dask_memusage_exporter", env=environment)
        servers.worker(env=environment)
        servers.client.submit(abs, 1, key="scraped-1").result()

        def shown() -> set[str]:
            ports = [servers.scheduler_port, *servers.worker_ports()]
            text = "".join(page(port) for port in ports)
            families = re.findall(r"^# TYPE (\w+) (\w+)", text, re.MULTILINE)
            return {
                name + end
                for name, kind in families
                for end in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
            }

        used = set().union(*(names(one) for one in dashboards("scrape", "acme").values()))
        wait_until(lambda: used <= shown(), what=lambda: used - shown())
    finally:
        servers.close()
