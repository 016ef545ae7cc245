"""What a run was made of and what it left: the sha256 of every file, so that another can be compared with it.

Checkpoints and token sources keep the hashes of their own files (complete.json, manifest.json): of those the hash of
that list stands here. Hashes are kept between two readings, for `smol report --watch`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_smol.checkpoint.folder import COMPLETE, list_checkpoints
from megatron_smol.data.manifest import FOLDER_MANIFEST, PREFIX_MANIFEST
from megatron_smol.report.collect import RunRecord

_LEFT_OUT = {"checkpoints", "tensorboard"}


@dataclass(frozen=True)
class HashedFile:
    """name: as a person would look for it. note: what the hash covers beyond the file itself."""

    name: str
    bytes: int
    sha256: str
    note: str = ""


class Hashes:
    """sha256 of files, computed once as long as size and time of change stay."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], str] = {}

    def of(self, path: Path, name: str, note: str = "") -> HashedFile:
        found = path.stat()
        key = (str(path), found.st_size, found.st_mtime_ns)
        if key not in self._known:
            with path.open("rb") as file:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return HashedFile(name, found.st_size, self._known[key], note)


def files_of(run: RunRecord, hashes: Hashes) -> list[HashedFile]:
    """Files of the run folder, its checkpoints, and the sources that the recipe names and that are here."""
    found = []
    for path, name, note in _listed(run):
        with contextlib.suppress(FileNotFoundError):  # a run that trains removes old checkpoints meanwhile
            found.append(hashes.of(path, name, note))
    return found


def _listed(run: RunRecord) -> Iterator[tuple[Path, str, str]]:
    for path in _own_files(run.folder):
        yield path, str(path.relative_to(run.folder)), ""
    for checkpoint in list_checkpoints(run.folder / "checkpoints"):
        name = f"checkpoints/{checkpoint.path.name}/{COMPLETE}"
        yield checkpoint.path / COMPLETE, name, "lists the hashes of its files"
    for source, manifest in _manifests(run):
        yield manifest, f"source {source}: {manifest.name}", "lists the hashes of its shards"


def _own_files(folder: Path) -> Iterator[Path]:
    """Sorted; not what is half-written or for the moment, nor pages that `smol report` wrote."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        passing = any(part.startswith(".") for part in parts) or path.suffix in (".partial", ".lock")
        if path.is_file() and not passing and parts[0] not in _LEFT_OUT and path.suffix != ".html":
            yield path


def _manifests(run: RunRecord) -> Iterator[tuple[str, Path]]:
    recipe = yaml.safe_load(run.recipe_text) if run.recipe_text else {}
    for name, source in (recipe.get("sources") or {}).items():
        path = str(source.get("path"))
        for manifest in (Path(path) / FOLDER_MANIFEST, Path(f"{path}{PREFIX_MANIFEST}")):
            if manifest.is_file():
                yield name, manifest
