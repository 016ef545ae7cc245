"""`smol curate` from files to files: what is left, what is told, kills, bad input."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_smol.commands.curate import curate as curate_command
from megatron_smol.commands.curate import file_of
from megatron_smol.curate.config import load_curation
from megatron_smol.curate.pipeline import curate
from megatron_smol.curate.reading import opened
from megatron_smol.errors import UserError
from tests.tiny import environment, smol

WORDS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=4 + n % 5)) for n in range(3000)]


def document(chance: random.Random) -> str:
    """Words that quality filters let through, in lines; no two alike."""
    lines = [
        f"The {' '.join(chance.sample(WORDS, 12))} of {chance.choice(WORDS)} and {chance.choice(WORDS)}."
        for _ in range(8)
    ]
    return "\n".join(lines)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six files of 20 documents; every fifth of the last file is a copy of one in the first."""
    chance = random.Random(0)
    texts = [[document(chance) for _ in range(20)] for _ in range(6)]
    for number in range(0, 20, 5):
        texts[5][number] = texts[0][number].replace(".", " -")
    folder = tmp_path / "raw"
    folder.mkdir()
    for number, own in enumerate(texts):
        lines = [
            json.dumps(
                {"text": text, "id": f"{number}/{i}", "score": i % 5, "url": f"https://site{i % 3}.org/x"}
            )
            for i, text in enumerate(own)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def configure(tmp_path: Path, raw: Path, *steps: Any, **more: Any) -> Path:
    path = tmp_path / "curation.yaml"
    settings = {
        "name": "test",
        "inputs": {"paths": str(raw / "*.jsonl*")},
        "output": str(tmp_path / "out"),
        "tasks": 3,
        "workers": 1,
    }
    path.write_text(yaml.safe_dump(settings | {"steps": list(steps)} | more))
    return path


def run(config: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = smol("curate", config, *options)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def kept(output: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted((output / "documents").glob("*.zst")):
        with opened(path) as stream:
            found += [json.loads(line) for line in stream]
    return found


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "documents").iterdir()} | {
        "card": (output / "card.json").read_bytes()
    }


def test_from_files_to_files(tmp_path: Path, raw: Path) -> None:
    (raw / "6.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "too short"}\n{"text": "caf\xe9"}\n{"no": 1}\nnot json\n')
    )
    steps = ["gopher_quality", {"minhash": {"bands": 14, "rows": 8}}, {"score": {"keep": 1}}, "clean"]
    done = run(configure(tmp_path, raw, *steps))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out/card.html")
    found = kept(tmp_path / "out")
    assert len({row["id"] for row in found}) == len(found)
    # 120 documents; 4 are copies, of which the first stays; a fifth of the others has score 0
    assert len(found) == 120 - 4 - 20, sorted(row["id"] for row in found)
    assert "5/5" not in {row["id"] for row in found} and all(row["metadata"]["score"] >= 1 for row in found)
    card = json.loads((tmp_path / "out/card.json").read_text())
    funnel = {row["step"]: row for row in card["funnel"]}
    assert funnel["read"]["documents_in"] == 124
    assert funnel["read"]["reasons"] == {"not_json": 2, "no_text": 1}
    assert funnel["Gopher quality"]["reasons"] == {"gopher_short_doc": 1}
    assert (funnel["near duplicates"]["dropped"], funnel["score"]["dropped"]) == (4, 20)
    assert funnel["score"]["characters_kept"] == sum(len(row["text"]) for row in found)
    assert dict(card["shares"]["domain"]) and len(card["dropped"]["near duplicates"]) == 3
    page = (tmp_path / "out/card.html").read_text()
    assert "92.4" in page and "near duplicates" in page and "too short" in page


def test_the_same_whatever_the_workers_and_told_when_done(tmp_path: Path, raw: Path) -> None:
    steps = ["exact", {"match": {"pattern": WORDS[7], "drop": True}}]
    config = configure(tmp_path, raw, *steps)
    assert run(config).returncode == 0
    assert run(config, "--workers", 3, "--output", tmp_path / "again").returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/documents").iterdir()}
    assert run(config).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/documents").iterdir()} == before


def test_another_configuration_is_not_mixed_in(tmp_path: Path, raw: Path) -> None:
    assert run(configure(tmp_path, raw, "exact")).returncode == 0
    other = configure(tmp_path, raw, {"length": {"min_characters": 10_000}})
    done = run(other)
    assert done.returncode == 2 and "use --overwrite" in done.stderr
    assert run(other, "--overwrite").returncode == 0
    assert kept(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["gopher_qualty"], "step 1, 'gopher_qualty', is not known; did you mean 'gopher_quality'?"),
        (
            ["exact", {"minhash": {"band": 3}}],
            "step 2, minhash: 'band' is not known here; did you mean 'bands'?",
        ),
        ([{"minhash": {"bands": 0}}], "bands: Input should be greater than or equal to 1 (found 0)"),
        ([{"decontaminate": {"files": ["none.jsonl"]}}], "no benchmark file at none.jsonl"),
        ([{"match": {"pattern": "("}}], "'(' is no regular expression"),
        ([{"length": {"min_tokens": 8000}}], "min_tokens needs the tokenizer"),
        ([{"a": 1, "b": 2}], "step 1 must be a name, or one"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, raw: Path, steps: list[Any], message: str) -> None:
    config = configure(tmp_path, raw, *steps)
    with pytest.raises(UserError) as found:
        curate(load_curation(config))
    assert message in str(found.value) and "\n" not in str(found.value)


def test_mistakes_on_the_command_line(tmp_path: Path, raw: Path) -> None:
    config = configure(tmp_path, raw, "exact")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the output .*file is a file; give a folder"):
        curate_command(config, output=tmp_path / "file")
    with pytest.raises(UserError, match="--source web is a source of a recipe; name its file with --recipe"):
        curate_command(config, source="web")
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_inputs(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(UserError, match="no input at"):
        curate(load_curation(configure(tmp_path, tmp_path / "nowhere", "exact")))
    (raw / "7.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    done = run(configure(tmp_path, raw, "exact"))
    assert done.returncode == 3 and "cannot be decompressed" in done.stderr, done.stderr


def test_shipped_files_by_their_names(tmp_path: Path, raw: Path) -> None:
    """`smol curate NAME` is the file of that name; a misspelt one is told with the nearest."""
    done = run(Path("finemath-4plus"), "--input", str(raw), "--output", str(tmp_path / "named"))
    assert done.returncode == 0, done.stderr
    assert len(kept(tmp_path / "named")) == 24, "score 4 of 0 to 4"
    for name, message in (("finemat-4plus", "did you mean 'finemath-4plus'"), ("smoltalk", "smol chatdata")):
        with pytest.raises(UserError, match=message):
            file_of(Path(name))
