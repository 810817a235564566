"""jemalloc as machines have it: libraries that will not do, and workers that need no restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dask_memusage_exporter import install, nanny
from tests.conftest import Measured, local_cluster, measured, run_cli, wait_until
from tests.servers import Servers

#: What stands in for libraries that no machine has all of, in C.
STUBS = {
    # 5.2 has no thread.peak.
    "old": """
        int mallctl(void) { return 2; }
        int mallctlnametomib(const char *name, unsigned long *mib, unsigned long *length) {
            const char *known = "version";
            while (*known && *known == *name) known++, name++;
            return *known == *name ? 0 : 2;
        }
        int mallctlbymib(unsigned long *mib, unsigned long length, const char **into) {
            *into = "5.2.1-0-gea6b3e9";
            return 0;
        }
    """,
    "prefixed": "int je_mallctl(void) { return 2; }",
    # As one that is built for another page size, see jemalloc's src/pages.c.
    "aborts": """
        #include <stdlib.h>
        #include <unistd.h>
        __attribute__((constructor)) static void begin(void) {
            write(2, "<jemalloc>: Unsupported system page size\\n", 41);
            abort();
        }
    """,
}


@pytest.fixture
def library(component: Callable[[str], str], jemalloc: str, tmp_path: Path) -> Callable[[str], str]:
    """Return what makes a library that will not do, by its name; it returns the path."""

    def make(name: str, path: Path = tmp_path / "libjemalloc.so.2") -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "text":
            path.write_text("not a library\n" * 100)
        elif name == "32 bits":  # by its header's class
            there = Path(jemalloc).read_bytes()
            path.write_bytes(there[:4] + b"\1" + there[5:])
        elif name == "libm":
            path.symlink_to(_mapped("libm.so.6"))
        elif name != "missing":
            source = tmp_path / f"{name}.c"
            source.write_text(STUBS[name])
            subprocess.run(
                [component("cc"), "-shared", "-fPIC", "-w", "-o", str(path), str(source)],
                check=True,
            )
        return str(path)

    return make


def _mapped(name: str) -> str:
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if name in line)


REASONS = {
    "old": "jemalloc 5.2.1 has no thread.peak; take 5.3 or newer",
    "prefixed": "under the prefix je_",
    "aborts": "dies: Aborted (<jemalloc>: Unsupported system page size)",
    "text": "cannot be preloaded (invalid ELF header): ignored",
    "32 bits": "cannot be preloaded (wrong ELF class: ELFCLASS32): ignored",
    "libm": "which is loaded and is no jemalloc",
    "missing": "there is no such file; install it",
}


# -- the file ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Measured]:
    """One worker with its nanny in this process."""
    with measured() as cluster:
        yield cluster


@pytest.mark.parametrize("name", REASONS)
def test_a_library_that_will_not_do(
    name: str, cluster: Measured, library: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker is left alone and comes up as ever; the reason and the file are in the log."""
    (before,) = cluster.client.run(os.getpid).values()
    path = library(name)
    install(cluster.client, jemalloc=path)
    (line,) = (one for one in caplog.messages if "jemalloc is not turned on" in one)
    assert path in line
    assert REASONS[name] in line
    assert list(cluster.client.run(os.getpid).values()) == [before]
    cluster.client.restart()
    ((pid, source),) = cluster.client.run(_how).values()
    assert (pid != before, source) == (True, "kernel")


def test_variables_that_came_too_late(
    cluster: Measured, jemalloc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the nanny's own process has by now is not what its worker was started with."""
    monkeypatch.setenv("LD_PRELOAD", jemalloc)
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    install(cluster.client, jemalloc=True)
    cluster.client.wait_for_workers(1)
    assert [source for _, source in cluster.client.run(_how).values()] == ["jemalloc"]


def test_a_library_that_is_mended(
    cluster: Measured, library: Callable[[str], str], jemalloc: str
) -> None:
    """It is tried again when it is asked for again."""
    path = library("text")
    install(cluster.client, jemalloc=path)
    Path(path).unlink()
    Path(path).symlink_to(jemalloc)
    install(cluster.client, jemalloc=path)
    cluster.client.wait_for_workers(1)
    assert [source for _, source in cluster.client.run(_how).values()] == ["jemalloc"]


def _how(dask_worker: Any) -> tuple[int, str]:
    return os.getpid(), dask_worker.metrics["memusage"](dask_worker)["source"]


def test_the_next_place_is_looked_at(
    library: Callable[..., str], jemalloc: str, tmp_path: Path
) -> None:
    """An old one in conda's place does not hide the system's."""
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    library("old", tmp_path / "env/lib/libjemalloc.so.2")
    done = subprocess.run(
        [str(tmp_path / "env/bin/python"), "-m", "dask", "memusage", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["machine"]["variables"]["LD_PRELOAD"] == jemalloc


def test_the_next_file_is_looked_at(
    library: Callable[..., str], jemalloc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another architecture comes first by its name; where none works the nearest is told."""
    monkeypatch.setattr(nanny, "_PLACES", (f"{tmp_path}/*-linux-*/libjemalloc.so.2",))
    library("32 bits", tmp_path / "i386-linux-gnu/libjemalloc.so.2")
    library("old", tmp_path / "x86_64-linux-gnu/libjemalloc.so.2")
    with pytest.raises(nanny.JemallocError, match=r"x86_64-linux-gnu.*5\.2\.1 has no thread\.peak"):
        nanny.find()
    good = tmp_path / "x86_64-linux-gnux32/libjemalloc.so.2"
    good.parent.mkdir()
    good.symlink_to(jemalloc)
    assert nanny.find() == str(good)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("text", "which the loader has ignored"),
        ("missing", "which the loader has ignored"),
        ("libm", "which is loaded and is no jemalloc"),
        ("old", "jemalloc 5.2.1 has no thread.peak"),
        ("prefixed", "under the prefix je_"),
    ],
)
def test_a_process_that_was_started_with_it(
    name: str, says: str, library: Callable[[str], str]
) -> None:
    """It measures by the kernel, and tells what LD_PRELOAD has and what came of it."""
    path = library(name)
    done = run_cli(
        *("memusage", "doctor", "--json"),
        env={**os.environ, "LD_PRELOAD": path, "PYTHONMALLOC": "malloc"},
    )
    found = json.loads(done.stdout)
    assert found["machine"]["source"] == "kernel"
    assert says in found["machine"]["why"]
    assert (f"LD_PRELOAD has {path}" in found["machine"]["why"]) == ("which" in says)
    (told,) = (one for one in found["advice"] if "jemalloc is not used" in one["text"])
    assert says in told["text"]
    assert done.returncode == 1


# -- what the worker's process had before ------------------------------------------------


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A scheduler whose workers come with settings of their own."""
    servers = Servers(tmp_path_factory.mktemp("servers"))
    servers.scheduler()
    yield servers
    servers.close()


def _join(servers: Servers, name: str, *arguments: str, **options: Any) -> int:
    """Start a worker and return its process's id."""
    servers.worker("--name", name, *arguments, **options)
    return wait_until(lambda: _of(servers, name, os.getpid), what=name)


def _of(servers: Servers, name: str, function: Callable[..., Any]) -> Any:
    """Return what a function returns on the worker of a name; None where there is none yet."""
    where = servers.addresses().get(name)
    return where and servers.client.run(function, workers=[where], on_error="ignore").get(where)


def test_what_workers_had_before(servers: Servers, jemalloc: str, tmp_path: Path) -> None:
    """Who runs on jemalloc keeps what it holds; who has preloads of its own keeps those."""
    theirs = str(tmp_path / "libtheirs.so")
    Path(theirs).symlink_to(_mapped("libm.so.6"))
    own = {"LD_PRELOAD": theirs, "ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}
    (tmp_path / "theirs.yaml").write_text(
        yaml.safe_dump({"distributed": {"nanny": {"pre-spawn-environ": own}}})
    )
    started_with = {"LD_PRELOAD": jemalloc, "PYTHONMALLOC": "malloc"}
    already = _join(servers, "already", env=started_with)
    before = _join(servers, "theirs", env={"DASK_CONFIG": str(tmp_path)})
    install(servers.client, jemalloc=True)
    assert _of(servers, "already", _how) == (already, "jemalloc")
    pid, source = wait_until(lambda: _of(servers, "theirs", _how), what="a restart")
    assert (pid != before, source) == (True, "jemalloc")
    environment, loaded = _of(servers, "theirs", _started_with)
    assert environment["LD_PRELOAD"] == f"{jemalloc}:{theirs}"
    assert environment["ARROW_DEFAULT_MEMORY_POOL"] == "mimalloc"
    assert environment["PYTHONMALLOC"] == "malloc"
    assert {os.path.realpath(jemalloc), os.path.realpath(theirs)} <= loaded
    # And once is enough.
    install(servers.client, jemalloc=True)
    assert _of(servers, "theirs", os.getpid) == pid


def _started_with() -> tuple[dict[str, str], set[str]]:
    with open("/proc/self/maps") as maps:
        return dict(os.environ), {line.split()[-1] for line in maps if ".so" in line}


def test_a_worker_on_an_old_one(servers: Servers, library: Callable[[str], str]) -> None:
    """It comes up and is measured by the kernel."""
    variables = {"LD_PRELOAD": library("old"), "PYTHONMALLOC": "malloc"}
    pid = _join(servers, "old", "--no-nanny", env=variables)
    install(servers.client)
    assert _of(servers, "old", _how) == (pid, "kernel")


def test_workers_without_a_nanny(caplog: pytest.LogCaptureFixture) -> None:
    """One line of the scheduler's names them, and no more when it is asked again."""

    def said() -> list[str]:
        return [one for one in caplog.messages if "workers without a nanny" in one]

    with local_cluster(processes=False, n_workers=2) as cluster:
        install(cluster, jemalloc=True)
        (line,) = wait_until(said, what="the warning")
        for address in cluster.scheduler.workers:
            assert address in line
        install(cluster, jemalloc=True)
        cluster.scale(3)
        cluster.wait_for_workers(3)
    assert said() == [line]
