"""Every rendered pod against the Pod Security Standard `restricted`, by the standard's own text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts import CHART, VALUES, Helm, Pod, pods, settings, snippet

#: Under "Volume Types".
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip

#: Under "Sysctls", those of Kubernetes 1.27.
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start", "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
}  # fmt: skip


def objections(spec: dict[str, Any]) -> Iterator[str]:
    """Return what `restricted`, which has `baseline` in it, says against a pod."""
    own = spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"Host Namespaces: {name}"
    for one in own.get("sysctls", ()):
        if one["name"] not in SYSCTLS:
            yield f"Sysctls: {one['name']}"
    for one in spec.get("volumes", ()):
        kinds = set(one) - {"name"}
        if not kinds <= VOLUMES or not kinds:
            yield f"Volume Types: {one}"
    containers = [
        one
        for name in ("initContainers", "containers", "ephemeralContainers")
        for one in spec.get(name, ())
    ]
    for container in containers:
        for objection in _of_container(container, own):
            yield f"{container['name']}: {objection}"


def _of_container(container: dict[str, Any], of_pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    effective = {**of_pod, **own}
    if effective.get("windowsOptions", {}).get("hostProcess"):
        yield "HostProcess"
    if own.get("privileged"):
        yield "Privileged Containers"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield "Host Ports"
    if own.get("procMount", "Default") != "Default":
        yield "/proc Mount Type"
    if effective.get("seLinuxOptions", {}).keys() & {"user", "role"}:
        yield "SELinux"
    if effective.get("appArmorProfile", {}).get("type") == "Unconfined":
        yield "AppArmor"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "Privilege Escalation"
    if effective.get("runAsNonRoot") is not True:
        yield "Running as Non-root"
    if effective.get("runAsUser") == 0:
        yield "Running as Non-root user"
    if effective.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "Seccomp"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()):
        yield "Capabilities: drop"
    if not set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"}:
        yield "Capabilities: add"


def rendered(helm: Helm, *options: str) -> list[Pod]:
    """Return the pods of values."""
    return list(pods(helm.render(*options)))


@pytest.mark.parametrize("values", VALUES, ids=lambda one: one.stem)
def test_nothing_to_object_to(values: Path, helm: Helm) -> None:
    """Scheduler, worker, init containers and the test's pod; more than the standard asks."""
    for pod in rendered(helm, "--values", str(values)):
        assert list(objections(pod.spec)) == [], pod.where
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        volumes = {one["name"] for one in pod.spec["volumes"]}
        for container in (*pod.spec.get("initContainers", ()), *pod.spec["containers"]):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"]
            mounts = [one["mountPath"] for one in container["volumeMounts"]]
            assert len(mounts) == len(set(mounts))
            assert {one["name"] for one in container["volumeMounts"]} <= volumes
            assert "/tmp" in mounts


def test_both_kinds_of_cluster_and_the_test_are_among_them(helm: Helm) -> None:
    """The reading above is of pods that there are."""
    plain = [pod.where for pod in rendered(helm, *settings(cluster__kind="plain"))]
    name = "measured-dask-memusage-exporter"
    assert sorted(plain) == [
        f"Deployment {name}-scheduler",
        f"Deployment {name}-worker",
        f"Pod {name}-test",
    ]
    operators = [pod.where for pod in rendered(helm, *settings(cluster__kind="operator"))]
    assert sorted(operators) == [
        f"DaskCluster {name} scheduler",
        f"DaskCluster {name} worker",
        f"Pod {name}-test",
    ]


OBJECTIONABLE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "host": (lambda pod: pod.update(hostNetwork=True), "Host Namespaces"),
    "path": (lambda pod: pod["volumes"].append({"name": "x", "hostPath": {}}), "Volume Types"),
    "sysctl": (
        lambda pod: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
        "Sysctls",
    ),
    "seccomp": (lambda pod: pod["securityContext"].pop("seccompProfile"), "Seccomp"),
    "root": (lambda pod: pod["securityContext"].update(runAsUser=0), "Non-root user"),
    "anybody": (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "Non-root"),
    "init": (
        lambda pod: pod["initContainers"][0].pop("securityContext"),
        "install-dask-memusage: Privilege Escalation",
    ),
    "privileged": (
        lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
        "Privileged",
    ),
    "capability": (
        lambda pod: pod["containers"][0]["securityContext"].update(
            capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}
        ),
        "Capabilities: add",
    ),
    "port": (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=8786), "Host Ports"),
}


@pytest.mark.parametrize("name", OBJECTIONABLE)
def test_the_reading_objects(name: str, helm: Helm) -> None:
    """Each clause of the standard that a change of values could break is seen."""
    pod = copy.deepcopy(next(iter(rendered(helm, *settings(cluster__kind="plain")))).spec)
    change, objection = OBJECTIONABLE[name]
    change(pod)
    assert any(objection in one for one in objections(pod))


@pytest.mark.parametrize("preset", ["operator", "gateway"])
def test_what_goes_into_others_pods(preset: str, helm: Helm) -> None:
    """The init container that the notes print for others' pods has the same security context."""
    begins = {"operator": "spec:", "gateway": "gateway:"}[preset]
    text = yaml.safe_dump(
        snippet(helm.notes(*settings(monitors__preset=preset)), begins), sort_keys=True
    )
    context = yaml.safe_load((CHART / "values.yaml").read_text())["cluster"]["securityContext"]
    found = text.count("readOnlyRootFilesystem: true")
    assert context["readOnlyRootFilesystem"] is True
    assert found == text.count("image: YOUR_IMAGE") == 2
