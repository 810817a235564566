"""Monitors find schedulers and workers of each deployment, each once, with the cluster's name.

What the Prometheus operator does with a monitor is read from its documentation: which objects a
label selector and a namespace selector match, which port of them is scraped, and what relabelling
makes of their labels. The Dask operator's objects are made by its own code; the others are written
here after the charts and controllers that they name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.charts import Helm, Resource, of_kind, pods, settings, the

dask_kubernetes = pytest.importorskip("dask_kubernetes")
make_cluster_spec = pytest.importorskip("dask_kubernetes.operator").make_cluster_spec
controller = pytest.importorskip("dask_kubernetes.operator.controller.controller")

SCHEDULER, WORKER = "scheduler", "worker"


@pytest.fixture(scope="module")
def helm(component: Callable[[str], str]) -> Helm:
    """The newer Helm."""
    return Helm(component("helm4"))


class Target(NamedTuple):
    """What a monitor makes Prometheus scrape."""

    pod: str
    port: int
    dask_cluster: str


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Return whether a label selector selects an object with these labels."""
    for one in selector.get("matchExpressions", ()):
        assert one["operator"] == "Exists"
        if one["key"] not in labels:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def container_ports(pod: Resource) -> dict[str, int]:
    """Return the ports of a pod by name, those without one by their number."""
    return {
        port.get("name", str(port["containerPort"])): port["containerPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
    }


def relabelled(endpoint: dict[str, Any], labels: dict[str, str], kind: str) -> str:
    """Return what relabelling makes of the label dask_cluster."""
    meta = {
        f"__meta_kubernetes_{kind}_label_{re.sub('[^a-zA-Z0-9_]', '_', name)}": value
        for name, value in labels.items()
    }
    (rule,) = (one for one in endpoint["relabelings"] if one["targetLabel"] == "dask_cluster")
    (source,) = rule["sourceLabels"]
    return meta.get(source, "")


def scraped(monitors: list[Resource], objects: list[Resource]) -> list[Target]:
    """Return what the monitors make of objects, all in the namespace ``science``."""
    found = []
    running = of_kind(objects, "Pod")
    for monitor in of_kind(monitors, "ServiceMonitor"):
        spec = monitor["spec"]
        assert spec["namespaceSelector"] == {"matchNames": ["science"]}
        (endpoint,) = spec["endpoints"]
        for service in of_kind(objects, "Service"):
            labels = service["metadata"]["labels"]
            if not matches(spec["selector"], labels):
                continue
            behind = [
                pod
                for pod in running
                if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
            ]
            cluster = relabelled(endpoint, labels, "service")
            for port in service["spec"]["ports"]:
                # A target a port of the Service, as endpoints have them.
                aim = port.get("targetPort", port["port"])
                for pod in behind:
                    number = container_ports(pod).get(str(aim), aim)
                    wanted = (
                        number == endpoint["targetPort"] and number in container_ports(pod).values()
                        if "targetPort" in endpoint
                        else port["name"] == endpoint["port"]
                    )
                    if wanted:
                        found.append(Target(pod["metadata"]["name"], number, cluster))
    for monitor in of_kind(monitors, "PodMonitor"):
        spec = monitor["spec"]
        (endpoint,) = spec["podMetricsEndpoints"]
        for pod in running:
            labels = pod["metadata"]["labels"]
            if not matches(spec["selector"], labels):
                continue
            for name, number in container_ports(pod).items():
                if endpoint.get("port") == name or endpoint.get("portNumber") == number:
                    cluster = relabelled(endpoint, labels, "pod")
                    found.append(Target(pod["metadata"]["name"], number, cluster))
    return found


def deployed(deployment: Resource, suffix: str = "") -> Resource:
    """Return a pod of a Deployment."""
    template = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= (
        template["metadata"]["labels"].items()
    )
    name = f"{deployment['metadata']['name']}{suffix}"
    return {
        "kind": "Pod",
        "metadata": {"labels": template["metadata"]["labels"], "name": name},
        "spec": template["spec"],
    }


def operators(cluster: Resource, workers: int = 2) -> list[Resource]:
    """Return what the Dask operator makes of a DaskCluster, by its own functions."""
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    own = dict(cluster["metadata"].get("labels", {}))

    def labels(role: str) -> dict[str, str]:
        return {**own, **spec[role].get("metadata", {}).get("labels", {})}

    of_scheduler = (spec["scheduler"]["spec"], {}, labels(SCHEDULER))
    service = controller.build_scheduler_service_spec(
        name, spec["scheduler"]["service"], {}, labels(SCHEDULER)
    )
    made = [deployed(controller.build_scheduler_deployment_spec(name, *of_scheduler)), service]
    made += [
        deployed(
            controller.build_worker_deployment_spec(
                f"{name}-default", "science", name, f"{number}", spec["worker"]["spec"],
                {}, labels(WORKER),
            )
        )
        for number in range(workers)
    ]  # fmt: skip
    return made


def kube_cluster(name: str) -> Resource:
    """Return the DaskCluster that KubeCluster makes."""
    return make_cluster_spec(name=name, env={"EXTRA_PIP_PACKAGES": "s3fs"})


def of_dask_chart(release: str) -> list[Resource]:
    """Return a release of the chart ``dask``, version of November 2025 (Dask 2025.11.0).

    Labels and ports of dask/templates/dask-scheduler-service.yaml, dask-scheduler-deployment.yaml,
    dask-worker-deployment.yaml, additional-worker-deployment.yaml and dask-jupyter-*.yaml.
    """

    def labels(component: str) -> dict[str, str]:
        return {"app": "dask", "release": release, "component": component}

    def pod(name: str, component: str, *ports: dict[str, Any]) -> Resource:
        spec = {"containers": [{"name": f"{release}-dask-{component}", "ports": list(ports)}]}
        return {
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels(component)},
            "spec": spec,
        }

    def service(component: str, *ports: dict[str, Any]) -> Resource:
        metadata = {"labels": {**labels(component), "heritage": "Helm", "chart": "dask-2025.11.0"}}
        return {
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels(component), "ports": list(ports)},
        }

    dashboard = {"name": "dashboard", "containerPort": 8790}
    return [
        service(
            SCHEDULER,
            {"name": f"{release}-dask-scheduler", "port": 8786, "targetPort": 8786},
            {"name": f"{release}-dask-webui", "port": 80, "targetPort": 8787},
        ),
        service("jupyter", {"name": f"{release}-dask-jupyter", "port": 80, "targetPort": 8888}),
        pod(f"{release}-scheduler", SCHEDULER, {"containerPort": 8786}, {"containerPort": 8787}),
        pod(f"{release}-worker-0", WORKER, dashboard),
        pod(f"{release}-worker-highmem-0", WORKER, dashboard),
        pod(f"{release}-jupyter", "jupyter", {"containerPort": 8888}),
    ]


def of_gateway(cluster: str) -> list[Resource]:
    """Return a cluster of Dask Gateway (2026.3), and pods of the gateway itself.

    ``get_labels``, ``make_pod`` and ``make_service`` of backends/kubernetes/controller.py, and the
    labels of its chart's own Deployments.
    """
    ports = [
        {"name": "scheduler", "containerPort": 8786},
        {"name": "dashboard", "containerPort": 8787},
        {"name": "api", "containerPort": 8788},
    ]

    def labels(component: str) -> dict[str, str]:
        return {
            "app.kubernetes.io/name": "dask-gateway",
            "app.kubernetes.io/version": "2026.3.0",
            "gateway.dask.org/instance": "gateway-dask-gateway",
            "gateway.dask.org/cluster": cluster,
            "app.kubernetes.io/component": component,
        }

    def pod(name: str, has: dict[str, str]) -> Resource:
        spec = {"containers": [{"name": "dask", "ports": ports}]}
        return {"kind": "Pod", "metadata": {"name": name, "labels": has}, "spec": spec}

    selected = labels("dask-scheduler")
    del selected["app.kubernetes.io/name"], selected["app.kubernetes.io/version"]
    served = [{"name": one["name"], "port": one["containerPort"]} for one in ports]
    its_own = {"app.kubernetes.io/name": "dask-gateway", "app.kubernetes.io/component": "gateway"}
    return [
        pod(f"{cluster}-scheduler", labels("dask-scheduler")),
        pod(f"{cluster}-worker-0", labels("dask-worker")),
        pod(f"{cluster}-worker-1", labels("dask-worker")),
        pod("api-gateway", its_own),
        {
            "kind": "Service",
            "metadata": {"labels": labels("dask-scheduler")},
            "spec": {"selector": selected, "ports": served},
        },
        {
            "kind": "Service",
            "metadata": {"labels": its_own},
            "spec": {"selector": its_own, "ports": [{"name": "api", "port": 8000}]},
        },
    ]


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
