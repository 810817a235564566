"""Monitors find schedulers and workers of each deployment, each once, with the cluster's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts import Helm, Resource, of_kind, pods, settings, the
from tests.deployments import (
    SCHEDULER,
    WORKER,
    container_ports,
    deployed,
    kube_cluster,
    matches,
    of_dask_chart,
    of_gateway,
    operators,
    scraped,
)

BOTH = settings(monitors__workers__enabled=True)


def monitors(helm: Helm, **values: Any) -> list[Resource]:
    """Return the chart's objects for values, with workers' monitor on."""
    return helm.render(*BOTH, *settings(**values))


def test_the_operators_clusters(helm: Helm) -> None:
    """Two clusters of KubeCluster's in a namespace: each server once, told apart by name."""
    objects = [one for name in "ab" for one in operators(kube_cluster(name))]
    assert sorted(scraped(monitors(helm, monitors__preset="operator"), objects)) == [
        ("a-default-worker-0", 8788, "a"),
        ("a-default-worker-1", 8788, "a"),
        ("a-scheduler", 8787, "a"),
        ("b-default-worker-0", 8788, "b"),
        ("b-default-worker-1", 8788, "b"),
        ("b-scheduler", 8787, "b"),
    ]


def test_the_operators_workers_without_a_named_port(helm: Helm) -> None:
    """The preset finds none of them; by the port's number, where the pod has it, all."""
    cluster = kube_cluster("a")
    (container,) = cluster["spec"]["worker"]["spec"]["containers"]
    container["ports"] = [{"containerPort": 8788}]
    by_name = monitors(helm, monitors__preset="operator")
    assert [one.pod for one in scraped(by_name, operators(cluster))] == ["a-scheduler"]
    by_number = monitors(helm, monitors__preset="operator", monitors__workers__port=8788)
    assert sorted(one.pod for one in scraped(by_number, operators(cluster))) == [
        "a-default-worker-0",
        "a-default-worker-1",
        "a-scheduler",
    ]


def test_releases_of_the_dask_chart(helm: Helm) -> None:
    """Schedulers by their port's number, for its name is each release's own; no jupyter."""
    objects = of_dask_chart("red") + of_dask_chart("blue")
    every = scraped(monitors(helm, monitors__preset="dask"), objects)
    assert sorted(every) == sorted(
        target
        for name in ("red", "blue")
        for target in (
            (f"{name}-scheduler", 8787, name),
            (f"{name}-worker-0", 8790, name),
            (f"{name}-worker-highmem-0", 8790, name),
        )
    )
    one = scraped(monitors(helm, monitors__preset="dask", monitors__release="red"), objects)
    assert {target.dask_cluster for target in one} == {"red"}
    assert len(one) == 3


def test_gateways_clusters(helm: Helm) -> None:
    """Of three ports a pod the dashboard's alone, and nothing of the gateway itself."""
    objects = of_gateway("c1") + of_gateway("c2")
    assert sorted(scraped(monitors(helm, monitors__preset="gateway"), objects)) == [
        ("c1-scheduler", 8787, "c1"),
        ("c1-worker-0", 8787, "c1"),
        ("c1-worker-1", 8787, "c1"),
        ("c2-scheduler", 8787, "c2"),
        ("c2-worker-0", 8787, "c2"),
        ("c2-worker-1", 8787, "c2"),
    ]


@pytest.mark.parametrize("kind", ["plain", "operator"])
def test_a_cluster_of_its_own_and_no_other(kind: str, helm: Helm) -> None:
    """Its monitors find its own pods, beside every other deployment and a second release."""
    rendered = monitors(helm, cluster__kind=kind)
    others = [*of_dask_chart("red"), *of_gateway("c1"), *operators(kube_cluster("a"))]
    second = monitors(helm, cluster__kind=kind, fullnameOverride="second", nameOverride="second")
    for one, cluster in ((rendered, "measured-dask-memusage-exporter"), (second, "second")):
        own = [
            made
            for each in (rendered, second)
            for made in (
                operators(the(each, "DaskCluster"), 1)
                if kind == "operator"
                else [deployed(one) for one in of_kind(each, "Deployment")]
                + of_kind(each, "Service")
            )
        ]
        found = scraped(one, own + others)
        assert [(target.port, target.dask_cluster) for target in found] == [
            (8787, cluster),
            (8788, cluster),
        ]


def test_the_operators_own_monitors_are_not_doubled(helm: Helm) -> None:
    """With the other chart's monitors on there are none of ours, but rules and dashboards stay."""
    rendered = monitors(helm, monitors__preset="operator", monitors__upstreamEnabled=True)
    kinds = {one["kind"] for one in rendered}
    assert kinds == {"ConfigMap", "PrometheusRule"}


def test_selector_and_label_can_be_others(helm: Helm) -> None:
    """Each preset's selector, port and cluster label can be overridden."""
    own = {"matchLabels": {"team": "data"}}
    rendered = monitors(
        helm,
        monitors__preset="dask",
        monitors__clusterLabel="team.example.com/cluster",
        monitors__scheduler__selector=own,
        monitors__scheduler__port="web",
    )
    spec = the(rendered, "ServiceMonitor")["spec"]
    assert spec["selector"] == own
    (endpoint,) = spec["endpoints"]
    assert endpoint["port"] == "web"
    assert "targetPort" not in endpoint
    assert endpoint["relabelings"][0]["sourceLabels"] == [
        "__meta_kubernetes_service_label_team_example_com_cluster"
    ]


def test_pods_of_a_cluster_of_its_own_reach_each_other(helm: Helm) -> None:
    """Network policies select exactly its pods, and let pods with the client's label in."""
    for kind in ("plain", "operator"):
        rendered = monitors(helm, cluster__kind=kind)
        own = (
            operators(the(rendered, "DaskCluster"), 1)
            if kind == "operator"
            else [deployed(one) for one in of_kind(rendered, "Deployment")]
        )
        own = of_kind(own, "Pod")
        client = next(pod for pod in pods(of_kind(rendered, "Pod"))).metadata["labels"]
        for role in (SCHEDULER, WORKER):
            policy = the(rendered, "NetworkPolicy", role)["spec"]
            (pod,) = (
                pod for pod in own if matches(policy["podSelector"], pod["metadata"]["labels"])
            )
            inside, metrics = policy["ingress"]
            within = [one for one in inside["from"] if "namespaceSelector" not in one]
            for labels in (client, *(one["metadata"]["labels"] for one in own)):
                assert any(matches(one["podSelector"], labels) for one in within)
            allowed = {one["port"] for one in inside["ports"]}
            assert allowed == set(container_ports(pod))
            assert metrics["ports"] == [{"port": "http-dashboard", "protocol": "TCP"}]


def test_the_operator_reaches_the_scheduler_that_it_scales(helm: Helm) -> None:
    """Its own chart's pod, from whatever namespace; else it would take workers with their data."""
    import dask_kubernetes

    chart = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm"
    done = helm.run("template", "dask-operator", str(chart / "dask-kubernetes-operator"))
    assert done.returncode == 0, done.stderr
    (operator,) = of_kind(list(yaml.safe_load_all(done.stdout)), "Deployment")
    labels = deployed(operator)["metadata"]["labels"]
    for kind, expected in (("operator", 1), ("plain", 0)):
        policy = the(monitors(helm, cluster__kind=kind), "NetworkPolicy", SCHEDULER)["spec"]
        inside = policy["ingress"][0]
        let_in = [
            one
            for one in inside["from"]
            if one.get("namespaceSelector") == {} and matches(one["podSelector"], labels)
        ]
        assert len(let_in) == expected
        assert "tcp-comm" in {one["port"] for one in inside["ports"]}


def test_no_labels_of_an_operator_let_nobody_in(helm: Helm) -> None:
    """An empty selector is every pod of the cluster: without labels there is no such rule."""
    for labels in (None, {"app.kubernetes.io/name": None}):  # {} would be merged with the default
        asked = {"cluster__kind": "operator", "cluster__networkPolicy": {"operator": labels}}
        policy = the(monitors(helm, **asked), "NetworkPolicy", SCHEDULER)["spec"]
        assert [one for one in policy["ingress"][0]["from"] if "namespaceSelector" in one] == []
