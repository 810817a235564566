"""The chart, by real Helms: what it renders is valid, and what it has from elsewhere current."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dask_memusage_exporter.monitoring import rules
from tests.charts import (
    CHART,
    HELMS,
    MONITORING,
    OLDEST,
    OPERATOR,
    ROOT,
    VALUES,
    VERSIONS,
    Helm,
    Resource,
    check,
    options,
)


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
    theirs = [*(monitoring / "dashboards").rglob("*.json"), *monitoring.glob("*.yaml")]
    wanted = {str(file.relative_to(monitoring)): file for file in theirs}
    assert wanted.keys() == ours.keys()
    for name, file in wanted.items():
        assert ours[name].read_bytes() == file.read_bytes(), f"{name}: run make dashboards"


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
