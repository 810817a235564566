"""Settings: read from ``dask.config`` key ``memusage``, checked once, frozen.

Covers: names, types and ranges of every key in ``memusage.yaml``, the one list of defaults.
Does not cover: whether a path can be written or a source works here; who uses it finds out.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

logger = logging.getLogger("distributed.worker.memusage")

MIB = 2**20

#: Upper bounds of both histograms in bytes: 1 and 1.5 times 2^k MiB, 1 MiB to 256 GiB.
DEFAULT_BUCKETS: tuple[int, ...] = tuple(
    sorted([2**k * MIB for k in range(19)] + [3 * 2**k * MIB // 2 for k in range(18)])
)

#: What ``trim: true`` stands for: the share of a worker's time.
DEFAULT_TRIM_SHARE = 0.05

#: A worker's own value of these wins over the scheduler's: they say how to measure, and the
#: machine decides that. All else (prefixes, rows) must be the same in a whole cluster.
WORKER_KEYS = frozenset({"source", "kernel-reset", "trim", "flight-directory"})


class ConfigError(ValueError):
    """A setting is unknown or out of range; the message names key, value and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """The checked settings, one field a key of ``memusage.yaml``.

    ``maximum_window`` and ``shutdown_timeout`` are in seconds, ``buckets`` in bytes without the
    closing infinity, ``trim`` a share of time from 0 (off) to 0.5, ``jemalloc`` a library's path or
    whether to look for one.
    """

    csv_path: str | None
    csv_columns: str
    source: str
    kernel_reset: bool
    jemalloc: bool | str
    trim: float
    flight_directory: str | None
    prefixes_allow: tuple[str, ...] | None
    prefixes_deny: tuple[str, ...]
    max_prefixes: int
    maximum_window: float
    buckets: tuple[int, ...]
    worker_metrics: str
    shutdown_timeout: float
    spans_enabled: bool | str
    spans_task_key: bool
    spans_keep_peak: int | None
    spans_keep_growth: int | None
    spans_keep_largest: int

    @classmethod
    def load(cls, base: Mapping[str, Any] | None = None) -> Settings:
        """Read and check the settings of this process.

        Parameters
        ----------
        base
            Explicit settings of the scheduler (see :func:`explicit`). They stand below this
            process's own for the keys in :data:`WORKER_KEYS` and above them for all others. What
            only one of the two versions knows is no error then.

        Raises
        ------
        ConfigError
            The first setting that is unknown or out of range.
        """
        own = explicit()
        values = _flatten(_defaults())
        for key in own.keys() - values.keys():
            unknown = f"memusage.{key}: there is no such setting{_hint(key, values)}"
            if base is None:
                raise ConfigError(unknown)
            logger.warning("dask-memusage: %s", unknown)
        if base is not None:
            own = {key: value for key, value in own.items() if key in WORKER_KEYS}
            values.update({key: value for key, value in base.items() if key in values})
        values.update(own)
        return cls(
            **{
                key.replace(".", "_").replace("-", "_"): _CHECKS[key](f"memusage.{key}", value)
                for key, value in values.items()
            }
        )

    def wants(self, prefix: str) -> bool:
        """Return whether a prefix may have a label of its own."""
        allowed = self.prefixes_allow is None or _matches(prefix, self.prefixes_allow)
        return allowed and not _matches(prefix, self.prefixes_deny)


def check(key: str, value: object) -> None:
    """Check a value that somebody gives for a setting in another way, such as an argument.

    Raises
    ------
    ConfigError
        As for the setting itself.
    """
    _CHECKS[key](f"memusage.{key}", value)


def explicit() -> dict[str, Any]:
    """Return what somebody has set under ``memusage``, flat: ``{"csv.path": "x.csv"}``.

    Defaults are not in ``dask.config``, so that what was said can be told from what was not.
    """
    tree = dask.config.get("memusage", {})
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"memusage: {tree!r} is not a mapping of settings; see memusage.yaml")
    return _flatten(tree)


def prometheus_namespace() -> str:
    """Return the prefix of all metric names, as Dask's own setting has it (may be empty)."""
    return dask.config.get("distributed.dashboard.prometheus.namespace", default="dask") or ""


def _defaults() -> Mapping[str, Any]:
    text = (Path(__file__).parent / "memusage.yaml").read_text()
    defaults: Mapping[str, Any] = yaml.safe_load(text)["memusage"]
    return defaults


def _flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        # Dask reads names from the environment with underscores, from files with hyphens.
        key = above + str(name).replace("_", "-")
        if isinstance(value, Mapping):
            flat.update(_flatten(value, key + "."))
        elif value is not None or key not in _SECTIONS:  # a section with nothing in it
            flat[key] = value
    return flat


def _hint(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if key in _SECTIONS:
        close = [one for one in known if one.startswith(key + ".")]
    if close:
        return f"; did you mean memusage.{close[0]}?"
    return "; the settings are " + ", ".join(sorted(known))


def _one_of(*allowed: str) -> Callable[[str, object], str]:
    def check(key: str, value: object) -> str:
        # YAML 1.1 reads a bare `off` as false.
        value = "off" if value is False and "off" in allowed else value
        if value not in allowed:
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(allowed)}")
        return str(value)

    return check


def _path(key: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{key}: {value!r} is not a file's path")
    return value


def _boolean(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r} is not true or false")
    return value


def _spans(key: str, value: object) -> bool | str:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ConfigError(f"{key}: {value!r} is not auto, true or false")


def _size(key: str, value: object) -> int | None:
    wrong = ConfigError(f"{key}: {value!r} is not a size above 0, such as 1GiB")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or value == "":
        raise wrong
    try:
        size = int(parse_bytes(value))
    except (ValueError, LookupError, OverflowError):
        raise wrong from None
    if size <= 0:
        raise wrong
    return size


def _jemalloc(key: str, value: object) -> bool | str:
    if isinstance(value, bool) or (isinstance(value, str) and value.strip()):
        return value
    raise ConfigError(f"{key}: {value!r} is not true, false or the path of libjemalloc.so.2")


def _share(key: str, value: object) -> float:
    if isinstance(value, bool):
        return DEFAULT_TRIM_SHARE if value else 0.0
    if not isinstance(value, (int, float)) or not 0 <= value <= 0.5:
        raise ConfigError(f"{key}: {value!r} is not true, false or a share from 0 to 0.5")
    return float(value)


def _patterns(key: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{key}: {value!r} is not a list of patterns such as ['sum*', 'mean-*']")
    return tuple(value)


def _matches(prefix: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(prefix, pattern) for pattern in patterns)


def _whole(least: int, most: int) -> Callable[[str, object], int]:
    def check(key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{key}: {value!r} is not a whole number from {least} to {most}")
        return value

    return check


def _seconds(least: float, most: float, words: str) -> Callable[[str, object], float]:
    def check(key: str, value: object) -> float:
        wrong = ConfigError(f"{key}: {value!r} is not a time span {words}")
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong
        try:
            seconds = float(parse_timedelta(value))
        except (ValueError, LookupError, OverflowError):
            raise wrong from None
        if not least <= seconds <= most:
            raise wrong
        return seconds

    return check


def _buckets(key: str, value: object) -> tuple[int, ...]:
    if value is None:
        return DEFAULT_BUCKETS
    wrong = ConfigError(
        f"{key}: {value!r} is not a list of 1 to 200 rising sizes above 0, such as [1MiB, 1GiB]"
    )
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 200:
        raise wrong
    for bound in value:
        if isinstance(bound, bool) or not isinstance(bound, (int, float, str)) or bound == "":
            raise wrong
    try:
        bounds = tuple(parse_bytes(bound) for bound in value)
    except (ValueError, LookupError, OverflowError):
        raise wrong from None
    if bounds[0] <= 0 or any(a >= b for a, b in pairwise(bounds)):
        raise wrong
    return bounds


#: Keys that hold keys.
_SECTIONS = frozenset({"csv", "prefixes", "spans", "spans.keep"})

_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "csv.path": _path,
    "csv.columns": _one_of("task", "full"),
    "source": _one_of("auto", "kernel", "jemalloc", "polling"),
    "kernel-reset": _boolean,
    "jemalloc": _jemalloc,
    "trim": _share,
    "flight-directory": _path,
    "prefixes.allow": _patterns,
    "prefixes.deny": lambda key, value: _patterns(key, value) or (),
    "max-prefixes": _whole(1, 10_000),
    "maximum-window": _seconds(10, 86_400, "from 10s to 1 day, such as '10m'"),
    "buckets": _buckets,
    "worker-metrics": _one_of("auto", "full", "totals", "off"),
    "spans.enabled": _spans,
    "spans.task-key": _boolean,
    "spans.keep.peak": _size,
    "spans.keep.growth": _size,
    "spans.keep.largest": _whole(0, 1_000),
    "shutdown-timeout": _seconds(0, 60, "from 0s to 60s, such as '1.5s'"),
}
