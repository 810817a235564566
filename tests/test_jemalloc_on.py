"""Turning jemalloc on, and telling whether it is the process's malloc."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dask_memusage_exporter
from dask_memusage_exporter import MemusageNannyPlugin, nanny
from tests import tasks
from tests.conftest import Measured, wait_until
from tests.test_many_threads import VARIABLES, added_to, record, script, source


def pids(cluster: Any) -> set[int]:
    return {worker.pid for worker in cluster.workers.values()}


def test_a_running_cluster(
    jemalloc: str, make_cluster: Callable[..., Any], make_client: Callable[..., Client]
) -> None:
    """Its workers are started anew, once; the client's own environment is as before."""
    before = dict(os.environ)
    cluster = make_cluster(n_workers=2)
    client = make_client(cluster)
    old = pids(cluster)
    dask_memusage_exporter.install(client, jemalloc=True)
    client.wait_for_workers(2)
    new = pids(cluster)
    assert not old & new
    assert set(client.run(malloc_of).values()) == {"jemalloc"}
    dask_memusage_exporter.install(cluster, jemalloc=True)
    client.register_plugin(MemusageNannyPlugin())
    assert pids(cluster) == new
    assert {k: v for k, v in os.environ.items() if k in VARIABLES} == {
        k: v for k, v in before.items() if k in VARIABLES
    }
    # A worker that its nanny starts again has it too, and gives back again.
    client.restart()
    client.wait_for_workers(2)
    assert set(client.run(malloc_of).values()) == {"jemalloc"}
    assert not VARIABLES & added_to(before)


def malloc_of(dask_worker: Any) -> str:
    return dask_worker.metrics["memusage"](dask_worker)["source"]


@pytest.mark.parametrize("path", ["/no/such/libjemalloc.so.2", "libc"])
def test_a_library_that_will_not_do(
    path: str, measure: Callable[..., Measured], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The workers come up as ever, and the nanny's log says why and how to mend it."""
    if path == "libc":  # a library that loads, and is no jemalloc
        path = str(tmp_path / "libjemalloc.so.2")
        Path(path).symlink_to(_libc())
    measured = measure({"memusage.jemalloc": path})
    measured.client.submit(tasks.array, 20, key="as-ever").result()
    wait_until(lambda: source(measured) == "kernel")
    assert record(measured, "as-ever").scope != "thread"
    assert any("jemalloc is not turned on" in line and path in line for line in caplog.messages)


def _libc() -> str:
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if "libc.so.6" in line)


PROBE = """
from dask_memusage_exporter.measure import choose
chosen = choose("auto", kernel_reset=True)
print(chosen.name, "|", chosen.why)
"""


def test_without_pythonmalloc(jemalloc: str) -> None:
    """Small objects would be missing: the number is not taken, and the log says what to set."""
    said = script(PROBE, LD_PRELOAD=jemalloc)
    assert said.startswith("kernel |")
    assert "set PYTHONMALLOC=malloc" in said


def test_without_jemalloc() -> None:
    """Plain glibc is named for what it is."""
    said = script(PROBE, PYTHONMALLOC="malloc")
    assert said.startswith("kernel |")
    assert "malloc is not jemalloc" in said


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
def test_a_jemalloc_that_is_not_the_process_malloc(mode: str, jemalloc: str) -> None:
    """One that a library has brought along, openly or not, is not taken for it."""
    said = script(
        f"import ctypes; ctypes.CDLL({jemalloc!r}, mode=ctypes.{mode})\n{PROBE}",
        PYTHONMALLOC="malloc",
        GLIBC_TUNABLES="glibc.rtld.optional_static_tls=65536",  # else it cannot be loaded so late
    )
    assert said.startswith("kernel |")
    assert ("does not come to it" if mode == "RTLD_GLOBAL" else "not jemalloc") in said


def test_setting_of_the_source(jemalloc: str) -> None:
    """`kernel` leaves it alone; `jemalloc` where there is none goes on with what works."""
    text = PROBE.replace("auto", "kernel")
    assert script(text, LD_PRELOAD=jemalloc, PYTHONMALLOC="malloc").startswith("kernel |")
    assert script(PROBE.replace("auto", "jemalloc")).startswith("kernel |")
    assert script(PROBE, LD_PRELOAD=jemalloc, PYTHONMALLOC="malloc").startswith("jemalloc |")


def test_environment_keeps_what_is_there(jemalloc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other preloads stay behind ours, and Arrow's pool is left where somebody has chosen it."""
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "mimalloc")
    assert nanny.environment() == {
        "LD_PRELOAD": f"{jemalloc}:/lib/other.so",
        "PYTHONMALLOC": "malloc",
        "ARROW_DEFAULT_MEMORY_POOL": "mimalloc",
    }
