"""What the chart's values do: each part on and off, names and labels, configuration, fallbacks."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dask_memusage_exporter import catalog, monitoring
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.monitoring import rules
from tests.charts import (
    MONITORING,
    OPERATOR,
    VALUES,
    Helm,
    of_kind,
    options,
    pods,
    settings,
    the,
)

PRESET = settings(monitors__preset="operator")


@pytest.mark.parametrize("namespace", ["dask", "acme", ""])
def test_rules_and_dashboards_follow_the_namespace(
    namespace: str, helm: Helm, component: Callable[[str], str], tmp_path: Path
) -> None:
    """Rules are the command line's and pass promtool; dashboards have no other name in them."""
    given = {"regression-percent": 35, "dropped-records": 1_000_000, "selector": 'job="dask"'}
    asked = settings(metricNamespace=namespace, rules__thresholds=given)
    rendered = helm.render(*PRESET, *asked, dashboards=True)
    groups = the(rendered, "PrometheusRule")["spec"]
    assert groups == yaml.safe_load(rules.rules(namespace, given))
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    done = subprocess.run(
        [component("promtool"), "check", "rules", str(tmp_path / "rules.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    boards = [
        one for one in of_kind(rendered, "ConfigMap") if "dask-memusage.yaml" not in one["data"]
    ]
    text = "".join(board for one in boards for board in one["data"].values())
    names = set(re.findall(r"\b(\w*)scheduler_task_memory_\w+", text))
    assert names == {f"{namespace}_" if namespace else ""}
    for one in boards:
        (board,) = one["data"].values()
        assert json.loads(board)["title"]
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "Dask"}
    configured = yaml.safe_load(the(rendered, "ConfigMap", "-dask")["data"]["dask-memusage.yaml"])
    assert configured["distributed"]["dashboard"]["prometheus"]["namespace"] == namespace


def test_no_label_of_ours_is_a_targets(helm: Helm) -> None:
    """What the Prometheus operator and our relabelling put on a target is on no metric of ours."""
    of_target = {"job", "instance", "namespace", "service", "pod", "container", "endpoint", "node"}
    of_target |= {"dask_cluster", "prometheus", "prometheus_replica"}
    labels = {label for metric in catalog.METRICS for label in metric.labels}
    assert labels
    assert not labels & of_target


@pytest.mark.parametrize("values", VALUES, ids=lambda one: one.stem)
def test_what_the_configuration_says_is_what_the_package_takes(values: Path, helm: Helm) -> None:
    """Every rendered `memusage` section is accepted as it stands, and the preload is named once."""
    import dask

    given = the(helm.render(*options(values)), "ConfigMap", "-dask")["data"]["dask-memusage.yaml"]
    configured = yaml.safe_load(given)
    with dask.config.set(configured):
        assert Settings.load().flight_directory == "/var/lib/dask-memusage"
    assert configured["distributed"]["scheduler"]["preload"] == ["dask_memusage_exporter"]


def test_every_part_can_be_left_out(helm: Helm) -> None:
    """With all of `.enabled` off there is nothing; a cluster has its configuration with it."""
    off = settings(
        monitors__enabled=False, rules__enabled=False, dashboards__enabled=False,
        config__enabled=False, tests__enabled=False,
    )  # fmt: skip
    assert helm.render(*off, dashboards=True) == []
    bare = settings(
        cluster__kind="plain", cluster__networkPolicy__enabled=False,
        cluster__worker__podDisruptionBudget__enabled=False, cluster__serviceAccount__create=False,
    )  # fmt: skip
    kinds = sorted(one["kind"] for one in helm.render(*off, *bare))
    assert kinds == ["ConfigMap", "Deployment", "Deployment", "Service"]
    everything = settings(
        cluster__kind="plain", cluster__scheduler__podDisruptionBudget__enabled=True
    )
    kinds = [one["kind"] for one in helm.render(*everything)]
    assert not {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"} & set(kinds)
    assert kinds.count("NetworkPolicy") == kinds.count("PodDisruptionBudget") == 2


def test_workers_are_not_scraped_unless_asked_for(helm: Helm) -> None:
    """Hundreds of workers' pages are for whoever wants them; the scheduler's page has all tasks."""
    for values in (PRESET, settings(cluster__kind="plain")):
        kinds = [one["kind"] for one in helm.render(*values)]
        assert kinds.count("ServiceMonitor") == 1
        assert "PodMonitor" not in kinds


def test_exemplars_are_scraped_beside_the_rest_and_nothing_twice(
    helm: Helm, tmp_path: Path
) -> None:
    """By a second endpoint under another job; the first drops what that one has, and no more."""
    mine = {"action": "labeldrop", "regex": "pod"}
    asked = settings(
        monitors__exemplars__enabled=True, monitors__workers__enabled=True,
        monitors__scheduler__metricRelabelings=[mine],
    )  # fmt: skip
    rendered = helm.render(*PRESET, *asked)
    first, second = the(rendered, "ServiceMonitor")["spec"]["endpoints"]
    assert (first["path"], second["path"]) == ("/metrics", "/memusage/metrics")
    assert second["port"] == first["port"]
    of_cluster, job = second["relabelings"]
    assert first["relabelings"] == [of_cluster]
    assert job == {"sourceLabels": ["job"], "targetLabel": "job", "replacement": "${1}-exemplars"}
    drop, *others = first["metricRelabelings"]
    assert others == second["metricRelabelings"] == [mine]
    (workers,) = the(rendered, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert "metricRelabelings" not in workers

    assert (drop["action"], drop["sourceLabels"]) == ("drop", ["__name__"])
    # The package's example of a configuration, which a real Prometheus runs by, has the same.
    assert drop["regex"] in monitoring.files()["prometheus.yml"]
    ours = [f"dask_scheduler_{one.name}" for one in catalog.METRICS if "scheduler" in one.on]
    assert all(re.fullmatch(drop["regex"], name) for name in ours)
    assert not re.fullmatch(drop["regex"], "dask_scheduler_tasks_compute_seconds_total")
    notes = helm.notes_where((MONITORING,), tmp_path, *PRESET, *asked)
    assert "enableFeatures: [exemplar-storage]" in notes


def test_the_resource_of_opentelemetry_has_namespace_and_node(helm: Helm) -> None:
    """Where it is asked for, and nobody has set it; pods have no token to find it out with."""

    def environment(*variables: dict[str, str]) -> list[dict[str, Any]]:
        asked = settings(cluster__kind="plain", config__environment=list(variables))
        (pod, _) = pods(of_kind(helm.render(*asked), "Deployment"))
        (container,) = pod.spec["containers"]
        return [one for one in container["env"] if one["name"] == "OTEL_RESOURCE_ATTRIBUTES"]

    endpoint = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}
    mine = {"name": "OTEL_RESOURCE_ATTRIBUTES", "value": "a=b"}
    (found,) = environment(endpoint)
    assert found["value"] == "k8s.namespace.name=science,k8s.node.name=$(K8S_NODE_NAME)"
    assert environment(endpoint, mine) == [mine]
    assert environment() == []


def test_without_the_kinds_a_cluster_of_its_own_has_annotations(helm: Helm) -> None:
    """A scheduler is scraped once: its pod has them, or one Service for the operator's."""
    both = settings(monitors__workers__enabled=True)
    wanted = {"prometheus.io/scrape": "true", "prometheus.io/path": "/metrics"}
    plain = helm.render(*settings(cluster__kind="plain"), *both, apis=())
    ports = []
    for pod in pods(of_kind(plain, "Deployment")):
        assert wanted.items() <= pod.metadata["annotations"].items()
        (container,) = pod.spec["containers"]
        named = {one["name"]: one["containerPort"] for one in container["ports"]}
        port = pod.metadata["annotations"]["prometheus.io/port"]
        assert port == str(named["http-dashboard"])
        ports.append(port)
    assert ports == ["8787", "8788"]
    assert not any("annotations" in one["metadata"] for one in of_kind(plain, "Service"))

    operators = helm.render(*settings(cluster__kind="operator"), *both, apis=(OPERATOR,))
    cluster = the(operators, "DaskCluster")["spec"]
    assert "prometheus.io/scrape" not in cluster["scheduler"]["metadata"]["annotations"]
    assert cluster["worker"]["metadata"]["annotations"]["prometheus.io/port"] == "8788"
    metrics = the(operators, "Service")
    assert wanted.items() <= metrics["metadata"]["annotations"].items()
    assert metrics["metadata"]["annotations"]["prometheus.io/port"] == "8787"
    with_kinds = helm.render(*settings(cluster__kind="operator"), *both)
    assert not of_kind(with_kinds, "Service")
    assert "prometheus.io" not in yaml.safe_dump(of_kind(with_kinds, "DaskCluster"))


def test_a_new_generation_is_a_new_cluster(helm: Helm) -> None:
    """The operator changes no running cluster: its name changes, and all that refers to it."""

    def names(generation: int) -> set[str]:
        asked = settings(cluster__kind="operator", cluster__operator__generation=generation)
        asked += settings(cluster__operator__autoscaler__enabled=True)
        rendered = helm.render(*asked)
        cluster = the(rendered, "DaskCluster")
        name = cluster["metadata"]["name"]
        assert the(rendered, "DaskAutoscaler")["spec"]["cluster"] == name
        for one in (the(rendered, "ServiceMonitor"), the(rendered, "PodDisruptionBudget")):
            assert one["spec"]["selector"]["matchLabels"]["dask.org/cluster-name"] == name
        assert cluster["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == name
        return {name}

    found = names(0) | names(1) | names(12)
    assert found == {
        "measured-dask-memusage-exporter", "measured-dask-memusage-exporter-1",
        "measured-dask-memusage-exporter-12",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "operator"])
def test_what_tasks_put_into_tmp_is_bounded_as_their_spills_are(kind: str, helm: Helm) -> None:
    """A small bound that no value raises would have workers evicted for files of their tasks."""
    asked = settings(cluster__kind=kind, cluster__worker__scratchSize="77Gi")
    (worker,) = (one for one in pods(helm.render(*asked)) if one.where.endswith("worker"))
    bounds = {one["name"]: one.get("emptyDir") for one in worker.spec["volumes"]}
    assert bounds["tmp"] == bounds["scratch"] == {"sizeLimit": "77Gi"}
