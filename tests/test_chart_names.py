"""Names and labels of what is rendered: many releases, long names, and the chart's next version."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts import (
    CHART,
    MONITORING,
    OPERATOR,
    Helm,
    Resource,
    of_kind,
    pods,
    settings,
    the,
)

#: As long as Helm takes them, and the same up to their ends.
LONG = [f"forecasting-in-production-of-energy-market-prices-of-{one}"[-53:] for one in "ab"]
EVERYTHING = settings(
    monitors__workers__enabled=True,
    cluster__scheduler__podDisruptionBudget__enabled=True,
    cluster__operator__autoscaler__enabled=True,
)


def released(helm: Helm, name: str, *options: str, chart: Path = CHART) -> list[Resource]:
    """Return the objects of a release of this name."""
    apis = ("--api-versions", MONITORING, "--api-versions", OPERATOR)
    done = helm.run("template", name, str(chart), "--namespace", "science", *apis, *options)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]


@pytest.mark.parametrize("kind", ["plain", "operator"])
def test_two_releases_in_a_namespace_share_no_object(kind: str, helm: Helm) -> None:
    """However long their names are; each name and label is short enough for Kubernetes."""
    asked = settings(cluster__kind=kind, cluster__operator__generation=10)
    rendered = [one for name in LONG for one in released(helm, name, *EVERYTHING, *asked)]
    names = Counter((one["kind"], one["metadata"]["name"]) for one in rendered)
    assert {name for name, times in names.items() if times > 1} == set()
    assert len(names) > 20
    for one in rendered:
        metadata: list[dict[str, Any]] = [one["metadata"]]
        metadata += [pod.metadata for pod in pods([one])]
        for each in metadata:
            assert all(len(value) <= 63 for value in each.get("labels", {}).values())
        assert len(one["metadata"]["name"]) <= 63


def test_grafanas_sidecar_writes_each_dashboard_to_a_file_of_its_own(helm: Helm) -> None:
    """A chart beside this one has an `overview.json` too, and the sidecar goes by that name."""
    rendered = released(helm, "measured", *settings(monitors__preset="operator"))
    boards = [one for one in of_kind(rendered, "ConfigMap") if "annotations" in one["metadata"]]
    files = [name for one in boards for name in one["data"]]
    assert len(files) == len(set(files)) == 4
    assert all(name.startswith("dask-memusage-") for name in files)


def test_the_notes_name_the_next_generation_of_a_long_name(helm: Helm, tmp_path: Path) -> None:
    """It is what the upgrade then makes, cut as long names are."""
    asked = settings(cluster__kind="operator", fullnameOverride=LONG[0])
    notes = helm.notes_where((MONITORING, OPERATOR), tmp_path, *asked)
    after = helm.render(*asked, *settings(cluster__operator__generation=1))
    assert f"named {the(after, 'DaskCluster')['metadata']['name']}, and" in " ".join(notes.split())


def test_a_new_version_of_the_chart_alone_restarts_nothing(helm: Helm, tmp_path: Path) -> None:
    """Pods are as they were: an upgrade for a new panel would else end a cluster with its work."""
    asked = settings(cluster__kind="plain")
    newer = tmp_path / CHART.name
    shutil.copytree(CHART, newer)
    metadata = (newer / "Chart.yaml").read_text()
    (newer / "Chart.yaml").write_text(metadata.replace("\nversion: ", "\nversion: 9"))

    def of_pods(rendered: list[Resource]) -> list[dict[str, Any]]:
        return [one["spec"]["template"] for one in of_kind(rendered, "Deployment")]

    before, after = (released(helm, "measured", *asked, chart=one) for one in (CHART, newer))
    assert before != after
    assert of_pods(before) == of_pods(after)


def test_a_chart_that_has_this_one_among_its_dependencies(helm: Helm, tmp_path: Path) -> None:
    """Its globals, and the switch that its condition goes by, are no typos."""
    parent = tmp_path / "platform"
    shutil.copytree(CHART, parent / "charts" / CHART.name)
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    needs = {"name": CHART.name, "version": version, "condition": f"{CHART.name}.enabled"}
    about = {"apiVersion": "v2", "name": "platform", "version": "1.0.0", "dependencies": [needs]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(about))
    ours = {"enabled": True, "monitors": {"preset": "gateway"}}
    values = {"global": {"region": "eu"}, CHART.name: ours}
    (parent / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = released(helm, "platform", chart=parent)
    assert the(rendered, "ServiceMonitor")["metadata"]["name"].startswith("platform-dask-memusage")
    off = settings(**{f"{CHART.name}__enabled": False})
    assert released(helm, "platform", *off, chart=parent) == []
