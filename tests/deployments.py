"""Objects of each deployment of Dask on Kubernetes, and what a monitor makes Prometheus scrape.

What the Prometheus operator does with a monitor is read from its documentation: which objects a
label selector and a namespace selector match, which port of them is scraped, and what relabelling
makes of their labels. The Dask operator's objects are made by its own code; the others are written
here after the charts and controllers that they name.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

from tests.charts import Resource, of_kind

make_cluster_spec = pytest.importorskip("dask_kubernetes.operator").make_cluster_spec
controller = pytest.importorskip("dask_kubernetes.operator.controller.controller")

SCHEDULER, WORKER = "scheduler", "worker"


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
