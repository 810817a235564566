"""The chart, by real Helms: what it renders is valid, current, and refuses what is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dask_memusage_exporter import catalog
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.monitoring import rules
from tests.charts import (
    CHART,
    MONITORING,
    OLDEST,
    OPERATOR,
    ROOT,
    VALUES,
    VERSIONS,
    Helm,
    Resource,
    check,
    of_kind,
    pods,
    settings,
    the,
)

HELMS = ("helm3", "helm4")


@pytest.fixture(scope="module")
def helm(component: Callable[[str], str]) -> Helm:
    """The newer Helm."""
    return Helm(component("helm4"))


def options(values: Path) -> list[str]:
    """Return Helm's options for a file of values."""
    return ["--values", str(values)]


@pytest.mark.parametrize("name", HELMS)
@pytest.mark.parametrize("values", [None, *VALUES], ids=lambda one: one.stem if one else "default")
def test_lint(name: str, values: Path | None, component: Callable[[str], str]) -> None:
    """`helm lint --strict` finds nothing, for each file of values and for none."""
    asked = options(values) if values else []
    for kubernetes in VERSIONS:
        done = Helm(component(name)).run(
            "lint", "--strict", str(CHART), "--kube-version", kubernetes, *asked
        )
        assert done.returncode == 0, done.stdout
        assert "WARNING" not in done.stdout + done.stderr


@pytest.mark.parametrize("monitoring", [True, False], ids=["kinds", "without"])
@pytest.mark.parametrize("values", VALUES, ids=lambda one: one.stem)
def test_everything_that_is_rendered_is_valid(
    values: Path, monitoring: bool, component: Callable[[str], str]
) -> None:
    """By strict schemas of each Kubernetes and of others' kinds; both Helms render the same."""
    apis = (MONITORING, OPERATOR) if monitoring else (OPERATOR,)
    for kubernetes in VERSIONS:
        rendered = [
            Helm(component(name)).render(
                *options(values),
                apis=apis,
                kubernetes=kubernetes,
                # The one flavour and the other, once: a megabyte of JSON each.
                dashboards=kubernetes == OLDEST
                and values.stem in ("dask-values", "operator-values"),
            )
            for name in HELMS
        ]
        assert by_name(rendered[0]) == by_name(rendered[1])
        assert rendered[0]
        for one in rendered[0]:
            check(one, kubernetes)
        groups = {one["apiVersion"] for one in rendered[0]}
        assert (MONITORING in groups) == monitoring


def by_name(resources: list[Resource]) -> dict[tuple[str, str, str], Resource]:
    """Return objects by kind, namespace and name; none is there twice."""
    named = {
        (one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one
        for one in resources
    }
    assert len(named) == len(resources)
    return named


def test_checks_of_others_kinds_see_a_typo(helm: Helm) -> None:
    """A field that is not in its definition is an error, for each kind of others'."""
    seen = set()
    for values in ("operator-cluster-values.yaml", "operator-values.yaml"):
        for one in helm.render(*options(CHART / "ci" / values)):
            if not one["apiVersion"].startswith(("monitoring.coreos.com", "kubernetes.dask.org")):
                continue
            seen.add(one["kind"])
            one["spec"]["typo"] = 1
            with pytest.raises((ValueError, jsonschema.ValidationError), match="typo"):
                check(one, VERSIONS[-1])
    assert seen == {
        "ServiceMonitor", "PodMonitor", "PrometheusRule", "DaskCluster", "DaskAutoscaler",
    }  # fmt: skip


PRESET = settings(monitors__preset="operator")

WRONG: list[tuple[str, list[str], str]] = [
    ("a typo", settings(cluster__worker__replica=3), r"cluster.worker.*replica"),
    ("a typo at the top", settings(monitor__preset="dask"), r"monitor"),
    ("replicas", settings(cluster__worker__replicas=-1), r"replicas.*(greater|minimum)"),
    ("text", settings(**{"rules__thresholds__regression-percent": "much"}), r"regression-percent"),
    ("out of range", settings(**{"rules__thresholds__regression-percent": 0}), r"greater|minimum"),
    ("no duration", settings(rules__thresholds__step="often"), r"thresholds.step"),
    ("a preset", settings(monitors__preset="openshift"), r"monitors.preset.*gateway"),
    ("a setting", settings(config__memusage__sorce="kernel"), r"config.memusage.*sorce"),
    ("a setting's value", settings(config__memusage__source="kernl"), r"memusage.source.*polling"),
    ("a kind", settings(cluster__kind="statefulset"), r"cluster.kind.*plain"),
    ("a namespace", settings(metricNamespace="my-dask"), r"metricNamespace.*pattern"),
    (
        "no preset",
        settings(monitors__preset=""),
        r"monitors.preset is required: dask, operator or gateway",
    ),
    (
        "two clusters",
        settings(cluster__kind="plain"),
        r"monitors.preset is operator and cluster.kind is plain: .* leave monitors.preset empty",
    ),
    (
        "no operator",
        settings(cluster__kind="operator"),
        r"has no kubernetes.dask.org/v1/DaskCluster; install the Dask operator first",
    ),
    (
        "no other monitors",
        settings(monitors__preset="", monitors__upstreamEnabled=True, cluster__kind="plain"),
        r"no other chart has monitors for cluster.kind=plain; leave it false",
    ),
    (
        "an image without the package",
        settings(monitors__preset="", cluster__kind="plain", package__install=False),
        r"the package is not in ghcr.io/dask/dask.*or leave package.install=true",
    ),
    (
        "an image without jemalloc",
        settings(monitors__preset="", cluster__kind="plain", config__jemalloc__enabled=True),
        r"ghcr.io/dask/dask has no jemalloc; give cluster.image.repository an image that has it",
    ),
    ("a release", settings(monitors__release="x"), r"monitors.release goes with monitors.preset=d"),
    (
        "bounds",
        settings(cluster__operator__autoscaler={"minimum": 3, "maximum": 2}),
        r"minimum 3 is above maximum 2",
    ),
    (
        "a preload",
        settings(cluster__scheduler__extraArgs=["--preload", "mine"]),
        r"hides the preloads that are configured.*put yours into config.dask",
    ),
]


@pytest.mark.parametrize("name", HELMS)
@pytest.mark.parametrize(
    ("given", "message"), [one[1:] for one in WRONG], ids=[w[0] for w in WRONG]
)
def test_a_wrong_value_is_one_clear_message(
    name: str, given: list[str], message: str, component: Callable[[str], str]
) -> None:
    """From the schema or from the chart: it names the value, and what is allowed or to be done."""
    said = Helm(component(name)).refusal(*PRESET, *given)
    assert re.search(message, said), said
    assert len(said) < 500


def test_gateways_kind_of_the_same_name_is_not_taken_for_the_operators(helm: Helm) -> None:
    """Dask Gateway has a DaskCluster in another group: without the operator's own there is none."""
    gateways = ("--api-versions", "gateway.dask.org/v1alpha1/DaskCluster")
    said = helm.refusal(*settings(cluster__kind="operator"), *gateways)
    assert "has no kubernetes.dask.org/v1/DaskCluster" in said


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Return all schemas inside one."""
    if isinstance(schema, dict):
        yield schema
        for one in schema.values():
            yield from schemas(one)
    elif isinstance(schema, list):
        for one in schema:
            yield from schemas(one)


def test_the_schema_has_every_value_and_lets_none_pass_that_it_has_not() -> None:
    """Each value of values.yaml is in it, and each object with known fields takes no others."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    for one in schemas(schema):
        if "properties" in one and one.get("type") in ("object", ["object", "null"]):
            assert one["additionalProperties"] is False, one

    def walk(values: Any, here: dict[str, Any], path: str) -> None:
        if "$ref" in here:
            here = schema["definitions"][here["$ref"].rpartition("/")[2]]
        if isinstance(values, dict) and "properties" in here:
            for name, value in values.items():
                assert name in here["properties"], f"{path}.{name}"
                walk(value, here["properties"][name], f"{path}.{name}")

    walk(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_generated_files_are_current() -> None:
    """`make docs` would change neither README, nor values, nor schema."""
    spec = importlib.util.spec_from_file_location("chart", ROOT / "deploy" / "helm" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, write in generate.FILES.items():
        assert (CHART / name).read_text() == write(), f"{name}: run make docs"
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    defaults = {name: one["default"] for name, one in rules.thresholds().items()}
    assert values["rules"]["thresholds"] == defaults


def test_copies_are_current() -> None:
    """Dashboards and rules are the package's own bytes; `make dashboards` copies them."""
    monitoring = ROOT / "dask_memusage_exporter" / "monitoring"
    ours = {str(file.relative_to(CHART / "files")): file for file in (CHART / "files").rglob("*.*")}
    theirs = [*(monitoring / "dashboards").rglob("*.json"), monitoring / "rules.yaml"]
    wanted = {str(file.relative_to(monitoring)): file for file in theirs}
    assert wanted.keys() == ours.keys() - {"thresholds.yaml"}
    for name, file in wanted.items():
        assert ours[name].read_bytes() == file.read_bytes(), f"{name}: run make dashboards"


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


def test_other_preloads_stay(helm: Helm) -> None:
    """A preload that is configured beside ours keeps its place, and ours is not named twice."""
    mine = {"distributed": {"scheduler": {"preload": ["mine", "dask_memusage_exporter"]}}}
    configured = helm.render(*PRESET, *settings(config__dask=mine))
    text = the(configured, "ConfigMap", "-dask")["data"]["dask-memusage.yaml"]
    assert yaml.safe_load(text)["distributed"]["scheduler"]["preload"] == [
        "mine",
        "dask_memusage_exporter",
    ]


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


def test_chart_metadata() -> None:
    """Artifact Hub's annotations parse, and the image that it lists is the default one."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    listed = {name: yaml.safe_load(text) for name, text in chart["annotations"].items()}
    image = values["cluster"]["image"]
    assert [one["image"] for one in listed["artifacthub.io/images"]] == [
        f"{image['repository']}:{image['tag']}"
    ]
    assert {one["kind"] for one in listed["artifacthub.io/changes"]} == {"added"}
    assert listed["artifacthub.io/license"] == "BSD-3-Clause"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project
