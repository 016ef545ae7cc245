"""Shared fixtures: a tiny recipe with real data, on which a whole run takes seconds."""

from __future__ import annotations

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as it has cores, before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sysconfig
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from megatron_smol.prepare import prepare_libraries
from tests.data.conftest import train_tokenizer
from tests.tiny import TinyRun, write_recipe

prepare_libraries()
os.environ.setdefault("SMOL_DEVICE", "cpu")

# A busy machine is no failure, and the same commit has the same examples everywhere. `make laws` looks for new ones.
settings.register_profile(
    "patient",
    deadline=None,
    derandomize="LAWS_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("patient")

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: takes minutes; run by `make faults`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" in str(config.option.markexpr):
        return
    for item in items:
        if item.get_closest_marker("faults"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make faults"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of real Python code and one of its documentation strings, tokenized for a small vocabulary."""
    from megatron_smol.data.tokenize import preprocess

    folder = tmp_path_factory.mktemp("tiny-data")
    tokenizer = train_tokenizer(folder / "tokenizer")
    for name, pattern in {"web": "json/*.py", "code": "email/*.py", "maths": "statistics.py"}.items():
        rows = folder / f"{name}.jsonl"
        texts = [file.read_text() for file in sorted(STANDARD_LIBRARY.glob(pattern))]
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        preprocess([rows], folder / name, tokenizer, workers=1)
    return folder


@pytest.fixture
def tiny(tiny_data: Path, tmp_path: Path) -> TinyRun:
    """A recipe of four short stages (one a branch with longer windows) and commands to run it."""
    return TinyRun(write_recipe(tiny_data, tmp_path), tiny_data, tmp_path)
