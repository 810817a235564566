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
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

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


class _NotLoadedError(JemallocError):
    """It does not even get into a process."""


def environment(path: str | None = None, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables with which a worker's process must start on this machine.

    Parameters
    ----------
    path
        Of the library; None: the first that works where distributions put it.
    before
        With which it would start otherwise; None: those of this process.

    Returns
    -------
    dict
        ``LD_PRELOAD`` with what is there before behind it, ``PYTHONMALLOC=malloc``, and
        ``ARROW_DEFAULT_MEMORY_POOL=system``, so that Arrow's memory comes to malloc too, unless
        there is another before.

    Raises
    ------
    JemallocError
        There is no library, or a process that starts with it does not know its threads' peaks.
    """
    before = os.environ if before is None else before
    if path is None:
        path = find()
    elif refusal := _refusal(path):
        raise refusal
    return {
        "LD_PRELOAD": ":".join([path, *(one for one in _preloads(before) if one != path)]),
        "PYTHONMALLOC": "malloc",
        "ARROW_DEFAULT_MEMORY_POOL": before.get("ARROW_DEFAULT_MEMORY_POOL", "system"),
    }


def find() -> str:
    """Return the path of the first libjemalloc that works, of those where distributions put it.

    Others may lie before it: of another architecture, or too old.

    Raises
    ------
    JemallocError
        There is none, or none works; the message is of the one that came furthest.
    """
    refused: list[JemallocError] = []
    for place in _PLACES:
        for library in sorted(glob.glob(place.format(prefix=glob.escape(sys.prefix)))):
            refusal = _refusal(library)
            if refusal is None:
                return library
            refused.append(refusal)
    if not refused:
        raise JemallocError(f"there is no libjemalloc.so.2 on this machine; {_INSTALL}")
    raise max(refused, key=lambda error: not isinstance(error, _NotLoadedError))


def _refusal(library: str) -> JemallocError | None:
    """Return why a library will not do, or None."""
    if not os.path.isfile(library):
        return _NotLoadedError(f"{library}: there is no such file; {_INSTALL}")
    try:
        _try(library, "malloc", _stamps(library))
    except JemallocError as error:
        return error
    return None


def _preloads(variables: Mapping[str, str]) -> list[str]:
    """Return what LD_PRELOAD has; both signs part its entries."""
    return variables.get("LD_PRELOAD", "").replace(":", " ").split()


def _stamps(*libraries: str) -> tuple[tuple[int, int], ...]:
    """Return what changes where a library is replaced."""
    stats = [os.stat(one) for one in libraries if os.path.isfile(one)]
    return tuple((one.st_mtime_ns, one.st_size) for one in stats)


@functools.cache  # of what works: what does not may be mended outside of the file
def _try(preload: str, pythonmalloc: str, stamps: tuple[tuple[int, int], ...]) -> None:  # noqa: ARG001  # a key
    """Start a process; raise JemallocError where it does not know its threads' peaks."""
    probe = Path(measure.__file__).with_name("jemalloc.py")
    try:
        done = subprocess.run(  # noqa: S603  # a program that the caller chose to run with
            [sys.executable, "-S", "-c", _PROBE, str(probe)],
            env={**os.environ, "LD_PRELOAD": preload, "PYTHONMALLOC": pythonmalloc},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JemallocError(
            f"{preload}: a process that starts with it does not come up ({error})"
        ) from None
    if done.returncode == 0:
        return
    said = done.stderr.strip().splitlines()
    last = said[-1].removeprefix("OSError: ") if said else f"exit status {done.returncode}"
    for line in said:
        if "cannot be preloaded" in line:  # ld.so's own words, which say why
            raise _NotLoadedError(line.removeprefix("ERROR: ld.so: ").rstrip("."))
    if done.returncode < 0:
        by = signal.strsignal(-done.returncode)
        raise JemallocError(f"{preload}: a process that starts with it dies: {by} ({last})")
    raise JemallocError(
        f"{preload}: a process that starts with it does not know its threads' peaks ({last})"
    )


class _Lent(dict[str, str]):
    """A nanny's ``pre_spawn_env`` that takes our variables out of ``os.environ`` again.

    The nanny puts it all there, in its own process (which is the client's, in a LocalCluster), just
    before it spawns the worker's, and leaves it there.
    """

    def __init__(self, nanny: Nanny, before: Mapping[str, str], ours: Mapping[str, str]) -> None:
        super().__init__({**before, **ours})
        #: What somebody else had there.
        self.before = before
        self._nanny, self._ours = nanny, dict(ours)

    def __iter__(self) -> Iterator[str]:
        # By this, and only by it, os.environ.update() reads a mapping.
        _lend(self._ours)
        # Private, for no public name has what ends with the nanny; what comes of it is tested in
        # tests/test_jemalloc_on.py.
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


def _own_environment() -> dict[str, str]:
    """Return this process's environment as it is while nothing is lent."""
    now = {**os.environ, **_before}
    return {name: value for name, value in now.items() if value is not None}


#: Why it could not be turned on, of nannies that were asked; for ``doctor``.
obstacles: weakref.WeakKeyDictionary[Nanny, str] = weakref.WeakKeyDictionary()


def turn_on(nanny: Nanny, options: Mapping[str, Any]) -> bool:
    """Have a nanny's worker processes start with jemalloc; return whether one that runs must anew.

    Where it cannot be, a line in the nanny's log says why, and the worker starts as ever.

    Parameters
    ----------
    options
        ``path`` of the library, or None. Unknown ones are ignored: whoever sends them may be newer.
    """
    path = options.get("path")
    obstacles.pop(nanny, None)
    if not _is_on({**_own_environment(), **nanny.pre_spawn_env}, path):
        try:
            _prepare(nanny, path)
        except JemallocError as error:
            obstacles[nanny] = str(error)
            logger.warning("dask-memusage: jemalloc is not turned on. %s", error)
            return False
    return not _is_on(_started_with(nanny.pid), path)


def _prepare(nanny: Nanny, path: str | None) -> None:
    given = nanny.pre_spawn_env
    before = given.before if isinstance(given, _Lent) else given
    variables = environment(path, {**_own_environment(), **before})
    for name, value in variables.items():
        # The worker sets these anew, in its own environment, for what it starts itself.
        if name in given and nanny.env.get(name) == given[name]:
            nanny.env[name] = value
    nanny.pre_spawn_env = lent = _Lent(nanny, before, variables)
    if nanny.process is not None:  # it has been given the one of before, and starts the next too
        nanny.process.pre_spawn_env = lent
    logger.info("dask-memusage: the worker's process starts with %s", variables["LD_PRELOAD"])


def _started_with(pid: int | None) -> Mapping[str, str]:
    """Return what a running worker's process was started with: the nanny's may have changed."""
    try:
        return {} if pid is None else psutil.Process(pid).environ()
    except (psutil.Error, OSError):
        return {}


def _is_on(variables: Mapping[str, str], path: str | None) -> bool:
    """Return whether processes that start with these run on that jemalloc, or on any.

    ARROW_DEFAULT_MEMORY_POOL is not looked at: it is not worth what running workers hold.
    """
    preloads = _preloads(variables)
    if not preloads or path not in (None, *preloads):
        return False
    try:
        _try(
            variables["LD_PRELOAD"],
            variables.get("PYTHONMALLOC", ""),
            _stamps(*preloads),
        )
    except JemallocError:
        return False
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
