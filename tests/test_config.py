"""Settings: one list of defaults, one clear error each, and schema and checks that agree."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import dask
import jsonschema
import pytest
import yaml
from distributed import Client

from dask_memusage_exporter import ConfigError, MemusageSchedulerPlugin, install
from dask_memusage_exporter.config import (
    DEFAULT_BUCKETS,
    DEFAULT_TRIM_SHARE,
    MIB,
    Settings,
    explicit,
    prometheus_namespace,
)


@pytest.fixture(autouse=True)
def as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is set but what a test sets."""
    monkeypatch.delenv("DASK_MEMUSAGE__WORKER_METRICS")
    with dask.config.set({"memusage": {}}):
        yield


def _resource(name: str) -> Any:
    text = resources.files("dask_memusage_exporter").joinpath(name).read_text()
    return yaml.safe_load(text)


DEFAULTS = _resource("memusage.yaml")
SCHEMA = _resource("memusage-schema.yaml")


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return ``{"csv.path": ...}`` of a tree."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f"{above}{name}."))
        else:
            leaves[above + name] = value
    return leaves


def nested(key: str, value: object) -> dict[str, Any]:
    """Return a whole configuration with one setting."""
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return {"memusage": tree}


def fits_schema(configuration: dict[str, Any]) -> bool:
    """Return whether the published schema takes a configuration."""
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(configuration)


# -- defaults ------------------------------------------------------------------------------------


def test_the_defaults_are_the_yamls() -> None:
    """Every key of memusage.yaml is a field, and its default is what is written there."""
    settings = Settings.load()
    keys = flat(DEFAULTS["memusage"])
    fields = {key.replace(".", "_").replace("-", "_") for key in keys}
    assert fields == set(Settings.__dataclass_fields__)
    assert settings == Settings(
        csv_path=None,
        csv_columns="task",
        source="auto",
        kernel_reset=True,
        jemalloc=False,
        trim=0.0,
        max_prefixes=40,
        maximum_window=600.0,
        buckets=DEFAULT_BUCKETS,
        worker_metrics="auto",
        shutdown_timeout=1.5,
        spans_enabled="auto",
        spans_task_key=True,
        spans_keep_peak=None,
        spans_keep_growth=None,
        spans_keep_largest=0,
        flight_directory=None,
        prefixes_allow=None,
        prefixes_deny=(),
    )
    with dask.config.set(DEFAULTS):  # all of it, said explicitly
        assert Settings.load() == settings


def test_the_schema_has_every_key_and_describes_it() -> None:
    """Neither more keys than the defaults nor fewer; the defaults are valid."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert fits_schema(DEFAULTS)

    def leaves(node: dict[str, Any], above: str = "") -> dict[str, Any]:
        found = {}
        for name, one in node["properties"].items():
            if "properties" in one:
                found.update(leaves(one, f"{above}{name}."))
            else:
                found[above + name] = one["description"]
        return found

    described = leaves(SCHEMA["properties"]["memusage"])
    assert described.keys() == flat(DEFAULTS["memusage"]).keys()
    assert all(described.values())


# -- values that are allowed, and what becomes of them ---------------------------------------------

GOOD: list[tuple[str, object, str, object]] = [
    ("csv.path", "memusage.csv", "csv_path", "memusage.csv"),
    ("csv.path", None, "csv_path", None),
    ("csv.columns", "task", "csv_columns", "task"),
    ("csv.columns", "full", "csv_columns", "full"),
    ("csv", None, "csv_path", None),
    ("prefixes", None, "prefixes_deny", ()),
    ("spans", None, "spans_enabled", "auto"),
    ("spans.keep", None, "spans_keep_largest", 0),
    ("source", "auto", "source", "auto"),
    ("source", "kernel", "source", "kernel"),
    ("source", "polling", "source", "polling"),
    ("kernel-reset", True, "kernel_reset", True),
    ("kernel-reset", False, "kernel_reset", False),
    ("jemalloc", True, "jemalloc", True),
    ("jemalloc", "/opt/libjemalloc.so.2", "jemalloc", "/opt/libjemalloc.so.2"),
    ("trim", False, "trim", 0.0),
    ("trim", True, "trim", DEFAULT_TRIM_SHARE),
    ("trim", 0, "trim", 0.0),
    ("trim", 0.5, "trim", 0.5),
    ("trim", 0.01, "trim", 0.01),
    ("max-prefixes", 1, "max_prefixes", 1),
    ("max-prefixes", 10_000, "max_prefixes", 10_000),
    ("maximum-window", "10m", "maximum_window", 600.0),
    ("maximum-window", "10 minutes", "maximum_window", 600.0),
    ("maximum-window", "1.5h", "maximum_window", 5400.0),
    ("maximum-window", 10, "maximum_window", 10.0),
    ("maximum-window", "86400", "maximum_window", 86_400.0),
    ("buckets", None, "buckets", DEFAULT_BUCKETS),
    ("buckets", ["1MiB", "1GiB"], "buckets", (MIB, 1024 * MIB)),
    ("buckets", [1, 2.0, "3kB"], "buckets", (1, 2, 3000)),
    ("flight-directory", "/var/lib/x", "flight_directory", "/var/lib/x"),
    ("prefixes.allow", ["a*", "b"], "prefixes_allow", ("a*", "b")),
    ("prefixes.allow", [], "prefixes_allow", ()),
    ("prefixes.deny", ["a"], "prefixes_deny", ("a",)),
    ("prefixes.deny", None, "prefixes_deny", ()),
    ("spans.enabled", True, "spans_enabled", True),
    ("spans.enabled", False, "spans_enabled", False),
    ("spans.task-key", False, "spans_task_key", False),
    ("spans.keep.peak", "8GiB", "spans_keep_peak", 8 * 2**30),
    ("spans.keep.growth", 1000, "spans_keep_growth", 1000),
    ("spans.keep.largest", 5, "spans_keep_largest", 5),
    ("shutdown-timeout", "300ms", "shutdown_timeout", 0.3),
    ("shutdown-timeout", 0, "shutdown_timeout", 0.0),
    ("worker-metrics", "auto", "worker_metrics", "auto"),
    ("worker-metrics", "full", "worker_metrics", "full"),
    ("worker-metrics", "totals", "worker_metrics", "totals"),
    ("worker-metrics", "off", "worker_metrics", "off"),
    ("worker-metrics", False, "worker_metrics", "off"),  # a bare `off` in YAML 1.1
]


@pytest.mark.parametrize(("key", "value", "field", "expected"), GOOD)
def test_a_value_that_is_allowed(key: str, value: object, field: str, expected: object) -> None:
    """Schema and checks take it, and it comes out in the field's own unit."""
    assert fits_schema(nested(key, value))
    with dask.config.set(nested(key, value)):
        assert getattr(Settings.load(), field) == expected


#: Values that are wrong, and what of the message says what is allowed.
BAD: list[tuple[str, object, str]] = [
    ("csv.path", 5, "is not a file's path"),
    ("csv.path", "", "is not a file's path"),
    ("csv.path", " ", "is not a file's path"),
    ("csv.path", ["x.csv"], "is not a file's path"),
    ("csv.columns", "all", "is not one of task, full"),
    ("csv.columns", None, "is not one of task, full"),
    ("source", "jemalloc5", "is not one of auto, kernel, jemalloc, polling"),
    ("source", False, "is not one of auto, kernel, jemalloc, polling"),
    ("kernel-reset", "yes", "is not true or false"),
    ("kernel-reset", 1, "is not true or false"),
    ("kernel-reset", None, "is not true or false"),
    ("trim", 0.51, "is not true, false or a share from 0 to 0.5"),
    ("trim", -0.1, "is not true, false or a share from 0 to 0.5"),
    ("trim", "5%", "is not true, false or a share from 0 to 0.5"),
    ("max-prefixes", 0, "is not a whole number from 1 to 10000"),
    ("max-prefixes", 10_001, "is not a whole number from 1 to 10000"),
    ("max-prefixes", 2.5, "is not a whole number from 1 to 10000"),
    ("max-prefixes", True, "is not a whole number from 1 to 10000"),
    ("max-prefixes", "40", "is not a whole number from 1 to 10000"),
    ("maximum-window", 9.9, "is not a time span from 10s to 1 day, such as '10m'"),
    ("maximum-window", 86_401, "is not a time span from 10s to 1 day"),
    ("maximum-window", "", "is not a time span from 10s to 1 day"),
    ("maximum-window", "-10m", "is not a time span from 10s to 1 day"),
    ("maximum-window", True, "is not a time span from 10s to 1 day"),
    ("maximum-window", [600], "is not a time span from 10s to 1 day"),
    ("buckets", [], "is not a list of 1 to 200 rising sizes above 0, such as [1MiB, 1GiB]"),
    ("buckets", list(range(1, 202)), "is not a list of 1 to 200 rising sizes"),
    ("buckets", [0, 1], "is not a list of 1 to 200 rising sizes above 0"),
    ("buckets", [-5], "is not a list of 1 to 200 rising sizes above 0"),
    ("buckets", [True, 5], "is not a list of 1 to 200 rising sizes above 0"),
    ("buckets", [[1]], "is not a list of 1 to 200 rising sizes above 0"),
    ("buckets", [None], "is not a list of 1 to 200 rising sizes above 0"),
    ("buckets", [""], "is not a list of 1 to 200 rising sizes above 0"),
    ("buckets", "1MiB", "is not a list of 1 to 200 rising sizes above 0"),
    ("flight-directory", "", "is not a file's path"),
    ("flight-directory", " ", "is not a file's path"),
    ("prefixes.allow", "a*", "is not a list of patterns such as ['sum*', 'mean-*']"),
    ("prefixes.deny", [1], "is not a list of patterns"),
    ("jemalloc", 1, "is not true, false or the path of libjemalloc.so.2"),
    ("jemalloc", " ", "is not true, false or the path of libjemalloc.so.2"),
    ("spans.enabled", "yes", "is not auto, true or false"),
    ("spans.task-key", "no", "is not true or false"),
    ("spans.keep.peak", 0, "is not a size above 0, such as 1GiB"),
    ("spans.keep.peak", "", "is not a size above 0, such as 1GiB"),
    ("spans.keep.growth", True, "is not a size above 0, such as 1GiB"),
    ("spans.keep.largest", -1, "is not a whole number from 0 to 1000"),
    ("shutdown-timeout", 61, "is not a time span from 0s to 60s"),
    ("shutdown-timeout", True, "is not a time span from 0s to 60s"),
    ("worker-metrics", "on", "is not one of auto, full, totals, off"),
    ("worker-metrics", True, "is not one of auto, full, totals, off"),
    ("worker-metrics", ["full"], "is not one of auto, full, totals, off"),
]

#: Wrong values that JSON Schema has no words for; the checks refuse them all the same.
BEYOND_SCHEMA: list[tuple[str, object, str]] = [
    ("spans.keep.peak", "much", "is not a size above 0, such as 1GiB"),
    ("shutdown-timeout", "5m", "is not a time span from 0s to 60s, such as '1.5s'"),
    ("shutdown-timeout", "soon", "is not a time span from 0s to 60s"),
    ("maximum-window", "5s", "is not a time span from 10s to 1 day"),
    ("maximum-window", "25h", "is not a time span from 10s to 1 day"),
    ("maximum-window", "10 apples", "is not a time span from 10s to 1 day"),
    ("buckets", ["1GiB", "1MiB"], "is not a list of 1 to 200 rising sizes"),
    ("buckets", [5, 5], "is not a list of 1 to 200 rising sizes"),
    ("buckets", ["much"], "is not a list of 1 to 200 rising sizes"),
    ("buckets", [float("inf")], "is not a list of 1 to 200 rising sizes"),
    ("buckets", [float("nan")], "is not a list of 1 to 200 rising sizes"),
    ("buckets", ["1e400"], "is not a list of 1 to 200 rising sizes"),
    ("trim", float("nan"), "is not true, false or a share from 0 to 0.5"),
]


@pytest.mark.parametrize(("key", "value", "message"), [*BAD, *BEYOND_SCHEMA])
def test_a_value_that_is_wrong(key: str, value: object, message: str) -> None:
    """One error that names the key, the value and what is allowed; the schema refuses it too."""
    if (key, value, message) in BAD:
        assert not fits_schema(nested(key, value))
    with dask.config.set(nested(key, value)), pytest.raises(ConfigError) as caught:
        Settings.load()
    assert str(caught.value).startswith(f"memusage.{key}: {value!r} ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("max-prefix", 5, "did you mean memusage.max-prefixes?"),
        ("max_prefxes", 5, "did you mean memusage.max-prefixes?"),
        ("csv.pth", "x", "did you mean memusage.csv.path?"),
        ("csv", "x.csv", "did you mean memusage.csv.path?"),
        ("max-prefixes.limit", 5, "did you mean memusage.max-prefixes?"),
        ("xyzzy", 5, "the settings are buckets, csv.columns, csv.path, "),
    ],
)
def test_a_key_that_is_unknown(key: str, value: object, hint: str) -> None:
    """One error that names it and the nearest one, or all there are."""
    assert not fits_schema(nested(key, value))
    with dask.config.set(nested(key, value)), pytest.raises(ConfigError) as caught:
        Settings.load()
    name = f"memusage.{key.replace('_', '-')}"
    assert str(caught.value).startswith(f"{name}: there is no such setting; {hint}")


@pytest.mark.parametrize("tree", ["memusage.csv", 5, ["csv"]])
def test_a_section_that_is_no_mapping(tree: object) -> None:
    """Also an error of ours, not a traceback of Python's."""
    with dask.config.set({"memusage": tree}), pytest.raises(ConfigError, match="not a mapping"):
        Settings.load()


def test_an_empty_section_is_the_defaults() -> None:
    """A file with `memusage:` and nothing below it says nothing."""
    defaults = Settings.load()
    with dask.config.set({"memusage": None}):
        assert fits_schema({"memusage": None})
        assert Settings.load() == defaults


# -- where settings come from ---------------------------------------------------------------------


def _in_a_new_process(environment: dict[str, str], tmp_path: Path) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from dask_memusage_exporter.config import Settings; print(Settings.load())",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", "DASK_CONFIG": str(tmp_path), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_from_the_environment(tmp_path: Path) -> None:
    """Dask's own way, with underscores; values as Dask reads them."""
    settings = _in_a_new_process(
        {
            "DASK_MEMUSAGE__CSV__PATH": "from/the/environment.csv",
            "DASK_MEMUSAGE__CSV__COLUMNS": "full",
            "DASK_MEMUSAGE__SOURCE": "polling",
            "DASK_MEMUSAGE__KERNEL_RESET": "false",
            "DASK_MEMUSAGE__TRIM": "0.1",
            "DASK_MEMUSAGE__FLIGHT_DIRECTORY": "a/volume",
            "DASK_MEMUSAGE__PREFIXES__ALLOW": "['a*', 'b']",
            "DASK_MEMUSAGE__PREFIXES__DENY": "['ab']",
            "DASK_MEMUSAGE__MAX_PREFIXES": "7",
            "DASK_MEMUSAGE__MAXIMUM_WINDOW": "5m",
            "DASK_MEMUSAGE__BUCKETS": "['1MiB', '2MiB']",
            "DASK_MEMUSAGE__WORKER_METRICS": "off",
            "DASK_MEMUSAGE__SHUTDOWN_TIMEOUT": "2s",
            "DASK_MEMUSAGE__SPANS__ENABLED": "true",
            "DASK_MEMUSAGE__SPANS__KEEP__GROWTH": "1GiB",
        },
        tmp_path,
    )
    assert settings.strip() == (
        "Settings(csv_path='from/the/environment.csv', csv_columns='full', source='polling', "
        "kernel_reset=False, jemalloc=False, trim=0.1, flight_directory='a/volume', "
        "prefixes_allow=('a*', 'b'), "
        "prefixes_deny=('ab',), max_prefixes=7, maximum_window=300.0, "
        "buckets=(1048576, 2097152), worker_metrics='off', "
        "shutdown_timeout=2.0, spans_enabled=True, spans_task_key=True, spans_keep_peak=None, "
        "spans_keep_growth=1073741824, spans_keep_largest=0)"
    )


def test_settings_from_a_file(tmp_path: Path) -> None:
    """With hyphens, a bare YAML `off` among them; the environment stands above it."""
    (tmp_path / "memusage.yaml").write_text(
        "memusage:\n  max-prefixes: 5\n  worker-metrics: off\n  trim: on\n  csv:\n"
    )
    settings = _in_a_new_process({"DASK_MEMUSAGE__MAX_PREFIXES": "6"}, tmp_path)
    assert "max_prefixes=6, " in settings
    assert "worker_metrics='off'" in settings
    assert f"trim={DEFAULT_TRIM_SHARE}, " in settings
    assert "csv_path=None, " in settings


@pytest.mark.parametrize("key", ["max-prefixes", "max_prefixes"])
def test_hyphens_and_underscores_are_the_same(key: str) -> None:
    """Dask treats them so, and we do."""
    with dask.config.set({f"memusage.{key}": 3}):
        assert explicit() == {"max-prefixes": 3}
        assert Settings.load().max_prefixes == 3


def test_the_namespace_is_dasks() -> None:
    """Whatever Dask takes for its own names; none is none."""
    assert prometheus_namespace() == "dask"
    for value, expected in (("acme", "acme"), ("", ""), (None, "")):
        with dask.config.set({"distributed.dashboard.prometheus.namespace": value}):
            assert prometheus_namespace() == expected


# -- scheduler and worker --------------------------------------------------------------------------


def test_who_decides_what() -> None:
    """The worker's own for what depends on its machine; the scheduler's for all else."""
    own = {
        "source": "polling",
        "kernel-reset": False,
        "flight-directory": "/its/own",
        "max-prefixes": 3,
        "worker-metrics": "totals",
    }
    schedulers = {
        "source": "kernel",
        "kernel-reset": True,
        "flight-directory": "/other",
        "trim": 0.2,
        "max-prefixes": 7,
    }
    with dask.config.set({"memusage": own}):
        settings = Settings.load(schedulers)
    assert settings.source == "polling"  # its own
    assert settings.kernel_reset is False
    assert settings.flight_directory == "/its/own"
    assert settings.trim == 0.2  # it has said nothing of it
    assert settings.max_prefixes == 7  # the scheduler's
    assert settings.worker_metrics == "auto"  # the scheduler has said nothing: the default


def test_another_versions_settings_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """What only the scheduler knows is ignored; what only the worker has is said in a line."""
    with (
        dask.config.set({"memusage": {"sorce": "kernel"}}),
        caplog.at_level(logging.WARNING),
    ):
        settings = Settings.load({"from-the-future.a": 1, "max-prefixes": 7})
    assert settings.max_prefixes == 7
    (line,) = caplog.messages
    assert "memusage.sorce: there is no such setting; did you mean memusage.source?" in line


def test_the_error_travels() -> None:
    """From a scheduler in another process to the client that installs."""
    error = ConfigError("memusage.source: 'x' is not one of auto, kernel, jemalloc, polling")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ConfigError
    assert str(copy) == str(error)


@pytest.mark.parametrize(
    "way",
    [
        lambda client: install(client.cluster.scheduler),
        lambda client: install(client.cluster),
        install,
        lambda client: client.register_plugin(MemusageSchedulerPlugin()),
    ],
    ids=["scheduler", "cluster", "client", "plugin"],
)
def test_a_wrong_setting_is_an_error_of_install(
    way: Callable[[Client], Any], make_cluster: Any, make_client: Any
) -> None:
    """At the caller, through a client too, and nothing is set up."""
    cluster = make_cluster(processes=False)
    client = make_client(cluster)
    with (
        dask.config.set({"memusage.max-prefixes": 0}),
        pytest.raises(ConfigError, match=r"memusage\.max-prefixes: 0 is not a whole number"),
    ):
        way(client)
    assert "memusage" not in cluster.scheduler.extensions
    assert "memusage" not in cluster.scheduler.worker_plugins
    install(client)
    assert "memusage" in cluster.scheduler.extensions
