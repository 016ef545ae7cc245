"""Which files preprocessing reads: local paths, URLs that fsspec opens, or the files of a hub data set.

data/corpus.py cuts them into blocks. A URL (s3://, gs://, https://, hf://) is read in place by ranges, nothing
is downloaded aside. A hub data set is its data files at one commit, so that a run can be repeated and
continued; datasets' streaming mode would only allow to start over.
"""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.errors import UserError, nearest

TEXT = (".txt", ".text", ".md", ".rst")
COMPRESSED = (".gz", ".zst")
_LINES = (".jsonl", ".ndjson", ".json")
_IN_FOLDERS = (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".txt")
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")
_REMOTE_BUFFER = 8 << 20


@dataclass(frozen=True)
class InputFile:
    """One file as it was when the command began; `version` is the modification time, or the store's ETag."""

    name: str
    size: int  # bytes
    version: str

    @property
    def suffix(self) -> str:
        return Path(self.name.partition("?")[0]).suffix

    @property
    def is_remote(self) -> bool:
        return _URL.match(self.name) is not None

    def open(self) -> io.BufferedReader:
        """For reading at any position."""
        if not self.is_remote:
            return Path(self.name).open("rb")
        with _explained(self.name):
            system, path = _fsspec().url_to_fs(self.name)
            remote = system.open(path, "rb", block_size=_REMOTE_BUFFER)
        return io.BufferedReader(remote, _REMOTE_BUFFER)


def expand_inputs(inputs: Iterable[str | Path | InputFile]) -> list[InputFile]:
    """Files, folders and globs, local or URLs, to files: sorted within each; the order is that of the tokens."""
    files: list[InputFile] = []
    for given in inputs:
        if isinstance(given, InputFile):
            files.append(given)
            continue
        given = str(given)
        found = _remote(given) if _URL.match(given) else [local_file(path) for path in _local(given)]
        if not found:
            raise UserError(
                f"no input at {given}: give files, folders or globs of .jsonl, .txt or .parquet (.jsonl.gz "
                f"and .jsonl.zst too), or their URLs (s3://, gs://, https://)"
            )
        files += found
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is named twice among the inputs; its documents would count twice")
    return files


def hub_inputs(name: str, config: str | None, split: str, revision: str | None) -> list[InputFile]:
    """The data files of a split of a hub data set (OWNER/NAME), or of a local folder in the hub's layout."""
    try:
        import datasets
    except ImportError:
        raise UserError("--hub-dataset needs datasets: pip install 'megatron-smol[hub]'") from None
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
    except Exception as error:  # the hub client raises a dozen kinds; most messages are long
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot open the data set {name} ({type(error).__name__}: {reason}); check the name, the "
            f"configuration and the network, or download it and give its folder"
        ) from error
    splits = builder.config.data_files or {}
    if split not in splits:
        raise UserError(f"the data set {name} has no split '{split}': {nearest(split, map(str, splits))}")
    files = expand_inputs(str(file) for file in splits[split])
    known = (*_LINES, *COMPRESSED, *TEXT, ".parquet")
    if odd := [file.name for file in files if file.suffix not in known]:
        raise UserError(
            f"the data set {name} holds {odd[0]}; only JSON lines, parquet and text are read: convert it with "
            f"datasets' to_parquet() and give the files"
        )
    return files


def local_file(path: Path) -> InputFile:
    status = path.stat()
    return InputFile(str(path), status.st_size, str(status.st_mtime_ns))


def _local(given: str) -> Sequence[Path]:
    path = Path(given)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.name.endswith(_IN_FOLDERS))
    if path.is_file():
        return [path]
    return [Path(file) for file in sorted(glob.glob(given, recursive=True)) if Path(file).is_file()]  # noqa: PTH207 (Path.glob refuses absolute patterns)


def _remote(url: str) -> list[InputFile]:
    with _explained(url):
        system, path = _fsspec().url_to_fs(url)
        if any(sign in path for sign in "*[") and not url.startswith("http"):
            paths = sorted(system.glob(path))
        elif not url.startswith("http") and system.isdir(path):
            paths = sorted(found for found in system.find(path) if found.endswith(_IN_FOLDERS))
        else:
            paths = [path]
        return [_remote_file(system, path) for path in paths]


def _remote_file(system: Any, path: str) -> InputFile:
    about = system.info(path)
    name = str(system.unstrip_protocol(path))
    if about.get("size") is None:
        raise UserError(f"{name} does not tell its size, so it cannot be read in pieces; download it first")
    lfs = about.get("lfs") or {}
    version = lfs.get("sha256") or next(
        (
            about[key]
            for key in ("sha256", "ETag", "etag", "md5Hash", "LastModified", "mtime")
            if about.get(key)
        ),
        "",
    )
    return InputFile(name, int(about["size"]), str(version).strip('"'))


def _fsspec() -> Any:
    try:
        import fsspec.core
    except ImportError:
        raise UserError("reading URLs needs fsspec: pip install 'megatron-smol[hub]'") from None
    return fsspec.core


class _explained:
    """Whatever a store's client raises becomes one sentence with the URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            reason = str(error).strip().split("\n")[0] or "no reason given"
            raise UserError(
                f"cannot read {self._url} ({type(error).__name__}: {reason}); check the address, the network "
                f"and your credentials (object stores need s3fs, gcsfs or adlfs)"
            ) from error
