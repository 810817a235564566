"""The instrumentor that ``opentelemetry-instrument`` finds, by the entry point of that name.

``opentelemetry-instrument python nightly.py`` makes what the program submits part of its traces,
and ``opentelemetry-instrument dask worker`` is a worker that measures. A program that is started
without that command calls ``DaskMemusageInstrumentor().instrument()`` itself, with the same effect.
Needs the package ``opentelemetry-instrumentation``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import dask
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from dask_memusage_exporter import submission

_MODULE, _KEY = "dask_memusage_exporter", "distributed.worker.preload"

#: Loads us where we are, as text: a worker that cannot import a preload by its name does not start,
#: and this configuration travels, to hosts of an ``SSHCluster`` too.
PRELOAD = f"""\
try:
    from {_MODULE} import dask_setup
except Exception as error:
    why = type(error).__name__ + ": " + str(error)
    def dask_setup(worker):
        import logging
        logging.getLogger("distributed.worker.memusage").warning(
            "dask-memusage: tasks on this worker are not measured (" + why + "). They run as "
            "usual. Mend: install dask-memusage-exporter in the worker's environment"
        )
"""


class DaskMemusageInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Makes tasks children of the client's spans, and workers of this process measure."""

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what is instrumented."""
        return ["distributed >= 2025.1.0"]

    def _instrument(self, **_: Any) -> None:
        submission.wrap()
        configured = _configured()
        if not {PRELOAD, _MODULE} & set(configured):
            dask.config.set({_KEY: [*configured, PRELOAD]})

    def _uninstrument(self, **_: Any) -> None:
        submission.unwrap()
        dask.config.set({_KEY: [one for one in _configured() if one != PRELOAD]})


def _configured() -> list[str]:
    preloads = dask.config.get(_KEY, default=None) or []
    return [preloads] if isinstance(preloads, str) else list(preloads)
