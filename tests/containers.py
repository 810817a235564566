"""Rendered pods as processes of this machine: what a kubelet makes of them, as far as it goes.

Commands, arguments, environment and files are the rendered ones. Each volume is a directory, and
paths that are mounted are rewritten to it; ports are free ones on the loopback address, which names
of Services stand for too. Where the machine lets us, each container has a mount and a PID namespace
of its own: its first process is PID 1, and all but the pod's volumes read-only, as in Kubernetes.
The container's user and its limits are not there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from dask.utils import parse_bytes

from tests.charts import Pod, Resource
from tests.conftest import wait_until
from tests.servers import free_port

#: What the official image has not, of what is installed beside the tests.
_NOT_IN_THE_IMAGE = re.compile(r"_*(editable_+)?(dask_memusage|prometheus_client|opentelemetry)")

#: What the package is built from, here and in deploy/Dockerfile.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dask_memusage_exporter")

#: As pip writes it.
_DASK = """
import sys
from dask.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""

#: All but the volumes read-only, in namespaces of its own; PID 1 is what comes after.
_ISOLATED = (
    'volumes=$1; shift; mount --make-rprivate / && mount --bind "$volumes" "$volumes" && '
    'for other in / /tmp /var /home /root; do mountpoint -q "$other" && '
    'mount -o remount,bind,ro "$other"; done; '
    'for map in "$volumes"/config; do test ! -d "$map" || '
    '{ mount --bind "$map" "$map" && mount -o remount,bind,ro "$map"; }; done; exec "$@"'
)
_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


def isolation() -> bool:
    """Return whether this machine gives us namespaces."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False)
    return done.returncode == 0


def make_image(directory: Path) -> Path:
    """Make an environment as the official image has it: Dask, pip, and nothing of ours.

    Returns where its programs are.
    """
    venv.create(directory, symlinks=True)
    here = Path(sysconfig.get_path("purelib"))
    there = next((directory / "lib").glob("python*/site-packages"))
    for one in here.iterdir():
        if not _NOT_IN_THE_IMAGE.match(one.name) and one.suffix != ".pth":
            (there / one.name).symlink_to(one)
    program = directory / "bin" / "dask"
    program.write_text(f"#!{directory}/bin/python\n{_DASK}")
    program.chmod(0o755)
    return directory / "bin"


class Container:
    """One container of a pod, running."""

    def __init__(
        self, command: list[str], env: Mapping[str, str], volumes: Path, log: Path, *, alone: bool
    ) -> None:
        self._log = log
        if alone:
            command = [*_NAMESPACES, "sh", "-c", _ISOLATED, "isolated", str(volumes), *command]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, env=dict(env), cwd=volumes, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text()

    def wait(self, timeout: float) -> int:
        """Wait for its end and return its exit status."""
        return self.process.wait(timeout)

    def end(self, timeout: float) -> str:
        """Wait for its good end, and return what it has said."""
        assert self.wait(timeout) == 0, self.log
        return self.log

    def main(self) -> psutil.Process:
        """Return its first process."""
        process = psutil.Process(self.process.pid)
        while process.name() in ("unshare", "sh"):
            (process,) = wait_until(process.children, what="the container's first process")
        return process

    def terminate(self) -> None:
        """Do as a kubelet that deletes the pod: SIGTERM to the first process."""
        self.main().send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all of it at once, as the kernel does for memory (``memory.oom.group``)."""
        with suppress(psutil.NoSuchProcess):
            everything = psutil.Process(self.process.pid).children(recursive=True)
            for one in (*everything, self.process):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait(30)


class Kubelet:
    """Runs rendered pods.

    Parameters
    ----------
    image
        Where the image's programs are.
    resources
        What is rendered: ConfigMaps to mount.
    alone
        Whether containers have namespaces of their own.
    """

    def __init__(
        self, directory: Path, image: Path, resources: list[Resource], *, alone: bool
    ) -> None:
        self._directory = directory
        self._image = image
        self._maps = {
            one["metadata"]["name"]: one["data"] for one in resources if one["kind"] == "ConfigMap"
        }
        self.alone = alone
        self._running: list[Container] = []
        #: Services' ports are of the whole cluster.
        self.services = {8786: free_port(), 8787: free_port()}

    def pod(self, name: str, pod: Pod, *, scheduler: bool = False) -> RunningPod:
        """Make a pod's volumes and ports; nothing runs yet."""
        return RunningPod(self, self._directory / name, name, pod, scheduler=scheduler)

    def start(self, command: list[str], env: dict[str, str], volumes: Path, log: Path) -> Container:
        """Start a process as a container's first."""
        path = f"{self._image}{os.pathsep}{os.environ['PATH']}"
        index = {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
        container = Container(
            command, {"PATH": path, **index, **env}, volumes, log, alone=self.alone
        )
        self._running.append(container)
        return container

    def data(self, name: str) -> dict[str, str]:
        """Return what a ConfigMap has."""
        return self._maps[name]

    def close(self) -> None:
        """End all that runs, the latest first."""
        for one in reversed(self._running):
            one.kill()


class RunningPod:
    """A pod: its volumes outlive its containers."""

    def __init__(
        self, kubelet: Kubelet, directory: Path, name: str, pod: Pod, *, scheduler: bool
    ) -> None:
        self._kubelet = kubelet
        self._directory = directory
        self.name = name
        self.spec = pod.spec
        directory.mkdir()
        (self.container,) = pod.spec["containers"]
        numbers = [port["containerPort"] for port in self.container.get("ports", ())]
        self.ports = {number: free_port() for number in numbers}
        if scheduler:
            self.ports = dict(kubelet.services)
        self._volumes = {one["name"]: self._make(one) for one in pod.spec["volumes"]}

    def _make(self, volume: dict[str, Any]) -> Path:
        path = self._directory / volume["name"]
        path.mkdir()
        if "configMap" in volume:
            for name, text in self._kubelet.data(volume["configMap"]["name"]).items():
                (path / name).write_text(self._here(text, self.container))
        else:
            assert "emptyDir" in volume
        return path

    def port(self, name: str) -> int:
        """Return the port of this machine that a named port of the pod is."""
        (number,) = (one["containerPort"] for one in self.container["ports"] if one["name"] == name)
        return self.ports[number]

    def volume(self, name: str) -> Path:
        """Return where a volume is on this machine."""
        return self._volumes[name]

    def install(self) -> Container:
        """Start the init container."""
        (container,) = self.spec["initContainers"]
        return self._start(container)

    def start(self) -> Container:
        """Start the container."""
        return self._start(self.container)

    def _start(self, container: dict[str, Any]) -> Container:
        env = {
            one["name"]: self._here(self._value(one), container) for one in container.get("env", ())
        }
        words = [*container["command"], *container.get("args", ())]
        words = [
            self._here(re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], word), container)
            for word in words
        ]
        log = self._directory / f"{container['name']}.log"
        return self._kubelet.start(words, env, self._directory, log)

    def _value(self, one: dict[str, Any]) -> str:
        if "value" in one:
            return one["value"]
        if "fieldRef" in one["valueFrom"]:
            assert one["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
            return self.name
        asked = one["valueFrom"]["resourceFieldRef"]
        (container,) = (c for c in self.spec["containers"] if c["name"] == asked["containerName"])
        return str(parse_bytes(container["resources"]["limits"][asked["resource"].split(".")[1]]))

    def _here(self, text: str, container: dict[str, Any]) -> str:
        """Return a text with paths, ports and names of the pod's as they are on this machine."""
        mounted = {
            one["mountPath"]: str(self._directory / one["name"])
            for one in container["volumeMounts"]
        }
        paths = "|".join(map(re.escape, mounted))
        text = re.sub(rf"(?<![\w/])({paths})(?![\w-])", lambda found: mounted[found[1]], text)
        text = re.sub(r"[\w.-]+-scheduler\.\w+\.svc:(\d+)", self._service, text)
        # As arguments stand: a port alone, or of all addresses.
        found = re.fullmatch(r"(:?)(\d+)", text)
        if found and int(found[2]) in self.ports:
            address = "127.0.0.1:" if found[1] else ""
            return f"{address}{self.ports[int(found[2])]}"
        return text

    def _service(self, found: re.Match[str]) -> str:
        return f"127.0.0.1:{self._kubelet.services[int(found[1])]}"


def build_wheel(directory: Path) -> Path:
    """Build the package as it would be on an index."""
    root = Path(__file__).parent.parent
    source = directory / "source"
    source.mkdir()
    for name in SOURCES:  # a build writes beside them
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name)
        else:
            shutil.copy(root / name, source)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--disable-pip-version-check", "--wheel-dir", str(directory), str(source)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = directory.glob("*.whl")
    return wheel
