"""The plugins that are pushed to workers and nannies by value: import us there, or say they can't.

A worker that cannot unpickle a plugin dies at registration, and then no worker can join. So what
travels is this module's source text inside a pickle of builtins: it loads on any worker and any
Python that distributed runs on, with our package or without it, and decides there. Of the package
it uses ``worker.attach`` and ``nanny.turn_on`` alone: the scheduler's version may be newer or
older than theirs.

This module may import the standard library and distributed only.
"""

from __future__ import annotations

import logging
from typing import Any

from distributed.diagnostics.plugin import NannyPlugin, WorkerPlugin

# Below the worker's own logger: Dask shows it, Client.get_worker_logs too.
logger = logging.getLogger("distributed.worker.memusage")


class Bootstrap(WorkerPlugin):
    """Starts measuring on a worker that has the package; counts as ``missing`` where it has not.

    Parameters
    ----------
    options : dict
        See ``WorkerAgent.activate``. Plain types only.
    """

    name = "memusage"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def setup(self, worker: Any) -> Any:
        """Import the package and begin; never raise: that would close the worker.

        A worker that joins waits for what is returned before it takes tasks.
        """
        try:
            from dask_memusage_exporter.worker import attach

            ours = attach(worker, self.options)
            # Its own method in our place: one call less a transition.
            self.transition = ours.transition  # type: ignore[method-assign]
            # An older version has none.
            return getattr(ours, "introduction", lambda: None)()
        except Exception as error:
            logger.warning(
                "dask-memusage: tasks on this worker are not measured (%s: %s). They run as usual. "
                "Mend: install dask-memusage-exporter in the worker's environment, or correct the "
                "setting",
                type(error).__name__,
                error,
            )
            worker.metrics["memusage"] = _missing
            return None

    def teardown(self, worker: Any) -> None:
        """Stop measuring, unless a plugin of this name takes over at once."""
        agent = worker.extensions.get("memusage")
        if agent is not None:
            agent.release()


class NannyBootstrap(NannyPlugin):
    """Has a nanny start its workers on jemalloc, where it has the package.

    Parameters
    ----------
    options : dict
        See ``nanny.turn_on``. Plain types only.
    """

    name = "memusage-jemalloc"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def setup(self, nanny: Any) -> None:
        """Import the package and do it; never raise: that would close a nanny that starts."""
        try:
            from dask_memusage_exporter.nanny import turn_on

            # What runs already is started anew; a nanny that has no process yet starts one.
            self.restart = turn_on(nanny, self.options)
        except Exception as error:
            logging.getLogger("distributed.nanny.memusage").warning(
                "dask-memusage: jemalloc is not turned on (%s: %s). Mend: install "
                "dask-memusage-exporter in the nanny's environment",
                type(error).__name__,
                error,
            )


def _missing(_: Any) -> dict[str, str]:
    return {"source": "missing"}


def load(class_name: str, source: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the expression and its names whose value is a plugin, wherever it is evaluated."""
    expression = f"(exec(source, names), names['{class_name}'](options))[1]"
    return expression, {
        "source": source,
        "options": options,
        "names": {"__name__": "dask_memusage_exporter.bootstrap"},
    }


def _reduce(class_name: str, options: dict[str, Any]) -> tuple[Any, ...]:
    from importlib import resources

    source = resources.files("dask_memusage_exporter").joinpath("bootstrap.py").read_text()
    return eval, load(class_name, source, options)


class ByValue(WorkerPlugin):
    """Pickles as a :class:`Bootstrap` that needs nothing of ours to be unpickled."""

    name = Bootstrap.name

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduce("Bootstrap", self.options)


class NannyByValue(NannyPlugin):
    """Pickles as a :class:`NannyBootstrap` in the same way."""

    name = NannyBootstrap.name

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduce("NannyBootstrap", self.options)
