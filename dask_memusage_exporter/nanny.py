"""Turning jemalloc on: finding it, and having nannies start their workers with it.

Covers: Debian and Ubuntu, Fedora, conda, a path that is given; workers that start and those that
run already, which are started anew.
Does not cover: workers without a nanny. Their process must be started with the variables that
:func:`environment` returns.

Sources: ld.so(8), LD_PRELOAD; Python's documentation of PYTHONMALLOC; Arrow's of
ARROW_DEFAULT_MEMORY_POOL; ``distributed.nanny``, ``pre_spawn_env``.
"""

from __future__ import annotations

import asyncio
import functools
import glob
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask_memusage_exporter import measure
from dask_memusage_exporter.bootstrap import NannyBootstrap, NannyByValue

if TYPE_CHECKING:
    from distributed import Nanny

logger = logging.getLogger("distributed.nanny.memusage")

#: Where the library lies: conda, Debian and Ubuntu, Fedora, others.
_PLACES = (
    "{prefix}/lib/libjemalloc.so.2",
    "/usr/lib/*-linux-*/libjemalloc.so.2",
    "/usr/lib64/libjemalloc.so.2",
    "/usr/lib/libjemalloc.so.2",
    "/usr/local/lib/libjemalloc.so.2",
)

_INSTALL = (
    "install it (Debian, Ubuntu: libjemalloc2; Fedora: jemalloc; conda-forge: jemalloc), or give "
    "its path as memusage.jemalloc"
)

#: Run in a process of its own: by its path, so that nothing else need be imported.
_PROBE = "import runpy, sys; print(runpy.run_path(sys.argv[1])['ThreadPeak']().version)"
_PROBE_SECONDS = 30


class JemallocError(OSError):
    """jemalloc cannot be used on this machine; the message says why and how to mend it."""


def environment(path: str | None = None) -> dict[str, str]:
    """Return the variables with which a worker's process must start on this machine.

    Parameters
    ----------
    path
        Of the library; None: where distributions put it.

    Returns
    -------
    dict
        ``LD_PRELOAD`` with what this process has there itself, ``PYTHONMALLOC=malloc``, and
        ``ARROW_DEFAULT_MEMORY_POOL=system``, so that Arrow's memory comes to malloc too, unless
        this process has another there.

    Raises
    ------
    JemallocError
        There is no library, or a process that starts with it does not know its threads' peaks.
    """
    library = path or find()
    why = _try(library)
    if why is not None:
        raise JemallocError(why)
    before = [one for one in os.environ.get("LD_PRELOAD", "").split(":") if one]
    return {
        "LD_PRELOAD": ":".join([library, *(one for one in before if one != library)]),
        "PYTHONMALLOC": "malloc",
        "ARROW_DEFAULT_MEMORY_POOL": os.environ.get("ARROW_DEFAULT_MEMORY_POOL", "system"),
    }


def find() -> str:
    """Return the path of libjemalloc.

    Raises
    ------
    JemallocError
        There is none where distributions put it.
    """
    for place in _PLACES:
        found = sorted(glob.glob(place.format(prefix=glob.escape(sys.prefix))))
        if found:
            return found[0]
    raise JemallocError(f"there is no libjemalloc.so.2 on this machine; {_INSTALL}")


@functools.cache
def _try(library: str) -> str | None:
    """Start a process with a library; return why it will not do, or None."""
    if not os.path.isfile(library):
        return f"{library}: there is no such file; {_INSTALL}"
    probe = Path(measure.__file__).with_name("jemalloc.py")
    try:
        done = subprocess.run(  # noqa: S603  # a program that the caller chose to run with
            [sys.executable, "-S", "-c", _PROBE, str(probe)],
            env={**os.environ, "LD_PRELOAD": library, "PYTHONMALLOC": "malloc"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{library}: a process that starts with it does not come up ({error})"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    why = said[-1].removeprefix("OSError: ") if said else f"it ends with status {done.returncode}"
    return f"{library}: a process that starts with it does not know its threads' peaks ({why})"


class _Lent(dict[str, str]):
    """A nanny's ``pre_spawn_env`` that takes our variables out of ``os.environ`` again.

    The nanny puts it all there, in its own process (which is the client's, in a LocalCluster), just
    before it spawns the worker's, and leaves it there.
    """

    def __init__(self, nanny: Nanny, ours: Mapping[str, str]) -> None:
        super().__init__({**nanny.pre_spawn_env, **ours})
        self._nanny, self._ours = nanny, dict(ours)

    def __iter__(self) -> Iterator[str]:
        # By this, and only by it, os.environ.update() reads a mapping.
        _lend(self._ours)
        self._nanny._ongoing_background_tasks.call_soon(self._give_back)
        return super().__iter__()

    async def _give_back(self) -> None:
        try:
            await asyncio.wait_for(self._spawned(), timeout=60)
        except asyncio.TimeoutError:
            logger.warning("dask-memusage: the worker's process has not been spawned in 60 s")
        finally:
            _give_back()

    async def _spawned(self) -> None:
        while (process := self._nanny.process) is not None and process.pid is None:
            await asyncio.sleep(0.02)


_before: dict[str, str | None] = {}
_borrowers = 0


def _lend(variables: Mapping[str, str]) -> None:
    """Remember what this process has, until all nannies in it have given back."""
    global _borrowers
    _borrowers += 1
    for name in variables:
        _before.setdefault(name, os.environ.get(name))


def _give_back() -> None:
    global _borrowers
    _borrowers -= 1
    if _borrowers == 0:
        for name, value in _before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _before.clear()


def turn_on(nanny: Nanny, options: Mapping[str, Any]) -> bool:
    """Have a nanny's next worker processes start with jemalloc; return whether that is new.

    Where it cannot be, a line in the nanny's log says why, and the worker starts as ever.

    Parameters
    ----------
    options
        ``path`` of the library, or None. Unknown ones are ignored: whoever sends them may be newer.
    """
    try:
        variables = environment(options.get("path"))
    except JemallocError as error:
        logger.warning("dask-memusage: jemalloc is not turned on. %s", error)
        return False
    if all(nanny.pre_spawn_env.get(name) == value for name, value in variables.items()):
        return False
    nanny.pre_spawn_env = lent = _Lent(nanny, variables)
    if nanny.process is not None:  # it has been given the one of before, and starts the next too
        nanny.process.pre_spawn_env = lent
    logger.info("dask-memusage: the worker's process starts with %s", variables["LD_PRELOAD"])
    return True


class MemusageNannyPlugin(NannyBootstrap):
    """Has workers run on jemalloc: ``client.register_plugin(MemusageNannyPlugin())``.

    Workers that run already are started anew, and lose what they hold. A nanny without the package
    or without the library goes on as before.

    Parameters
    ----------
    path
        Of the library on the nannies' machines; None: where distributions put it.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__({"path": path})

    def __reduce__(self) -> Any:
        return NannyByValue(self.options).__reduce__()
