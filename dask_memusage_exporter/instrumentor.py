"""The instrumentor that ``opentelemetry-instrument`` finds, by the entry point of that name.

``opentelemetry-instrument python nightly.py`` makes what the program submits part of its traces,
and ``opentelemetry-instrument dask worker`` is a worker that measures. Needs the package
``opentelemetry-instrumentation``, which brings that command.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import dask
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from dask_memusage_exporter import submission

_PRELOAD, _KEY = "dask_memusage_exporter", "distributed.worker.preload"


class DaskMemusageInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Makes tasks children of the client's spans, and workers of this process measure."""

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what is instrumented."""
        return ["distributed >= 2025.1.0"]

    def _instrument(self, **_: Any) -> None:
        submission.wrap()
        configured = _configured()
        if _PRELOAD not in configured:
            dask.config.set({_KEY: [*configured, _PRELOAD]})

    def _uninstrument(self, **_: Any) -> None:
        submission.unwrap()
        dask.config.set({_KEY: [one for one in _configured() if one != _PRELOAD]})


def _configured() -> list[str]:
    preloads = dask.config.get(_KEY, default=None) or []
    return [preloads] if isinstance(preloads, str) else list(preloads)
