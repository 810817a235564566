"""Values that the chart refuses, by real Helms: one clear message for each."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.charts import HELMS, Helm, settings

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
    (
        "a name of no Service",
        settings(monitors__preset="", cluster__kind="plain", fullnameOverride="1.dask"),
        r"would be named 1.dask, and Services take small letters.*set fullnameOverride",
    ),
    ("a name of none", settings(nameOverride="My_Dask"), r"nameOverride.*pattern"),
    ("no tag", settings(cluster__image__tag=""), r"image.tag.*(length|minLength)"),
    ("a part that is emptied", settings(monitors__workers=None), r"monitors.*workers"),
    ("no threshold", settings(rules__thresholds__step=None), r"rules.thresholds.*step"),
    (
        "too long",
        settings(rules__thresholds__step="5h"),
        r"step: 5h is not a duration from 1s to 1h",
    ),
    (
        "no window",
        settings(**{"rules__thresholds__regression-baseline": "0s"}),
        r"regression-baseline: 0s is not a duration from 1s to 90d",
    ),
    ("no order", settings(rules__thresholds__gap="1s1h"), r"thresholds.gap.*pattern"),
    (
        "too short for the step",
        settings(rules__thresholds__gap="3m"),
        r"gap: 3m is less than 2 x step, which is 2m; raise gap or lower step",
    ),
    (
        "no matcher",
        settings(rules__thresholds__selector='a="b\\"'),
        r"thresholds.selector.*pattern",
    ),
    (
        "a timeout",
        settings(monitors__workers__scrapeTimeout="1m"),
        r"monitors.workers.scrapeTimeout: 1m is longer than interval, which is 30s",
    ),
    (
        "exemplars twice",
        settings(monitors__exemplars__enabled=True, monitors__scheduler__path="/memusage/metrics"),
        r"beside the /metrics of schedulers.*set .*monitors.scheduler.path=/metrics",
    ),
    (
        "exemplars of others' monitors",
        settings(monitors__exemplars__enabled=True, monitors__upstreamEnabled=True),
        r"monitors.exemplars.enabled.* monitors.upstreamEnabled=false, or leave them off",
    ),
    ("no value", settings(cluster__worker__threads=None), r"cluster.worker.*threads"),
    ("no section", settings(config__dask={"distributed": None}), r"config.dask.distributed"),
    (
        "a variable of ours",
        settings(cluster__worker__environment=[{"name": "PYTHONPATH", "value": "/mine"}]),
        r"cluster.worker.environment: PYTHONPATH is set by the chart itself",
    ),
    (
        "a volume's name twice",
        settings(
            monitors__preset="",
            cluster__kind="plain",
            cluster__worker__volumes=[{"name": "tmp", "emptyDir": {}}],
        ),
        r"cluster.worker.volumes: tmp is the name of a volume of the chart's own; give yours an",
    ),
    (
        "two volumes in one place",
        settings(
            monitors__preset="",
            cluster__kind="plain",
            **{"config__memusage__flight-directory": "/tmp/"},
        ),
        r"two volumes of the worker are mounted at /tmp; see .*memusage.flight-directory",
    ),
    (
        "a relative path",
        settings(**{"config__memusage__flight-directory": "~/flight"}),
        r"flight-directory: a volume is mounted there, and ~/flight is no absolute path",
    ),
    ("no command", settings(cluster__command=None), r"cluster.*command"),
    ("an empty command", settings(cluster__command=[]), r"cluster.command.*(items|minItems)"),
    (
        "settings in the wrong place",
        settings(config__dask={"memusage": {"sorce": "kernel"}}),
        r"config.dask.memusage: .* go into config.memusage",
    ),
    (
        "two namespaces of metrics",
        settings(config__dask={"distributed": {"dashboard": {"prometheus": {"namespace": "x"}}}}),
        r"prometheus.namespace is x and metricNamespace is dask, .*set that one alone",
    ),
    (
        "no list of preloads",
        settings(config__dask={"distributed": {"scheduler": {"preload": {"mine": "a"}}}}),
        r"config.dask.distributed.scheduler.preload",
    ),
    ("a number in quotes", settings(monitors__workers__port="8788"), r"monitors.*port"),
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
    (
        "a preload in one word",
        settings(cluster__scheduler__extraArgs=["--preload=mine"]),
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
