"""The chart as Helm renders it, and what others' definitions say of the result."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml

# Not in the environments of the oldest and the newest Python, where nothing of this is run.
for _module in ("kubernetes_validate", "cloudcoil", "kopf"):
    pytest.importorskip(_module, reason=f"{_module} is missing: make .venv/installed-chart")

import kubernetes_validate  # noqa: E402  # after the check that it is there
from kubernetes_validate import utils  # noqa: E402

ROOT = Path(__file__).parent.parent
CHART = ROOT / "deploy" / "helm" / "dask-memusage-exporter"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))

#: Names of components; both are supported.
HELMS = ("helm3", "helm4")

#: What a cluster has, or has not: the Prometheus operator's kinds.
MONITORING = "monitoring.coreos.com/v1"
OPERATOR = "kubernetes.dask.org/v1/DaskCluster"

OLDEST = "1.27"
#: ``CHART_KUBERNETES=all`` or a list such as ``1.29,1.31``; by default both ends.
KUBERNETES = {
    "": [OLDEST, kubernetes_validate.latest_version()],
    "all": [one for one in utils.all_versions() if utils.Version(one) >= utils.Version(OLDEST)],
}
_ASKED = os.environ.get("CHART_KUBERNETES", "")
VERSIONS = [utils.major_minor(one) for one in KUBERNETES.get(_ASKED) or _ASKED.split(",")]

# Each check would read the same megabyte of definitions anew.
utils.schema_contents = functools.cache(utils.schema_contents)

Resource = dict[str, Any]


class Pod(NamedTuple):
    """A pod's specification, wherever it stands."""

    where: str
    metadata: dict[str, Any]
    spec: dict[str, Any]


class Loader(yaml.CSafeLoader):
    """YAML as strict tools read it: a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, or say which key is there twice."""
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"twice in line {node.start_mark.line + 1}: {twice}"
        return super().construct_mapping(node, deep)


class Helm:
    """A real Helm.

    Parameters
    ----------
    program
        Its path.
    """

    def __init__(self, program: str) -> None:
        self._program = program

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it, and return what it said."""
        return subprocess.run(
            [self._program, *arguments], capture_output=True, text=True, timeout=60, check=False
        )

    def text(
        self,
        *options: str,
        apis: tuple[str, ...] = (MONITORING, OPERATOR),
        kubernetes: str = VERSIONS[-1],
        dashboards: bool = False,
    ) -> str:
        """Return the chart as rendered for a release ``measured`` in the namespace ``science``.

        Without dashboards, a megabyte of JSON, unless they are asked for.
        """
        where = ["--namespace", "science", "--kube-version", kubernetes]
        has = [word for api in apis for word in ("--api-versions", api)]
        without = [] if dashboards else ["--set", "dashboards.enabled=false"]
        done = self.run("template", "measured", str(CHART), *where, *has, *options, *without)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def render(self, *options: str, **cluster: Any) -> list[Resource]:
        """Return the rendered objects."""
        documents = yaml.load_all(self.text(*options, **cluster), Loader=Loader)
        return [one for one in documents if one]

    def notes(self, *options: str) -> str:
        """Return what is said after an installation."""
        # Only this asks no cluster what it is; it has no --api-versions.
        done = self.run(
            *("install", "measured", str(CHART), "--namespace", "science"),
            *("--dry-run=client", *options),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("NOTES:")[2]

    def notes_where(self, apis: tuple[str, ...], directory: Path, *options: str) -> str:
        """Return the same for a cluster that has these kinds, by a copy of the chart.

        No dry run takes kinds, and `helm template` has no notes; so they stand in an object here.
        """
        chart = directory / CHART.name
        shutil.copytree(CHART, chart)
        text = (chart / "templates" / "NOTES.txt").read_text()
        (chart / "templates" / "notes.yaml").write_text(
            f'{{{{- define "notes" -}}}}{text}{{{{- end -}}}}\n'
            "{apiVersion: v1, kind: ConfigMap, metadata: {name: notes}, data: {notes: "
            '{{ include "notes" . | toJson }}}}\n'
        )
        has = [word for api in apis for word in ("--api-versions", api)]
        only = ["--namespace", "science", "--show-only", "templates/notes.yaml"]
        done = self.run("template", "measured", str(chart), *only, *has, *options)
        assert done.returncode == 0, done.stderr
        return yaml.safe_load(done.stdout)["data"]["notes"]

    def refusal(self, *options: str) -> str:
        """Return the message with which values are refused, in one line."""
        done = self.run("template", "measured", str(CHART), "--api-versions", MONITORING, *options)
        assert done.returncode != 0, "these values were accepted"
        return " ".join(
            done.stderr.replace("Use --debug flag to render out invalid YAML", "").split()
        )


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    """Return the objects of a kind."""
    return [one for one in resources if one["kind"] == kind]


def the(resources: list[Resource], kind: str, part: str = "") -> Resource:
    """Return the one object of a kind whose name ends so."""
    (found,) = (one for one in of_kind(resources, kind) if one["metadata"]["name"].endswith(part))
    return found


def pods(resources: list[Resource]) -> Iterator[Pod]:
    """Return all pods that the objects make."""
    for one in resources:
        where = f"{one['kind']} {one['metadata']['name']}"
        if one["kind"] == "Pod":
            yield Pod(where, one["metadata"], one["spec"])
        elif one["kind"] == "Deployment":
            yield Pod(where, one["spec"]["template"]["metadata"], one["spec"]["template"]["spec"])
        elif one["kind"] == "DaskCluster":
            for role in ("scheduler", "worker"):
                part = one["spec"][role]
                yield Pod(f"{where} {role}", part.get("metadata", {}), part["spec"])


def check(resource: Resource, kubernetes: str) -> None:
    """Fail where an object is not valid by its own definition, or has a field that is not in it."""
    group = resource["apiVersion"].partition("/")[0]
    if group == "monitoring.coreos.com":
        _check_monitoring(resource)
    elif group == "kubernetes.dask.org":
        _dask_kind(resource["kind"]).validate(resource["spec"])
    else:
        kubernetes_validate.validate(resource, kubernetes, strict=True)


def _check_monitoring(resource: Resource) -> None:
    from cloudcoil.models.prometheus_operator import v1

    model = getattr(v1, resource["kind"]).model_validate(copy.deepcopy(resource))
    known = model.model_dump(by_alias=True, exclude_unset=True, mode="json")
    if known != resource:  # what it does not know it leaves out in silence
        raise ValueError(f"fields that are not in its definition: {resource}, of which {known}")


@functools.cache
def _dask_kind(kind: str) -> jsonschema.Draft202012Validator:
    import dask_kubernetes

    crds = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm"
    file = crds / "dask-kubernetes-operator/crds" / f"{kind.lower()}.yaml"
    (version,) = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return jsonschema.Draft202012Validator(schema)


def strict(schema: Any) -> Any:
    """Return a schema of Kubernetes' that takes no field that is not in it."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    tight = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "properties" in schema and not open_ended:
        tight.setdefault("additionalProperties", False)
    return tight


def snippet(notes: str, begins: str) -> Any:
    """Return the YAML in notes that begins with a line, and ends where the text goes on."""
    lines = notes.splitlines()
    block = lines[lines.index(f"  {begins}") :]
    end = next((n for n, line in enumerate(block) if line and not line.startswith("  ")), None)
    return yaml.safe_load("\n".join([*block[:end], ""]))


def settings(**values: Any) -> list[str]:
    """Return Helm's options for values, names with dots for levels written as ``__``."""
    return [
        word
        for name, value in values.items()
        for word in ("--set-json", f"{name.replace('__', '.')}={json.dumps(value)}")
    ]


def options(values: Path) -> list[str]:
    """Return Helm's options for a file of values."""
    return ["--values", str(values)]
