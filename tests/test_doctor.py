"""``dask memusage doctor``: as a process, beside real clusters."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import LocalCluster

from dask_memusage_exporter import install, nanny
from dask_memusage_exporter.cli import examination, probe
from dask_memusage_exporter.cli.advice import of_cluster
from dask_memusage_exporter.cli.command import InputError
from tests.conftest import page, run_cli, wait_until
from tests.servers import Servers, free_port


def doctor(*arguments: str, code: int = 0, **environment: str) -> Any:
    """Run the doctor; return its document."""
    done = run_cli("memusage", "doctor", "--json", *arguments, env={**os.environ, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def advice(document: Any) -> str:
    return "\n".join(one["text"] for one in document["advice"])


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path)
    yield servers
    servers.close()


def test_this_machine(jemalloc: str) -> None:
    """The source, why, and the lines that turn jemalloc on, which work as they stand."""
    variables = nanny.environment(jemalloc)
    found = doctor()
    assert found["machine"]["source"] == "kernel"
    assert found["machine"]["variables"] == variables
    assert found["advice"] == []
    on_it = run_cli("memusage", "doctor", env={**os.environ, **variables}).stdout
    assert "source    jemalloc: each thread's own peak" in on_it
    assert "can be turned on" not in on_it
    assert "Nothing to mend." in on_it
    text = run_cli("memusage", "doctor").stdout
    for name, value in variables.items():
        assert f"export {name}={value}" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON__LD_PRELOAD": "/x/libjemalloc.so.2"},
            "pre-spawn-environ.ld_preload does nothing",
        ),
        ({"DASK_MEMUSAGE__SOURCE": "magic"}, "memusage.source: 'magic'"),
        ({"DASK_MEMUSAGE__JEMALOC": "true"}, "did you mean memusage.jemalloc?"),
        (
            {"DASK_MEMUSAGE__JEMALLOC": "/no/such/libjemalloc.so.2"},
            "memusage.jemalloc, or mend this: jemalloc cannot be turned on here: /no/such/",
        ),
    ],
)
def test_wrong_settings(environment: dict[str, str], says: str) -> None:
    """Each is named with its mend, and the status says that something is wrong."""
    assert says in advice(doctor(code=1, **environment))


def test_settings_of_this_machine() -> None:
    """It measures as its own settings say, and not as it might."""
    assert doctor(DASK_MEMUSAGE__KERNEL_RESET="false", DASK_MEMUSAGE__SOURCE="kernel")["machine"][
        "why"
    ].startswith("memusage.kernel-reset is off")


def test_jemalloc_in_vain(jemalloc: str) -> None:
    """Where this process was started with it and does not use it, it says why: by what was chosen.

    Not where a setting has chosen so.
    """
    variables = {"LD_PRELOAD": jemalloc, "PYTHONMALLOC": "pymalloc"}
    said = advice(doctor(code=1, **variables))
    assert f"was started with LD_PRELOAD={jemalloc}, and jemalloc is not used" in said
    assert "set PYTHONMALLOC=malloc beside LD_PRELOAD" in said
    assert doctor(**variables, DASK_MEMUSAGE__SOURCE="kernel")["advice"] == []


def test_a_cluster_that_is_measured(make_cluster: Callable[..., LocalCluster]) -> None:
    """Every worker with its source, and why threads want jemalloc."""
    cluster = make_cluster(n_workers=2, threads_per_worker=2)
    install(cluster)
    found = doctor("--scheduler", cluster.scheduler_address)
    assert found["cluster"]["address"] == cluster.scheduler_address
    assert found["cluster"]["sources"] == {"kernel": 2}
    assert found["cluster"]["scheduler"]["metrics_port"] == cluster.scheduler.http_server.port
    said = advice(found)
    (one,) = found["advice"]  # told once, for both
    assert one["workers"] == sorted(cluster.scheduler.workers)
    assert "2 threads, and tasks that overlap" in said
    assert "malloc is not jemalloc" in said
    assert "install(client, jemalloc=True)" in said
    text = run_cli("memusage", "doctor", "--scheduler", cluster.scheduler_address).stdout
    assert (
        "  kernel on all 2 workers: exact: the kernel's high-water mark can be reset; tasks" in text
    )
    assert "\n- all 2 workers: 2 threads, and tasks" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.usefixtures("jemalloc")
def test_a_cluster_on_jemalloc(make_cluster: Callable[..., LocalCluster]) -> None:
    """There is nothing to mend."""
    cluster = make_cluster(n_workers=0, threads_per_worker=2)
    install(cluster, jemalloc=True)
    cluster.scale(1)
    cluster.wait_for_workers(1)
    found = doctor("--scheduler", cluster.scheduler_address)
    assert found["cluster"]["sources"] == {"jemalloc": 1}
    assert found["advice"] == []


def test_a_cluster_that_is_not_measured(make_cluster: Callable[..., LocalCluster]) -> None:
    """It says how to begin, and not that the scheduler's page has anything."""
    address = make_cluster().scheduler_address
    found = doctor("--scheduler", address, code=1)
    assert found["cluster"]["sources"] == {"missing": 1}
    assert "call dask_memusage_exporter.install(client)" in advice(found)
    text = run_cli("memusage", "doctor", "--scheduler", address).stdout
    assert "Cluster " in text
    assert "The scheduler's own /metrics" not in text


def test_a_worker_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, make_cluster: Callable[..., LocalCluster]
) -> None:
    """One that is stopped, or whose task holds the GIL, is shown by its last heartbeat, in time."""
    monkeypatch.setattr(examination, "ANSWER_TIMEOUT", 2)
    cluster = make_cluster(n_workers=2)
    install(cluster)
    states = cluster.scheduler.workers
    wait_until(lambda: all("memusage" in state.metrics for state in states.values()))
    stopped, other = states
    pid = states[stopped].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        found = examination.ask(cluster.scheduler_address)
    finally:
        os.kill(pid, signal.SIGCONT)
    silent, lively = found.workers[stopped], found.workers[other]
    assert not silent["answered"]
    assert lively["answered"]
    assert lively["why"].startswith("exact: ")
    for known in ("source", "package", "threads", "nanny"):
        assert silent[known] == lively[known]
    assert silent["metrics_port"] == states[stopped].services["dashboard"]
    (one,) = of_cluster(found)
    assert one.text.startswith("no answer: ")
    assert one.workers == (stopped,)
    assert not one.wrong


def test_a_copy_of_the_package_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures, though nothing is installed by its name: it is not told to be."""
    monkeypatch.setattr("importlib.metadata.version", _is_not_there)
    worker: Any = SimpleNamespace(
        metrics={"memusage": lambda _: {"source": "kernel", "version": "0+unknown"}}, extensions={}
    )
    assert probe.worker(worker)["package"] == "0+unknown"
    assert probe.worker(SimpleNamespace(metrics={}, extensions={}))["package"] is None


def _is_not_there(name: str) -> str:
    raise PackageNotFoundError(name)


def test_a_preload_that_is_hidden(servers: Servers) -> None:
    """A --preload of a platform's hides the one that is configured: named, with the mend."""
    (servers.directory / "platform_preload.py").write_text("def dask_setup(server):\n    pass\n")
    servers.scheduler(
        *("--preload", "platform_preload"),
        env={
            "DASK_DISTRIBUTED__SCHEDULER__PRELOAD": '["dask_memusage_exporter"]',
            "PYTHONPATH": str(servers.directory),
        },
    )
    found = doctor("--scheduler", servers.identity()["address"], code=1)
    assert "hides what is configured: name both" in advice(found)


def test_workers_that_nobody_scrapes(servers: Servers) -> None:
    """Three workers want one port: who reads only that one is told of the other two."""
    servers.scheduler("--preload", "dask_memusage_exporter")
    port = free_port()
    servers.worker("--nworkers", "3", "--dashboard-address", f"127.0.0.1:{port}")
    servers.client.wait_for_workers(3)
    address = servers.identity()["address"]
    assert doctor("--scheduler", address)["advice"] == []  # the scheduler's page is enough
    page(port)
    found = doctor("--scheduler", address)
    said = advice(found)
    assert "/metrics of 2 of 3 workers so far" in said
    for one, worker in found["cluster"]["workers"].items():
        assert (worker["scraped"] is not None) == (worker["metrics_port"] == port)
        assert (f"{one} (port {worker['metrics_port']})" in said) == (worker["scraped"] is None)


def test_workers_that_wanted_jemalloc(servers: Servers, jemalloc: str, tmp_path: Path) -> None:
    """Each with its own reason: what its nanny said, its configuration, what it was started with.

    One thread that wanted nothing is left in peace.
    """
    bad = str(tmp_path / "libjemalloc.so.2")
    Path(bad).write_text("no library\n" * 100)
    servers.scheduler("--preload", "dask_memusage_exporter")
    starts: dict[str, tuple[list[str], dict[str, str]]] = {
        "refused": ([], {}),
        "lower": (
            ["--no-nanny"],
            {"DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON__LD_PRELOAD": jemalloc},
        ),
        "pymalloc": (["--no-nanny"], {"LD_PRELOAD": jemalloc, "PYTHONMALLOC": "pymalloc"}),
        "ignored": (["--no-nanny"], {"LD_PRELOAD": bad, "PYTHONMALLOC": "malloc"}),
        "plain": (["--no-nanny"], {}),
        "good": (["--no-nanny"], {"LD_PRELOAD": jemalloc, "PYTHONMALLOC": "malloc"}),
    }
    for name, (arguments, environment) in starts.items():
        servers.worker("--name", name, *arguments, env=environment)
    servers.client.wait_for_workers(len(starts))
    address = servers.identity()["address"]
    addresses = servers.addresses()
    # Before it is asked for nobody advises a worker of one thread to turn it on.
    assert "jemalloc=True" not in advice(doctor("--scheduler", address, code=1))
    install(servers.client, jemalloc=bad)
    found = doctor("--scheduler", address, code=1)
    lines = {
        name: [one["text"] for one in found["advice"] if where in one["workers"]]
        for name, where in addresses.items()
    }
    (refused,) = lines["refused"]
    assert f"the nanny could not turn jemalloc on: object '{bad}' from LD_PRELOAD" in refused
    (lower,) = lines["lower"]
    assert "pre-spawn-environ.ld_preload does nothing" in lower
    (pymalloc,) = lines["pymalloc"]
    assert "set PYTHONMALLOC=malloc beside LD_PRELOAD" in pymalloc
    (ignored,) = lines["ignored"]
    assert f"LD_PRELOAD has {bad}, which the loader has ignored" in ignored
    assert lines["plain"] == lines["good"] == []

    # The scheduler names whom it could not do anything for, and not who needs nothing.
    (line,) = wait_until(lambda: servers.lines("without a nanny"), what="the warning")
    for name, where in addresses.items():
        assert (where in line) == (name in ("lower", "pymalloc", "ignored", "plain"))
    # And the text has a line for each reason.
    text = " ".join(run_cli("memusage", "doctor", "--scheduler", address).stdout.split())
    same = ", ".join(sorted(addresses[name] for name in ("refused", "lower", "plain")))
    assert f"kernel on {same}: exact" in text
    assert f"jemalloc on {addresses['good']}: each thread's own peak" in text


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "tls://127.0.0.1:9", "http://127.0.0.1:9", "nowhere"]
)
def test_no_scheduler_there(address: str) -> None:
    """Or no address of one: one line, exit status 2."""
    done = run_cli("memusage", "doctor", "--scheduler", address)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"--scheduler: '{address}' cannot be reached" in line
    assert "give the address that the scheduler has logged" in line


def test_a_port_that_is_no_schedulers(
    monkeypatch: pytest.MonkeyPatch, make_cluster: Callable[..., LocalCluster]
) -> None:
    """That of the dashboard, say, which takes a connection and waits: it is told so, in time."""
    monkeypatch.setattr(examination, "CONNECT_TIMEOUT", 0.5)
    port = make_cluster(n_workers=0).scheduler.http_server.port
    with pytest.raises(InputError, match="what answers there is no scheduler"):
        examination.ask(f"tcp://127.0.0.1:{port}")
