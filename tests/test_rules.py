"""The rules as a whole: their settings, names, pages, and the examples that are ready to start."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dask_memusage_exporter import catalog
from dask_memusage_exporter.health import DROP_REASONS
from dask_memusage_exporter.monitoring.rules import rules, thresholds
from tests.promtool import Promtool

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "dask_memusage_exporter" / "monitoring"
RUNBOOKS = ROOT / "docs" / "runbooks"
TEMPLATE = (MONITORING / "rules.yaml").read_text()


@cache
def groups() -> list[dict[str, Any]]:
    """Return the rules of all groups, parsed."""
    return [rule for group in yaml.safe_load(rules())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    ("namespace", "given"),
    [
        ("dask", {}),
        ("acme", {}),
        ("", {}),
        (
            "dask",
            {
                "regression-percent": "12.5",
                "regression-recent": "1h30m",
                "event-seconds": 60,
                "group-labels": "",
                "selector": 'job="dask", namespace=~"team-.*"',
                "runbook-base": "https://example.org/runbooks/",
            },
        ),
    ],
)
def test_prometheus_accepts_the_rules(
    namespace: str, given: dict[str, object], component: Callable[[str], str], tmp_path: Path
) -> None:
    """With any namespace and any settings; every metric's name follows the namespace."""
    text = rules(namespace, given)
    (tmp_path / "rules.yaml").write_text(text)
    promtool = Promtool(component("promtool"), tmp_path)
    found = promtool.run("check", "rules", str(tmp_path / "rules.yaml"))
    assert f"SUCCESS: {len(groups())} rules found" in found
    assert "%NAMESPACE%" not in text
    start = f"{namespace}_scheduler_" if namespace else "scheduler_"
    names = set(re.findall(r"\b\w*scheduler_\w+", text))
    assert names
    assert all(name.startswith(start) for name in names)


def test_the_template_is_yaml_and_gives_the_same_by_plain_replacement() -> None:
    """As the chart does it: placeholders are replaced one after the other, nothing is parsed."""
    assert yaml.safe_load(TEMPLATE)["groups"]
    text = TEMPLATE.replace("%NAMESPACE%", "dask")
    for name, spec in thresholds().items():
        text = text.replace(f"%{name}%", str(spec["default"]))
    assert text == rules()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"regression-percnt": 20}, "did you mean regression-percent"),
        ({"nonsense": 1}, "there are regression-percent, "),
        ({"regression-percent": "20%"}, "is not a number of percent from 1 to 1000"),
        ({"regression-percent": 0}, "is not a number of percent from 1 to 1000"),
        ({"regression-percent": "1e2"}, "is not a number"),
        ({"errors": True}, "is not a number"),
        ({"errors": "nan"}, "is not a number"),
        ({"errors": -1}, "is not a number of errors from 0"),
        ({"regression-recent": "1 day"}, "is not a duration from 1s to 31d, such as 90s"),
        ({"regression-recent": 86400}, "is not a duration"),
        ({"regression-recent": "0s"}, "is not a duration"),
        ({"regression-recent": "90d"}, "is not a duration"),
        ({"regression-recent": "30m1h"}, "is not a duration"),
        ({"regression-recent": ""}, "is not a duration"),
        ({"step": "45m"}, "gap: 1h is less than 2 x step, which is 45m; raise gap or lower step"),
        ({"regression-recent": "90s"}, "is less than 1 x step, which is 2m"),
        ({"group-labels": "name space"}, "is not a list of labels such as namespace, dask_cluster"),
        ({"selector": "job=dask"}, 'is not a list of label matchers such as job="dask"'),
        ({"selector": 'job="dask"} or vector(1)'}, "is not a list of label matchers"),
        ({"selector": 'job="dask",\nnamespace="x"'}, "is not a list of label matchers"),
        ({"selector": 'job=~"(dask"'}, "is not a list of label matchers"),
        ({"runbook-base": 'x"\ny: z'}, "is not a path or address"),
        ({"runbook-base": ""}, "is not a path or address"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(given: dict[str, object], says: str) -> None:
    """It names the setting, and what is allowed or meant."""
    with pytest.raises(ValueError, match=r"\A.+\Z") as raised:
        rules("dask", given)
    (name,) = given
    assert ("gap" if name == "step" else name) in str(raised.value)
    assert says in str(raised.value)


def test_a_wrong_namespace_is_one_clear_line() -> None:
    """It would be no metric's name."""
    with pytest.raises(ValueError, match="cannot begin a metric's name"):
        rules("my-dask")


def test_every_setting_is_used() -> None:
    """Each stands in the rules, and nothing else does."""
    used = set(re.findall(r"%([a-z-]{3,})%", TEMPLATE))
    assert used == thresholds().keys()


def _of_the_catalog(server: str) -> set[str]:
    names = set()
    for metric in catalog.METRICS:
        if server in metric.on:
            suffixes = {
                "counter": ("_total",),
                "info": ("_info",),
                "histogram": ("_bucket", "_sum", "_count"),
            }.get(metric.kind, ("",))
            names |= {f"dask_{server}_{metric.name}{suffix}" for suffix in suffixes}
    return names


def _metrics_in(expression: str) -> set[str]:
    # Neither what rules record, which has colons, nor what is in quotes.
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"(?<![\w:])dask_(?:scheduler|worker)_\w+(?![\w:])", bare))


def test_every_metric_of_the_rules_is_ours_and_the_schedulers() -> None:
    """By the catalog; Dask's own number of workers is the one exception."""
    used = set().union(*(_metrics_in(rule["expr"]) for rule in groups()))
    assert used <= _of_the_catalog("scheduler") | {"dask_scheduler_workers"}
    assert len(used) > 10
    recorded = {rule["record"] for rule in groups() if "record" in rule}
    named = set().union(
        *(re.findall(r"\w+:dask_\w+:\w+", rule["expr"]) for rule in groups()),
        *(re.findall(r"\w+:dask_\w+:\w+", str(rule.get("annotations"))) for rule in groups()),
    )
    assert named == recorded


#: The part of the template whose settings reach alerts by what is recorded.
RECORDED = TEMPLATE[: TEMPLATE.index("- alert:")]
ALERTS = {rule["alert"]: rule for rule in groups() if "alert" in rule}


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    """One page each, of the alert's name, with the same order of questions."""
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == ALERTS.keys()
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}, name
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
        assert (ROOT / alert["annotations"]["runbook_url"]).exists()
        assert {"summary", "description", "runbook_url"} == alert["annotations"].keys()
        text = (RUNBOOKS / f"{name}.md").read_text()
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert headings == [
            "What it means", "How bad it is", "Look first", "Do now", "Do later",
            "When it is a false alarm", "Tune or silence",
        ], name  # fmt: skip
        assert text.startswith(f"# {name}\n")


@pytest.mark.parametrize("name", ALERTS)
def test_queries_of_the_runbooks_are_right(
    name: str, component: Callable[[str], str], tmp_path: Path
) -> None:
    """Prometheus can parse each, each metric exists, and each setting that is named does."""
    text = (RUNBOOKS / f"{name}.md").read_text()
    queries = re.findall(r"^```promql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert queries
    listed = [{"record": f"query{n}", "expr": query} for n, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "runbook", "rules": listed}]})
    )
    promtool = Promtool(component("promtool"), tmp_path)
    promtool.run("check", "rules", str(tmp_path / "rules.yaml"))
    recorded = {rule["record"] for rule in groups() if "record" in rule}
    ours = _of_the_catalog("scheduler") | _of_the_catalog("worker")
    for query in queries:
        assert set(re.findall(r"\w+:dask_\w+:\w+", query)) <= recorded
        assert {one for one in _metrics_in(query) if "_task_memory_" in one} <= ours
    tuned = text[text.index("## Tune or silence") :]
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", tuned)) & thresholds().keys()
    used = set(re.findall(r"%([a-z-]{3,})%", _template_of(name) + RECORDED))
    assert named, "no setting is named"
    assert named <= used
    for setting, default in re.findall(r"`([a-z-]+)` \(([^)]+)\)", tuned):
        assert default == str(thresholds()[setting]["default"])


def _template_of(name: str) -> str:
    start = TEMPLATE.index(f"- alert: {name}\n")
    return TEMPLATE[start : TEMPLATE.find("- alert:", start + 1)]


def test_the_examples_are_right(component: Callable[[str], str], tmp_path: Path) -> None:
    """Prometheus and Alertmanager accept the configurations as they are, beside the rules."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "dask-memusage.yaml").write_text(rules())
    for name in ("prometheus.yml", "alertmanager.yml"):
        (tmp_path / name).write_text((MONITORING / name).read_text())
    promtool = Promtool(component("promtool"), tmp_path)
    found = promtool.run("check", "config", str(tmp_path / "prometheus.yml"))
    assert f"{len(groups())} rules found" in found
    amtool = Promtool(component("amtool"), tmp_path)
    assert "SUCCESS" in amtool.run("check-config", str(tmp_path / "alertmanager.yml"))
    # Alerts and labels that it speaks of are ours.
    told = yaml.safe_load((tmp_path / "alertmanager.yml").read_text())["inhibit_rules"]
    for matcher in (one for rule in told for side in rule.values() for one in side if "=" in one):
        label, values = re.fullmatch(r'(\w+)=~?"(.+)"', matcher).groups()  # type: ignore[union-attr]
        known = set(ALERTS) if label == "alertname" else set(DROP_REASONS)
        assert set(values.split("|")) <= known, matcher


def test_what_stands_in_comments_of_the_scrape_configuration_is_right(
    component: Callable[[str], str], tmp_path: Path
) -> None:
    """With the commented jobs switched on as well; Debian's Prometheus knows no Kubernetes."""
    text = (MONITORING / "prometheus.yml").read_text()
    config = yaml.safe_load(re.sub(r"^  #(- |  )", r"  \1", text, flags=re.MULTILINE))
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert len(jobs) == len(config["scrape_configs"]) == 5
    pods = jobs["dask-scheduler-kubernetes"]
    assert pods.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    pods["file_sd_configs"] = jobs["dask-scheduler-files"]["file_sd_configs"]
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "dask-memusage.yaml").write_text(rules())
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool = Promtool(component("promtool"), tmp_path)
    promtool.run("check", "config", str(tmp_path / "prometheus.yml"))
