"""The job that the pictures show: kinds of task that differ in what they need, and one that dies.

Imported on workers, so this module must stay light.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from distributed import Client, wait
from distributed.scheduler import KilledWorker

MIB = 2**20


def array(mib: float) -> np.ndarray:
    """Return an array that is in memory."""
    return np.ones(int(mib * MIB) // 8)


def load(mib: float) -> np.ndarray:
    """Read a chunk: what it makes, it keeps."""
    made = array(mib)
    time.sleep(0.15)
    return made


def clean(chunk: np.ndarray) -> np.ndarray:
    """Mask a chunk: two copies for a moment, and half is left."""
    mask = chunk > 0
    kept = chunk[mask] * 2.0
    time.sleep(0.2)
    return kept[::2].copy()


def aggregate(*chunks: np.ndarray) -> float:
    """Put chunks together: all of them at once."""
    whole = np.concatenate(chunks)
    time.sleep(0.3)
    return float(whole.sum())


def tokenise(words: int) -> int:
    """Make many small objects."""
    counted: dict[str, int] = {}
    for number in range(words):
        counted[f"word {number}"] = number
    return len(counted)


def train(mib: float) -> float:
    """Hold more each time it is called: what a regression looks like."""
    block = array(mib)
    time.sleep(0.5)
    return float(block[0])


def outer_join(limit: float) -> int:
    """Grow until the nanny kills the worker."""
    blocks: list[np.ndarray] = []
    while sum(block.nbytes for block in blocks) < limit:
        blocks.append(array(16))
        time.sleep(0.1)
    time.sleep(60)
    return len(blocks)


def one_round(client: Client, number: int, seconds: float, elapsed: float) -> None:
    """Run one round of the pipeline; later rounds have more to train on."""
    key = f"{number}"
    chance = random.Random(number)  # noqa: S311 - the same job every time

    def send(function: Callable[..., Any], *arguments: Any, at: int = 0) -> Any:
        return client.submit(function, *arguments, key=f"{function.__name__}-{key}-{at}")

    loaded = [send(load, chance.choice((24, 32, 48, 64)), at=at) for at in range(6)]
    cleaned = [send(clean, chunk, at=at) for at, chunk in enumerate(loaded)]
    send_all = [
        send(aggregate, *cleaned),
        *(send(tokenise, chance.randrange(50_000, 150_000), at=at) for at in range(3)),
        send(train, 60 + 160 * elapsed / seconds),
    ]
    wait(send_all)


def run(client: Client, seconds: float, limit: float) -> None:
    """Run rounds for some time; half way, and once more later, a task takes too much."""
    began, number, deaths = time.monotonic(), 0, 0
    while (elapsed := time.monotonic() - began) < seconds:
        one_round(client, number, seconds, elapsed)
        number += 1
        if elapsed > seconds * (0.4, 0.7, 2)[deaths]:
            deaths += 1
            died = client.submit(outer_join, limit, key=f"outer_join-{deaths}")
            if not isinstance(died.exception(), KilledWorker):
                raise RuntimeError("the task that takes too much was not killed")
