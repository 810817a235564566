"""What is rendered really runs: the plain cluster's pods as processes (``tests/containers.py``)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import urlopen

import pytest
from distributed import Client, Future

from tests.charts import Helm, of_kind, pods, settings
from tests.conftest import Metrics, page, wait_until
from tests.containers import (
    Container,
    Kubelet,
    RunningPod,
    build_wheel,
    isolation,
    make_image,
)
from tests.tasks import Gate

TASKS = 20
MIB = 2**20


class Deployed:
    """The rendered plain cluster, running: a scheduler's pod and one worker's."""

    def __init__(self, kubelet: Kubelet, rendered: list, said: str) -> None:
        self.kubelet = kubelet
        self.rendered = rendered
        self.installed = said
        self.scheduler_pod: RunningPod
        self.worker_pod: RunningPod
        self.scheduler: Container
        self.worker: Container
        self.client: Client

    def metrics(self) -> Metrics:
        """Return the scheduler's page."""
        return Metrics.read(self.scheduler_pod.port("http-dashboard"))

    def killed(self, prefix: str) -> dict[str, float]:
        """Return how often tasks of a prefix died, by cause."""
        name = "dask_scheduler_task_memory_killed_tasks_total"
        metrics = self.metrics()
        return {
            cause: count
            for cause in ("memory", "signal", "lost")
            if (count := metrics.total(name, task_prefix_name=prefix, cause=cause))
        }

    @contextmanager
    def task_that_waits(self, key: str) -> Iterator[Future]:
        """Run a task that is executing while the body of the block runs, and is let go after."""

        def wait(path: str) -> None:  # travels by value: containers have no tests
            import fcntl

            open(path + ".reached", "w").close()
            with open(path) as file:
                fcntl.flock(file, fcntl.LOCK_SH)

        # Only there may a container write.
        gate = Gate(self.worker_pod.volume("tmp") / key)
        future = self.client.submit(wait, gate.path, key=key)
        try:
            wait_until(lambda: gate.reached, what="the task to begin")
            port = self.scheduler_pod.port("http-dashboard")
            seen = f'"key": "{key}"'
            wait_until(lambda: seen in page(port, "/memusage/live"), what="its memory to be seen")
            yield future
        finally:
            future.release()
            gate.open()

    def process(self) -> str:
        """Return which process the worker is, or none; names and addresses stay the same."""

        def ask(dask_scheduler: Any) -> str:
            return "".join(one.server_id for one in dask_scheduler.workers.values())

        return self.client.run_on_scheduler(ask)

    def wait_for_the_next(self, known: str) -> None:
        """Wait for a worker that is another process than the known one."""
        wait_until(lambda: self.process() not in ("", known), 90, "the next worker")


@pytest.fixture(scope="module")
def deployed(
    component: Callable[[str], str], jemalloc: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """Installed by the rendered init containers into an environment like the official image's."""
    component("tini")
    directory = tmp_path_factory.mktemp("pods")
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    loopback = ["--host", "127.0.0.1"]
    rendered = Helm(component("helm4")).render(
        *settings(
            cluster__kind="plain",
            cluster__scheduler__extraArgs=loopback,
            cluster__worker__extraArgs=loopback,
            cluster__worker__threads=2,
            package__requirement=wheel.as_uri(),
            cluster__image__repository="registry.example.com/dask",
            config__jemalloc={"enabled": True, "library": jemalloc},
            config__dask={"distributed": {"comm": {"timeouts": {"connect": "20s"}}}},
        )
    )
    image = make_image(tmp_path_factory.mktemp("image"))
    kubelet = Kubelet(directory, image, rendered, alone=isolation())
    made = {one.metadata["labels"]["app.kubernetes.io/component"]: one for one in pods(rendered)}
    try:
        scheduler = kubelet.pod("scheduler-0", made["scheduler"], scheduler=True)
        worker = kubelet.pod("worker-0", made["worker"])
        said = scheduler.install().end(150)
        # It would be the same once more.
        assert scheduler.spec["initContainers"] == worker.spec["initContainers"]
        packages = (pod.volume("dask-memusage") for pod in (scheduler, worker))
        shutil.copytree(*packages, symlinks=True, dirs_exist_ok=True)
        one = Deployed(kubelet, rendered, said)
        one.scheduler_pod, one.worker_pod = scheduler, worker
        one.scheduler, one.worker = scheduler.start(), worker.start()
        address = f"tcp://127.0.0.1:{kubelet.services[8786]}"
        wait_until(lambda: "Scheduler at" in one.scheduler.log, 60, "the scheduler")
        with Client(address, timeout=30) as one.client:
            one.client.wait_for_workers(1, timeout=60)
            yield one
    finally:
        kubelet.close()


def test_only_what_the_image_lacks_is_installed(deployed: Deployed) -> None:
    """The package and what it needs comes beside the image's Dask, and no second Dask before it."""
    (line,) = re.findall("^Successfully installed (.*)$", deployed.installed, re.MULTILINE)
    names = {word.rpartition("-")[0] for word in line.split()}
    assert {"dask-memusage-exporter", "prometheus-client", "opentelemetry-sdk"} <= names
    assert not names & {"dask", "distributed", "numpy", "psutil", "click"}


def test_a_job_is_measured_on_both_pages(deployed: Deployed) -> None:
    """Each task once, its growth its own by jemalloc, whose environment came by the ConfigMap."""
    keys = [f"job-{i}" for i in range(TASKS)]
    futures = deployed.client.map(bytearray, [30 * MIB] * TASKS, key=keys)
    deployed.client.submit(len, futures).result()
    name = "dask_scheduler_task_memory_tasks_total"

    def counted() -> bool:
        total = deployed.metrics().total(name, task_prefix_name="job", scope="thread")
        return total == TASKS

    wait_until(counted, what="all tasks on the page")
    metrics = deployed.metrics()
    assert metrics.total("dask_scheduler_task_memory_workers", source="jemalloc") == 1
    mean = metrics.total("dask_scheduler_task_memory_growth_bytes_sum", task_prefix_name="job")
    assert 30 * MIB <= mean / TASKS < 38 * MIB
    limit = metrics.get_value("dask_scheduler_task_memory_worker_limit_bytes")
    assert limit == 4 * 2**30
    own = Metrics.read(deployed.worker_pod.port("http-dashboard"))
    # Totals alone, which is what the scheduler's page leaves for the worker's.
    assert own.total("dask_worker_task_memory_tasks_total") >= TASKS
    assert own.total("dask_worker_task_memory_tasks_total", task_prefix_name="job") == 0


@pytest.mark.parametrize("role", ["scheduler", "worker"])
def test_probes_are_answered(role: str, deployed: Deployed) -> None:
    """Every rendered probe's path and port has a server that says it is well."""
    pod = deployed.scheduler_pod if role == "scheduler" else deployed.worker_pod
    probes = [pod.container[name] for name in pod.container if name.endswith("Probe")]
    assert probes
    for probe in probes:
        url = f"http://127.0.0.1:{pod.port(probe['httpGet']['port'])}{probe['httpGet']['path']}"
        with urlopen(url, timeout=10) as answer:
            assert answer.status == 200


def test_the_charts_own_test_passes(deployed: Deployed) -> None:
    """The pod of `helm test` runs a job, and sees on the scheduler's page that it was measured."""
    (pod,) = pods(of_kind(deployed.rendered, "Pod"))
    said = deployed.kubelet.pod("test", pod).start().end(90)
    assert 'task_prefix_name="helm-test"' in said


def test_the_charts_own_test_begins_where_there_are_no_workers(deployed: Deployed) -> None:
    """Scaled to none: its task is what the operator asks the scheduler for, and starts one for."""
    (pod,) = pods(of_kind(deployed.rendered, "Pod"))
    deployed.worker.terminate()
    deployed.worker.wait(30)
    waiting = deployed.kubelet.pod("test-of-none", pod).start()

    def wanted(dask_scheduler: Any) -> int:
        return dask_scheduler.adaptive_target()

    wait_until(lambda: deployed.client.run_on_scheduler(wanted) == 1, 60, "a worker to be wanted")
    deployed.worker = deployed.worker_pod.start()
    assert 'task_prefix_name="helm-test"' in waiting.end(90)


def test_a_worker_without_the_package_works_and_is_counted(deployed: Deployed) -> None:
    """A pod whose init container has installed nothing: its tasks run, the page says missing."""
    (made,) = (one for one in pods(deployed.rendered) if one.where.endswith("-worker"))
    bare = deployed.kubelet.pod("bare", made).start()

    def missing() -> float:
        return deployed.metrics().total("dask_scheduler_task_memory_workers", source="missing")

    wait_until(lambda: missing() == 1, timeout=60, what="the worker to join")
    future = deployed.client.submit(abs, -1, workers="bare", key="bare-1")
    assert future.result() == 1
    bare.terminate()
    bare.wait(30)
    wait_until(lambda: missing() == 0, what="the worker to leave")


def test_a_scheduler_without_the_package_says_what_is_missing(deployed: Deployed) -> None:
    """It ends at once and names the module, rather than measure nothing in silence."""
    (made,) = (one for one in pods(deployed.rendered) if one.where.endswith("-scheduler"))
    bare = deployed.kubelet.pod("bare-scheduler", made).start()
    assert bare.wait(60) != 0
    assert "ModuleNotFoundError: No module named 'dask_memusage_exporter'" in bare.log


def test_a_worker_that_is_killed_is_named(deployed: Deployed) -> None:
    """kill -9 of the worker's process: its nanny tells which task ran, and starts another."""
    known = deployed.process()
    with deployed.task_that_waits("victim-1"):
        # Not one of multiprocessing's own.
        (process,) = (
            one
            for one in deployed.worker.main().children(recursive=True)
            if "spawn_main" in " ".join(one.cmdline())
        )
        process.kill()
        wait_until(lambda: deployed.killed("victim") == {"signal": 1}, what="the kill")
    assert "'victim-1'" in deployed.scheduler.log
    deployed.wait_for_the_next(known)
    (state,) = deployed.client.scheduler_info()["workers"].values()
    assert state["name"] == "worker-0"


def test_a_container_that_is_killed_for_memory_tells_its_story(deployed: Deployed) -> None:
    """Nanny and worker killed at once, as the kernel does: the pod's next container tells."""
    known = deployed.process()
    with deployed.task_that_waits("outage-1"):
        deployed.worker.kill()
        deployed.worker = deployed.worker_pod.start()
        wait_until(lambda: deployed.killed("outage") == {"lost": 1}, 90, "the kill")
    (line,) = (one for one in deployed.scheduler.log.splitlines() if "'outage-1'" in one)
    assert "last seen peak of the process" in line
    deployed.wait_for_the_next(known)


def test_a_pod_that_is_deleted_ends_in_order(deployed: Deployed) -> None:
    """SIGTERM: what is counted arrives, nobody is blamed, well within the grace period."""
    name = "dask_scheduler_task_memory_tasks_total"
    grace = deployed.worker_pod.spec["terminationGracePeriodSeconds"]
    keys = [f"last-{i}" for i in range(TASKS)]
    deployed.client.gather(deployed.client.map(abs, range(TASKS), key=keys))
    deployed.worker.terminate()
    deployed.worker.wait(grace)
    assert deployed.metrics().total(name, task_prefix_name="last") == TASKS
    assert deployed.killed("last") == {}
    dropped = deployed.metrics().total("dask_scheduler_task_memory_dropped_records_total")
    assert dropped == 0
    deployed.client.close()
    deployed.scheduler.terminate()
    deployed.scheduler.wait(deployed.scheduler_pod.spec["terminationGracePeriodSeconds"])
    for container in (deployed.worker, deployed.scheduler):
        assert "Read-only file system" not in container.log
        assert "Traceback" not in container.log
