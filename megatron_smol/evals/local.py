"""--data-dir: where a task's data lies on this disk, and how its YAML is pointed there.

The files have the hub data set's columns. For a task with data set OWNER/NAME and subset SUB any of these is
read, SPLIT being test, validation or train:

    DIR/TASK/SPLIT.jsonl (.json, .parquet)              such as data/arc_easy/test.jsonl
    DIR/OWNER/NAME/SUB/SPLIT-00000-of-00001.parquet     a downloaded hub data set, also without OWNER
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.errors import DataError

_BUILDERS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class LocalData:
    """The settings that replace a YAML's, and the files they name."""

    overrides: dict[str, Any]
    files: list[Path]


def local_files(data_dir: Path, label: str, config: dict[str, Any]) -> LocalData:
    """Find a task's splits. DataError when the split that is asked, or one for its examples, is not there."""
    asked = config.get("test_split") or config.get("validation_split")
    examples = _examples_split(config) if config.get("num_fewshot") else None
    folders = _folders(data_dir, label, config)
    for folder in folders:
        found = {split: files for split in _splits(config) if (files := _files(folder, split))}
        if asked in found:
            break
    else:
        raise DataError(
            f"no data for task {label} in {data_dir}: {asked}.jsonl, .json or .parquet is expected in "
            f"{' or '.join(str(folder) for folder in folders)}"
        )
    if examples and examples not in found:
        raise DataError(
            f"task {label} shows {config['num_fewshot']} examples from the split '{examples}', and {folder} has no "
            f"{examples}.jsonl, .json or .parquet"
        )
    builders = {_BUILDERS[_suffix(path)] for files in found.values() for path in files}
    if len(builders) > 1:
        raise DataError(f"{folder} mixes JSON and parquet for task {label}; keep one kind")
    absent = {
        key: None
        for key in ("training_split", "validation_split", "fewshot_split")
        if config.get(key) and config[key] not in found
    }
    names = {split: [str(path) for path in files] for split, files in found.items()}
    source = {"dataset_path": builders.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": names}}
    return LocalData(source | absent, [path for files in found.values() for path in files])


def _splits(config: dict[str, Any]) -> list[str]:
    keys = ("test_split", "validation_split", "training_split", "fewshot_split")
    return list(dict.fromkeys(config[key] for key in keys if config.get(key)))


def _examples_split(config: dict[str, Any]) -> str | None:
    fewshot = config.get("fewshot_config") or {}
    if fewshot.get("samples"):
        return None
    named = fewshot.get("split") or config.get("fewshot_split")
    return named or config.get("training_split") or config.get("validation_split")


def _folders(data_dir: Path, label: str, config: dict[str, Any]) -> list[Path]:
    path, subset = str(config.get("dataset_path", "")), config.get("dataset_name") or ""
    hub = [data_dir / path / subset, data_dir / Path(path).name / subset]
    return list(dict.fromkeys([data_dir.joinpath(*label.split(":")), *hub]))


def _files(folder: Path, split: str) -> list[Path]:
    for suffix in _BUILDERS:
        if (folder / f"{split}{suffix}").is_file():
            return [(folder / f"{split}{suffix}").resolve()]
    return sorted(path.resolve() for path in folder.glob(f"{split}-*.parquet"))


def _suffix(path: Path) -> str:
    return ".jsonl.gz" if path.name.endswith(".jsonl.gz") else path.suffix
