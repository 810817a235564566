"""What the notes and docs/kubernetes.md say to add to others' deployments, and the image."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

from dask_memusage_exporter.config import Settings, prometheus_namespace
from tests.charts import (
    CHART,
    MONITORING,
    OPERATOR,
    ROOT,
    VERSIONS,
    Helm,
    check,
    of_kind,
    settings,
    snippet,
    the,
)
from tests.containers import SOURCES

DOCS = (ROOT / "docs" / "kubernetes.md").read_text()
BEGINS = {"dask": "scheduler:", "operator": "spec:", "gateway": "gateway:"}


def printed(helm: Helm, preset: str, **values: Any) -> Any:
    """Return what the notes print for a preset."""
    return snippet(helm.notes(*settings(monitors__preset=preset, **values)), BEGINS[preset])


@pytest.mark.parametrize("preset", BEGINS)
def test_the_docs_have_what_the_notes_print(preset: str, helm: Helm) -> None:
    """The block in docs/kubernetes.md is the notes', for the release that the docs install."""
    (block,) = re.findall(
        rf"<!-- notes: {preset} -->\n```yaml\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL
    )
    named = {"fullnameOverride": "dask-memusage-exporter", "package__install": preset == "dask"}
    assert yaml.safe_load(block) == printed(helm, preset, **named)


def test_commands_of_the_docs_render(helm: Helm) -> None:
    """Each `helm install` of docs and READMEs is accepted as it stands."""
    pages = DOCS + (CHART / "README.md").read_text() + (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^helm install (.*)$", pages, re.MULTILINE))
    assert len(commands) == 5  # three presets, a cluster of its own, and configuration alone
    for command in commands:
        name, chart, *options = command.split()
        done = helm.run("template", name, str(ROOT / chart), *options)
        assert done.returncode == 0, done.stderr


def test_environment_says_what_the_file_says(helm: Helm, tmp_path: Path) -> None:
    """Where nothing can be mounted Dask reads the same settings from the printed variables."""
    values = ["--values", str(CHART / "ci" / "dask-values.yaml")]
    given = the(helm.render(*values), "ConfigMap", "-dask")["data"]["dask-memusage.yaml"]
    (tmp_path / "dask.yaml").write_text(given)
    variables = snippet(helm.notes(*values), "scheduler:")["scheduler"]["env"]
    environment = {one["name"]: one["value"] for one in variables}

    def read(configured: dict[str, Any]) -> tuple[Settings, str, Any]:
        with dask.config.set(configured):
            preload = dask.config.get("distributed.scheduler.preload")
            return Settings.load(), prometheus_namespace(), preload

    by_file = read(dask.config.collect(paths=[str(tmp_path)], env={}))
    by_environment = read(dask.config.collect(paths=[], env=environment))
    assert by_file == by_environment
    assert by_file[0].max_prefixes == 60
    assert by_file[0].prefixes_deny
    assert by_file[2] == ["dask_memusage_exporter"]


def test_no_variable_of_dasks_configuration_has_capitals_to_lose(helm: Helm) -> None:
    """jemalloc's variables are in the YAML alone: Dask would make `ld_preload` of them."""
    on = {"config__jemalloc__enabled": True}
    for preset in BEGINS:
        rendered = helm.render(*settings(monitors__preset=preset, **on))
        text = the(rendered, "ConfigMap", "-dask")["data"]["dask-memusage.yaml"]
        environ = yaml.safe_load(text)["distributed"]["nanny"]["pre-spawn-environ"]
        assert environ == {
            "LD_PRELOAD": "libjemalloc.so.2",
            "PYTHONMALLOC": "malloc",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }
        notes = helm.notes(*settings(monitors__preset=preset, **on))
        assert "LD_PRELOAD" not in notes
        assert "PRE_SPAWN" not in notes


def merged(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Merge as one does by hand: lists of named things by name."""
    for name, value in more.items():
        if isinstance(value, dict):
            merged(into.setdefault(name, {}), value)
        elif isinstance(value, list) and name == "containers":
            (own,), (other,) = into[name], value
            assert own["name"] == other["name"]
            merged(own, other)
        elif isinstance(value, list):
            into[name] = [*(into.get(name) or ()), *value]
        else:
            into[name] = value
    return into


@pytest.mark.parametrize("install", [True, False])
def test_a_daskcluster_with_the_printed_lines_is_valid(install: bool, helm: Helm) -> None:
    """KubeCluster's own resource, with them merged in, by the operator's definition."""
    make_cluster_spec = pytest.importorskip("dask_kubernetes.operator").make_cluster_spec
    cluster = make_cluster_spec(name="a", env={"A": "1"}, resources={}, n_workers=1)
    lines = printed(helm, "operator", package__install=install)
    check(merged(copy.deepcopy(cluster), lines), VERSIONS[-1])
    for role in ("scheduler", "worker"):
        spec = merged(copy.deepcopy(cluster), lines)["spec"][role]["spec"]
        volumes = {one["name"] for one in spec["volumes"]}
        containers = [*spec["containers"], *spec.get("initContainers", ())]
        assert volumes == {mount["name"] for one in containers for mount in one["volumeMounts"]}
        assert ("PYTHONPATH" in str(spec["containers"])) == install


def test_a_pod_of_the_gateway_with_the_printed_lines_is_valid(helm: Helm) -> None:
    """A pod as the gateway makes it, which appends lists, by Kubernetes' definition."""
    lines = printed(helm, "gateway")["gateway"]
    for role, part in lines["backend"].items():
        container = {"name": f"dask-{role}", "image": "dask", "env": [], "volumeMounts": []}
        spec = {"containers": [merged(container, part["extraContainerConfig"])], "volumes": []}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
        check({**pod, "spec": merged(spec, part["extraPodConfig"])}, VERSIONS[-1])
    command = lines["extraConfig"]["dask-memusage"].partition(" = ")[2]
    assert yaml.safe_load(command)[1:] == ["--preload", "dask_memusage_exporter"]


@pytest.mark.parametrize("preset", ["dask", "operator", "gateway"])
def test_with_the_others_monitors_on_the_notes_say_how_to_label(preset: str, helm: Helm) -> None:
    """Nothing of ours is scraped, and each text names the label that clusters are told apart by."""
    asked = settings(monitors__preset=preset, monitors__upstreamEnabled=True)
    notes = helm.notes(*asked)
    assert "ours are off" in notes
    assert "dask_cluster" in notes
    assert not [one for one in helm.render(*asked) if one["kind"].endswith("Monitor")]
    begins = {"dask": "scheduler:", "operator": "metrics:", "gateway": "relabelings:"}
    if preset == "operator":
        import dask_kubernetes

        theirs = yaml.safe_load(
            (
                Path(dask_kubernetes.__file__).parent / "operator/deployment/helm"
                "/dask-kubernetes-operator/values.yaml"
            ).read_text()
        )["metrics"]
        said = snippet(notes, begins[preset])["metrics"]
        for part, monitor in (("scheduler", "serviceMonitor"), ("worker", "podMonitor")):
            # What their chart has by default stays, and the label comes to it.
            labels = said[part][monitor]["targetLabels"]
            assert labels[-1] == "dask_cluster"
            known = theirs[part][monitor]
            assert labels[:-1] == known.get("targetLabels", known.get("podTargetLabels"))


@pytest.mark.parametrize("kind", ["none", "operator", "plain"])
def test_notes_where_the_kinds_are(kind: str, helm: Helm, tmp_path: Path) -> None:
    """What is scraped, by which label; a warning wherever another chart's monitors could be too."""
    asked = settings(cluster__kind=kind, monitors__preset="operator" if kind == "none" else "")
    said = helm.notes_where((MONITORING, OPERATOR), tmp_path, *asked)
    label = "dask_cluster" if kind == "plain" else "dask.org/cluster-name"
    notes = " ".join(said.split())
    assert f"label `dask_cluster` from `{label}`" in notes
    assert "Monitors: schedulers of" in notes
    assert ("every sum doubles" in notes) == (kind != "plain")
    assert ("helm test measured --namespace science" in notes) == (kind != "none")
    # It reacts to replica counts only: the notes say so, and offer the way.
    following = "measured-dask-memusage-exporter-1"
    assert ("Raise cluster.operator.generation" in notes) == (kind == "operator")
    assert (f"the next one is named {following}" in notes) == (kind == "operator")
    if kind == "none":
        assert snippet(said, "spec:")["spec"]["worker"]


def test_notes_where_the_kinds_are_not(helm: Helm, tmp_path: Path) -> None:
    """What is missing, be monitors asked for or not, and what is there instead."""
    said = {
        kind: " ".join(
            helm.notes_where((OPERATOR,), tmp_path / kind, *settings(cluster__kind=kind)).split()
        )
        for kind in ("plain", "operator")
    }
    assert "Pods that are to be scraped have the annotations prometheus.io/scrape" in said["plain"]
    assert "The Service measured-dask-memusage-exporter-metrics, and workers" in said["operator"]
    off = " ".join(helm.notes(*settings(monitors__enabled=False)).split())
    for one in (*said.values(), off):
        assert "`dask memusage dashboards --out DIR` writes them" in one
    assert "with monitors.preset these notes say how your Dask takes it" in off
    assert "Rules" not in helm.notes(*settings(monitors__enabled=False, rules__enabled=False))


def test_notes_where_clusters_have_new_names(helm: Helm, tmp_path: Path) -> None:
    """The gateway's have no baseline of their own: that is said, until one is chosen."""
    groups: dict[str, dict[str, str]] = {
        "gateway": {},
        "chosen": {"rules__thresholds__group-labels": "namespace"},
    }
    said = {
        name: helm.notes_where(
            (MONITORING,), tmp_path / name, *settings(monitors__preset="gateway", **given)
        )
        for name, given in groups.items()
    }
    assert "group-labels=namespace" in said["gateway"]
    assert "group-labels" not in said["chosen"]


def test_others_chart_takes_what_the_notes_say(helm: Helm, tmp_path: Path) -> None:
    """The operator's own chart with the printed values has the label on both monitors."""
    import dask_kubernetes

    notes = helm.notes(*settings(monitors__preset="operator", monitors__upstreamEnabled=True))
    said = snippet(notes, "metrics:")
    for part, monitor in (("scheduler", "serviceMonitor"), ("worker", "podMonitor")):
        said["metrics"][part]["enabled"] = True
        said["metrics"][part][monitor]["enabled"] = True
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(said))
    chart = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm"
    done = helm.run(
        *("template", "operator", str(chart / "dask-kubernetes-operator")),
        *("--values", str(tmp_path / "values.yaml")),
    )
    assert done.returncode == 0, done.stderr
    rendered = [one for one in yaml.safe_load_all(done.stdout) if one]
    for kind, key in (("ServiceMonitor", "targetLabels"), ("PodMonitor", "podTargetLabels")):
        (monitor,) = of_kind(rendered, kind)
        assert "dask_cluster" in monitor["spec"][key]


def _instructions() -> list[tuple[str, str]]:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return re.findall(r"^([A-Z]+) (.*)$", lines.replace("\\\n", " "), re.MULTILINE)


def test_the_image_has_what_the_chart_starts(jemalloc: str) -> None:
    """It cannot be built here; what it copies, installs and checks is true of this machine."""
    found = _instructions()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    image = values["cluster"]["image"]
    assert ("ARG", f"BASE={image['repository']}:{image['tag']}") in found
    copied = {name for kind, rest in found if kind == "COPY" for name in rest.split()[:-1]}
    assert copied == set(SOURCES)
    context = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    assert context[0] == "*"
    assert {f"!{name}" for name in copied} <= set(context)
    user = values["cluster"]["podSecurityContext"]
    assert ("USER", f"{user['runAsUser']}:{user['runAsGroup']}") in found
    (entry,) = (rest for kind, rest in found if kind == "ENTRYPOINT")
    assert yaml.safe_load(entry) == values["cluster"]["command"][:2]
    (doctor,) = (rest for kind, rest in found if "doctor" in rest)
    library = values["config"]["jemalloc"]["library"]
    assert f"LD_PRELOAD={library} " in doctor
    assert Path(jemalloc).name == library
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    without = doctor.replace(library, "libnone.so.2"), doctor.replace("PYTHONMALLOC=malloc", "")
    for command in (doctor, *without):
        done = subprocess.run(
            ["sh", "-c", command], env={**os.environ, "PATH": path}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == (command == doctor), done.stderr
        assert "This machine: Python" in done.stderr
