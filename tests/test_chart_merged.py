"""What is given in more than one of the chart's values, or in none: which wins, each once."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.charts import CHART, Helm, of_kind, pods, settings, snippet, the

PRESET = settings(monitors__preset="operator")


@pytest.mark.parametrize("given", [["mine", "dask_memusage_exporter"], "mine"])
def test_other_preloads_stay(given: Any, helm: Helm) -> None:
    """A preload that is configured beside ours keeps its place, and ours is not named twice."""
    mine = {"distributed": {"scheduler": {"preload": given}}}
    configured = helm.render(*PRESET, *settings(config__dask=mine))
    text = the(configured, "ConfigMap", "-dask")["data"]["dask-memusage.yaml"]
    assert yaml.safe_load(text)["distributed"]["scheduler"]["preload"] == [
        "mine",
        "dask_memusage_exporter",
    ]


@pytest.mark.parametrize("kind", ["none", "plain", "operator"])
def test_configuration_may_be_emptied(kind: str, helm: Helm) -> None:
    """`memusage:` and `dask:` with nothing below them are no settings: no flight directory."""
    preset = "dask" if kind == "none" else ""
    asked = settings(cluster__kind=kind, monitors__preset=preset)
    asked += settings(config__memusage=None, config__dask=None)
    rendered = helm.render(*asked)
    text = the(rendered, "ConfigMap", "-dask")["data"]["dask-memusage.yaml"]
    assert "memusage" not in yaml.safe_load(text)
    for pod in pods(rendered):
        assert "flight" not in {one["name"] for one in pod.spec["volumes"]}
    if kind == "none":
        assert "flight" not in helm.notes(*asked)


@pytest.mark.parametrize("kind", ["plain", "operator"])
def test_a_variable_that_is_given_twice_is_there_once(kind: str, helm: Helm) -> None:
    """The role's own wins over that for all, which wins over the chart's; order stays."""
    service = {"name": "OTEL_SERVICE_NAME"}
    home = {"name": "HOME", "value": "/var/lib/dask-scratch"}
    asked = settings(
        cluster__kind=kind,
        config__environment=[{**service, "value": "all"}, home],
        cluster__worker__environment=[{**service, "value": "workers"}],
    )
    found = {}
    for pod in pods(helm.render(*asked)):
        if pod.where.startswith("Pod"):
            continue
        (container,) = pod.spec["containers"]
        names = [one["name"] for one in container["env"]]
        assert len(names) == len(set(names))
        assert home in container["env"]
        assert names.index("K8S_NODE_NAME") < names.index("OTEL_RESOURCE_ATTRIBUTES")
        values = {one["name"]: one.get("value") for one in container["env"]}
        found[container["name"]] = values["OTEL_SERVICE_NAME"]
    assert found == {"scheduler": "all", "worker": "workers"}


def test_additional_labels_are_on_every_kind_that_an_operator_selects(helm: Helm) -> None:
    """Monitors and rules have the labels they are selected by, in the namespaces given."""
    label = {"release": "kube-prometheus-stack"}
    rendered = helm.render(
        *PRESET,
        *settings(
            monitors__additionalLabels=label, rules__additionalLabels=label,
            monitors__workers__enabled=True, monitors__namespace="monitoring",
            rules__namespace="alerts", monitors__namespaceSelector={"matchNames": ["a", "b"]},
        ),
    )  # fmt: skip
    for kind, namespace in (
        ("ServiceMonitor", "monitoring"),
        ("PodMonitor", "monitoring"),
        ("PrometheusRule", "alerts"),
    ):
        one = the(rendered, kind)
        assert label.items() <= one["metadata"]["labels"].items()
        assert one["metadata"]["namespace"] == namespace
        if "Monitor" in kind:
            assert one["spec"]["namespaceSelector"] == {"matchNames": ["a", "b"]}


def test_a_label_that_is_given_twice_is_there_once(helm: Helm) -> None:
    """The narrower value wins, and none changes what selectors go by."""
    asked = settings(
        commonLabels={"release": "all", "app.kubernetes.io/instance": "x", "dask_cluster": "x"},
        monitors__additionalLabels={"release": "monitors"},
        rules__additionalLabels={"release": "rules"},
        dashboards__label="release",
        cluster__worker__podLabels={"release": "workers", "app.kubernetes.io/component": "x"},
        cluster__worker__podAnnotations={"prometheus.io/scrape": "false"},
    )
    for kind in ("plain", "operator"):
        rendered = helm.render(*asked, *settings(cluster__kind=kind), dashboards=True)
        found = {one["kind"]: one["metadata"]["labels"]["release"] for one in rendered}
        assert found.pop("ServiceMonitor") == "monitors"
        assert found.pop("PrometheusRule") == "rules"
        assert found.pop("ConfigMap") == "1"
        assert set(found.values()) == {"all"}
        assert {one["metadata"]["labels"]["app.kubernetes.io/instance"] for one in rendered} == {
            "measured"
        }
    plain = helm.render(
        *asked, *settings(cluster__kind="plain", monitors__workers__enabled=True), apis=()
    )
    worker = the(plain, "Deployment", "-worker")["spec"]
    metadata = worker["template"]["metadata"]
    assert worker["selector"]["matchLabels"].items() <= metadata["labels"].items()
    assert metadata["labels"]["release"] == "workers"
    assert metadata["labels"]["dask_cluster"] == "measured-dask-memusage-exporter"
    assert metadata["annotations"]["prometheus.io/scrape"] == "false"


@pytest.mark.parametrize("kind", ["none", "plain"])
def test_the_package_is_of_the_charts_own_version(kind: str, helm: Helm) -> None:
    """With exporters where OpenTelemetry is asked for, by all or by a role; what is given wins."""
    preset = settings(cluster__kind=kind, monitors__preset="dask" if kind == "none" else "")
    endpoint = [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}]

    def installed(**values: Any) -> str:
        asked = [*preset, *settings(**values)]
        if kind == "none":
            lines = snippet(helm.notes(*asked), "scheduler:")
            (given,) = {
                one["value"]
                for role in ("scheduler", "worker")
                for one in lines[role]["env"]
                if one["name"] == "EXTRA_PIP_PACKAGES"
            }
            return given
        (given,) = {
            pod.spec["initContainers"][0]["args"][-1]
            for pod in pods(of_kind(helm.render(*asked), "Deployment"))
        }
        return given

    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert installed() == f"dask-memusage-exporter=={version}"
    with_exporters = f"dask-memusage-exporter[otlp]=={version}"
    assert installed(config__environment=endpoint) == with_exporters
    if kind == "plain":
        assert installed(cluster__worker__environment=endpoint) == with_exporters
    assert installed(config__environment=endpoint, package__requirement="mine") == "mine"
