"""What ``doctor`` finds: on this machine, and by asking a cluster.

Covers: the facts, as plain as they come. What to make of them is ``advice``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import cloudpickle
from distributed import Client
from distributed.comm.core import connect
from distributed.security import Security

from dask_memusage_exporter import measure, nanny
from dask_memusage_exporter.cli import probe
from dask_memusage_exporter.cli.command import InputError
from dask_memusage_exporter.config import Settings

#: Seconds to wait for a scheduler, and for each worker's answer; how many are asked at once.
CONNECT_TIMEOUT = 5
ANSWER_TIMEOUT = 10
AT_ONCE = 100


class Machine(NamedTuple):
    """What can be measured in processes of this machine."""

    source: str
    why: str
    #: What to start processes with for jemalloc; empty: it cannot be turned on.
    variables: Mapping[str, str]
    #: Why it cannot.
    obstacle: str | None
    #: What this process was started with.
    environment: Mapping[str, str]


class Cluster(NamedTuple):
    """What a scheduler and its workers have said; see ``probe``."""

    address: str
    scheduler: Mapping[str, Any]
    workers: Mapping[str, Mapping[str, Any]]


def examine(settings: Settings | None) -> Machine:
    """Return what can be measured on this machine.

    Parameters
    ----------
    settings
        Of this process; None: they are wrong, and what works without them is told.
    """
    chosen = (
        measure.choose("auto", kernel_reset=True)
        if settings is None
        else measure.choose(settings.source, kernel_reset=settings.kernel_reset)
    )
    chosen.source.close()
    wanted = None if settings is None else settings.jemalloc
    try:
        variables = nanny.environment(wanted if isinstance(wanted, str) else None)
        obstacle = None
    except nanny.JemallocError as error:
        variables, obstacle = {}, str(error)
    return Machine(chosen.name, chosen.why, variables, obstacle, probe.started_with())


def ask(address: str) -> Cluster:
    """Ask a scheduler and its workers.

    Raises
    ------
    InputError
        It cannot be reached.
    """
    # By value: they may lack the package.
    cloudpickle.register_pickle_by_value(probe)
    try:
        return asyncio.run(_ask(address))
    except (OSError, ValueError, TypeError, asyncio.TimeoutError) as error:
        raise InputError(
            f"--scheduler: {address!r} cannot be reached ({error}); give the address that the "
            "scheduler has logged, such as tcp://127.0.0.1:8786"
        ) from None
    finally:
        cloudpickle.unregister_pickle_by_value(probe)


async def _ask(address: str) -> Cluster:
    await _reach(address)
    async with Client(
        address, timeout=CONNECT_TIMEOUT, set_as_default=False, asynchronous=True
    ) as client:
        scheduler = await client.run_on_scheduler(probe.scheduler)
        workers = scheduler.pop("workers")
        for worker, answer in (await _answers(client, probe.worker, workers)).items():
            workers[worker].update(answer)
        with_nanny = [worker for worker, one in workers.items() if one["nanny"]]
        for worker, refusal in (
            await _answers(client, probe.nanny, with_nanny, nanny=True)
        ).items():
            workers[worker]["refusal"] = refusal
        return Cluster(address, scheduler, workers)


async def _answers(
    client: Client, function: Callable[..., Any], workers: Iterable[str], **options: bool
) -> dict[str, Any]:
    """Run a function on each of these workers; return what those say that answer in time.

    One that is stopped, or whose task holds the GIL, answers nobody, and must not hold up the rest.
    """
    answers: dict[str, Any] = {}
    turn = asyncio.Semaphore(AT_ONCE)

    async def ask_one(worker: str) -> None:
        async with turn:
            asked = client.run(function, workers=[worker], on_error="ignore", **options)
            with suppress(Exception):  # no answer, or it has left meanwhile
                answers.update(await asyncio.wait_for(asked, ANSWER_TIMEOUT))

    await asyncio.gather(*map(ask_one, workers))
    return answers


async def _reach(address: str) -> None:
    """Raise what is wrong with an address.

    A Client would do so half started: it waits for itself at the end, and says so in a traceback.
    And it waits for ever where something else answers, such as the scheduler's own HTTP server.
    """
    arguments = Security().get_connection_args("client")
    connected = connect(address, timeout=CONNECT_TIMEOUT, **arguments)
    try:
        comm = await asyncio.wait_for(connected, CONNECT_TIMEOUT + 1)
    except asyncio.TimeoutError:
        raise OSError("what answers there is no scheduler") from None
    await comm.close()
